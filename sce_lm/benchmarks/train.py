"""The same model, data order and schedule trained by several objectives and seeds.

For each configuration of scripts/train.py: a table of seconds a step, seconds and memory of the
loss alone, and test figures that are exact whatever was trained; with several seeds, means and
standard deviations. Objectives that sample take equally many logits a position (--logits);
"configured" is the configuration's own. Runs that are finished are not trained again, and one that
was stopped goes on from its checkpoint. Each configuration's folder has curves.png (against
steps, seconds and operations) and comparison.json.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sce_lm.benchmarks import report
from sce_lm.benchmarks.methods import Method, choose, equal_logits
from sce_lm.training.yaml12 import plain_value, read_yaml

HEADINGS = {
    "lm": {
        "nll": "exact test NLL",
        "accuracy": "accuracy",
        "ece": "ECE",
        "log_z_bias": "log Zhat - log Z",
    },
    "items": {"ndcg@10": "NDCG@10", "hr@10": "HR@10", "coverage@10": "coverage@10"},
}
"""By task: test figures and what the table calls them. ECE is the expected calibration error, log
Zhat - log Z what the objective's own draws make of validation positions at the end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("configs", nargs="+", type=Path, help="configurations of scripts/train.py")
    parser.add_argument("--methods", metavar="A,B", help="rows to train, by name; default: all")
    parser.add_argument("--logits", type=int, default=2048, help="logits of a position")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each")
    parser.add_argument("--steps", type=int, help="max_steps, a tenth of them to warm up")
    parser.add_argument(
        "--fields", metavar="JSON", default="{}", help="further fields of the runs, a mapping"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/train"), help="of all runs")


def run(arguments: argparse.Namespace) -> None:
    """Train, print, and write what was asked for."""
    # transformers and its friends take some seconds.
    from sce_lm.training import comparison
    from sce_lm.training.command_line import as_arguments, parse_config
    from sce_lm.training.task_sources import build_task

    changes = as_arguments(_fields(arguments))
    described = report.machine(arguments.device)
    results, panels = [], []
    for path in arguments.configs:
        config = parse_config([str(path), *changes])
        vocab_size = len(build_task(config).tokenizer)
        rows = equal_logits(arguments.logits, vocab_size)
        if arguments.methods is not None:
            own = {"name": config.objective, **config.objective_options}
            rows = choose([Method("configured", "as configured", own), *rows], arguments.methods)
        methods = {}
        for row in rows:
            options = dict(row.specification)
            methods[row.label] = comparison.Method(options.pop("name"), options)
        result = comparison.compare(config, methods, arguments.folder / path.stem, arguments.seeds)
        what = f"{path.stem}: {config.max_steps} steps, {len(arguments.seeds)} seed(s); the loss on"
        report.print_heading(described, what + _sizes(result.measured))
        result.print(path.stem, HEADINGS[config.task])
        results.append({"config": str(path), **dataclasses.asdict(result)})
        panels.append(_panel(path.stem, result, next(iter(HEADINGS[config.task]))))
    report.write_json(
        arguments.json,
        {"command": "train", "machine": described, "results": [_plain(r) for r in results]},
    )
    report.draw(arguments.plot, panels)


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    steps = arguments.steps
    schedule = {} if steps is None else {"max_steps": steps, "warmup_steps": max(1, steps // 10)}
    given = plain_value(read_yaml(arguments.fields, "the command line", "--fields"))
    if not isinstance(given, dict):
        raise ValueError(
            f"--fields is {arguments.fields!r}; expected a mapping of fields, for instance "
            "'{\"per_device_batch_size\": 4}'."
        )
    return {**schedule, **given}


def _sizes(measured: Mapping[str, Any]) -> str:
    return (
        f" {measured['positions']:,} positions, vocabulary {measured['vocab_size']:,}, width "
        f"{measured['width']}, {measured['dtype']}"
    )


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    return result | {"curves": str(result["curves"])}


def _panel(title: str, result: Any, figure: str) -> report.Panel:
    """A test figure against the loss's seconds."""
    series = {
        label: [(result.costs[label].seconds, value, label) for value in values]
        for label, values in ((name, result.test(name, figure)) for name in result.summaries)
    }
    return report.Panel(title, "seconds in the loss", f"test {figure}", series)
