"""The same model, data order and schedule trained by several methods and seeds.

For each configuration of sce-lm train a table of the loss's cost and of test metrics that are
exact whatever was trained; with several seeds, means and standard deviations. `configured` is the
configuration's own objective. Runs that are finished are not trained again, and one that was
stopped goes on from its checkpoint. Each configuration's folder has curves.png (against steps,
seconds and operations).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sce_lm.benchmarks import methods, results
from sce_lm.benchmarks.comparison import PLOTS, TABLES, compare
from sce_lm.benchmarks.methods import Method
from sce_lm.training.command_line import as_arguments, parse_config
from sce_lm.training.task_sources import build_task
from sce_lm.training.yaml12 import plain_value, read_yaml

__all__ = ["PLOTS", "TABLES", "add_arguments", "measure"]
DEFAULT = ("exact", "sce", "sce-tail", "sce-published", "unigram", "in-batch", "bce", "gbce")
DEFAULT += ("bir", "xir", "kernel-sampling", "rece")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("configs", nargs="+", type=Path, help="configurations of sce-lm train")
    methods.add_options(parser, DEFAULT)
    add_run_options(parser, Path("runs/train"))


def add_run_options(parser: argparse.ArgumentParser, folder: Path) -> None:
    """What the runs of a comparison have in common."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    parser.add_argument("--steps", type=int, help="max_steps, a tenth of them to warm up")
    parser.add_argument(
        "--fields", metavar="JSON", default="{}", help="further fields of the runs, a mapping"
    )
    parser.add_argument("--folder", type=Path, default=folder, help="of all runs")


def measure(arguments: argparse.Namespace) -> Sequence[results.Comparison]:
    """One comparison for each configuration."""
    changes, comparisons = as_arguments(run_fields(arguments)), []
    for path in arguments.configs:
        config = parse_config([str(path), *changes])
        own = {"name": config.objective, **config.objective_options}
        configured = Method("configured", "as configured", own)
        vocab_size = len(build_task(config).tokenizer)
        chosen = methods.choose(arguments, vocab_size, configured)
        comparison = compare(config, chosen, arguments.folder / path.stem, arguments.seeds)
        comparison.title = f"{path.stem}: {comparison.title}"
        comparisons.append(comparison)
    return comparisons


def run_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields that ``--steps`` and ``--fields`` change."""
    steps = arguments.steps
    schedule = {} if steps is None else {"max_steps": steps, "warmup_steps": max(1, steps // 10)}
    given = plain_value(read_yaml(arguments.fields, "the command line", "--fields"))
    if not isinstance(given, dict):
        raise ValueError(
            f"--fields is {arguments.fields!r}; expected a mapping of fields, for instance "
            "'{\"per_device_batch_size\": 4}'."
        )
    return {**schedule, **given}
