"""A language model and a recommender on embedded data, each trained by three methods.

    sce-lm demo

Data are made from the installed Python packages: no hub and no GPU. Runs go to runs/demo; those
that are there are not trained again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sce_lm.benchmarks import report, results
from sce_lm.benchmarks.comparison import TABLES, compare
from sce_lm.benchmarks.methods import methods
from sce_lm.commands import COMMANDS
from sce_lm.commands.presets import PRESETS
from sce_lm.training.train_config import TrainConfig

FOLDER = Path("runs/demo")
METHODS = ("exact", "sce-published", "sce")
LANGUAGE_MODEL = {
    "per_device_batch_size": 4,
    "max_steps": 100,
    "warmup_steps": 20,
    "learning_rate": 2e-3,
    "eval_every": 25,
    "eval_batches": 4,
    "checkpoint_every": 0,
    "log_every": 5,
}
RECOMMENDER = {
    "max_steps": 200,
    "warmup_steps": 20,
    "eval_every": 50,
    "eval_users": 2000,
    "checkpoint_every": 0,
    "log_every": 5,
}


def compared(task: str, changes: dict, what: str) -> results.Comparison:
    """The methods on a preset with these changes."""
    config = TrainConfig(**{**PRESETS[task], **changes})
    comparison = compare(config, [methods()[name] for name in METHODS], FOLDER / task)
    comparison.title = f"{what}: {comparison.title}"
    return comparison


def main(prog: str, arguments: Sequence[str]) -> None:
    """Train and compare; tables go to standard output, results and curves to the folder."""
    argparse.ArgumentParser(prog, description=COMMANDS["demo"]).parse_args(arguments)
    comparisons = [
        compared("lm", LANGUAGE_MODEL, "Language model"),
        compared("items", RECOMMENDER, "Recommender"),
    ]
    for comparison in comparisons:
        report.print_line(f"\n{comparison.title}")
        for table in TABLES:
            table.print(comparison.rows)
    found = results.Results("train", comparisons, **results.provenance("cpu"))
    found.save(FOLDER / "results.json")
    print("\nCurves:", ", ".join(comparison.sizes["curves"] for comparison in comparisons))
    print(f"Results: {FOLDER}/results.json")
