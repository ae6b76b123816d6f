"""The same training with several methods and seeds, and what their losses cost."""

from __future__ import annotations

import dataclasses
import gc
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sce_lm import objectives
from sce_lm.benchmarks import results
from sce_lm.benchmarks.methods import Method, methods
from sce_lm.benchmarks.peers import STOCK
from sce_lm.benchmarks.real import problem_of_batch
from sce_lm.benchmarks.report import METHOD, Column, Plot, Table
from sce_lm.benchmarks.side_by_side import Settings, measure_methods
from sce_lm.hf.adapter import apply_sce
from sce_lm.training.metrics_file import with_costs
from sce_lm.training.models import load_model
from sce_lm.training.plots import draw_curves
from sce_lm.training.run_building import build_run
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.task import DataOrder, Task
from sce_lm.training.train_config import TrainConfig

COST = Column(
    *("x stock", "trainable.speedup", ".2f"),
    "forward and backward of the loss alone on the first method's model, times as fast as plain "
    "cross-entropy",
)
NLL, NDCG = Column("test NLL", "test.nll", ".4f"), Column("NDCG@10", "test.ndcg@10", ".4f")
TABLES = (
    Table(
        "Trained alike, tested exactly (mean and standard deviation over seeds)",
        (
            METHOD,
            Column("s / step", "seconds_per_step", ".2f"),
            Column("s in the loss", "trainable.seconds", ".3f"),
            COST,
            Column("peak MiB of the loss", "trainable.peak_mib", ",.0f"),
            NLL,
            Column("accuracy", "test.accuracy", ".4f"),
            Column("ECE", "test.ece", ".4f", "expected calibration error"),
            Column(
                *("log Zhat - log Z", "test.log_z_bias", ".4f"),
                "what the objective's own draws make of validation positions at the end",
            ),
            NDCG,
            Column("HR@10", "test.hr@10", ".4f"),
            Column("coverage@10", "test.coverage@10", ".4f", "share of the items in some list"),
            Column(
                *("time to the first's", "sooner", ".2f"),
                "training time until the validation was as good as the first method's best, over "
                "what the first method took to it",
            ),
        ),
    ),
)
PLOTS = (
    Plot("test NLL", COST, NLL, keep=lambda row: "nll" in row.get("test", {})),
    Plot("test NDCG@10", COST, NDCG, keep=lambda row: "ndcg@10" in row.get("test", {})),
)

Records = list[dict[str, Any]]
"""Of a metrics.jsonl, as ``with_costs`` gives them."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What the runs of a method, one a seed, left behind."""

    method: Method
    task: Task
    """Of the last one."""
    folders: list[RunFolder]
    records: list[Records]
    figures: dict[str, Any]
    """Of the method's row: ``test``, ``seconds_per_step`` and ``loss_seconds_per_step``, a value a
    seed."""


def train(config: TrainConfig, method: Method, folder: Path, seeds: Sequence[int]) -> Trained:
    """Train ``config`` with a method, once a seed.

    Runs that are finished, or that can be resumed, are not trained anew.

    Args:
        config: its objective, options, seed and output folder are replaced.
        folder: where the runs go.

    Raises:
        FloatingPointError: the loss does not stay finite.
    """
    folders = [run_of(folder, method, seed) for seed in seeds]
    options = {k: v for k, v in method.specification.items() if k != "name"}
    summaries: list[dict[str, Any]] = []
    task: Any = None
    for seed, run_folder in zip(seeds, folders):
        run = build_run(
            dataclasses.replace(
                config,
                objective=method.specification["name"],
                objective_options=options,
                output_dir=str(run_folder),
                seed=seed,
            )
        )
        summaries.append(run.train())
        task = run.task
        # A run, its model and its optimiser refer to each other; the next one needs room.
        del run
        gc.collect()
    records = [
        with_costs(run_folder.records(), summary["vocabulary"])
        for run_folder, summary in zip(folders, summaries)
    ]
    figures: dict[str, Any] = {
        name: [summary[name] for summary in summaries]
        for name in ("seconds_per_step", "loss_seconds_per_step")
    }
    figures["test"] = _by_seed([s["test"] | s["objective_error"] for s in summaries])
    return Trained(method, task, folders, records, figures)


def compare(
    config: TrainConfig,
    chosen: Sequence[Method],
    folder: Path,
    seeds: Sequence[int] | None = None,
) -> results.Comparison:
    """:func:`train` with each method, and measure each loss in a process of its own.

    The costs are taken on the hidden states of the first method's trained model for the first
    batch of training. A method whose loss does not stay finite is reported and left out.

    Args:
        config: its objective, options, seed and output folder are replaced.
        chosen: the first one trains the model that the losses are measured on.
        folder: where the runs and curves.png go.
        seeds: of initialisation, data order and noise; None: the one of ``config``.

    Returns:
        A row for each method, stock cross-entropy and the baselines that need no training:
        ``trainable``, the loss's cost; the figures of :class:`Trained`; and ``sooner``, see
        ``TABLES``.

    Raises:
        ValueError: a method that is none, before anything is trained.
        FloatingPointError: the first method's loss does not stay finite.
    """
    seeds = [config.seed] if seeds is None else seeds
    asked = [(method, objectives.get(**method.specification)) for method in chosen]
    trained: dict[str, Trained] = {}
    figures: dict[str, dict[str, Any]] = {}
    for method in chosen:
        try:
            trained[method.label] = train(config, method, folder, seeds)
        except FloatingPointError as error:
            if not trained:
                raise
            figures[method.label] = {"notes": [f"failed; {error}"]}
            continue
        figures[method.label] = trained[method.label].figures
    first = next(iter(trained.values()))

    curves = folder / "curves.png"
    draw_curves({n: each.records for n, each in trained.items()}, curves, first.task.headline[0])
    for label, shares in sooner(trained).items():
        figures[label]["sooner"] = shares
    measured, rows = _measure_costs(config, first, asked)
    for row in rows:
        row |= figures.get(row["label"], {})
    rows += baselines(first.task)
    sizes = dataclasses.asdict(measured) | {"steps": config.max_steps, "curves": str(curves)}
    del sizes["title"]  # of the problem, which would take the comparison's place in a file
    title = f"{config.max_steps} steps, {len(seeds)} seed(s); the loss on {measured}"
    return results.Comparison(title, sizes, rows)


def baselines(task: Task) -> list[dict[str, Any]]:
    """Rows of the methods that need no training."""
    return [{"label": label, "test": _by_seed([test])} for label, test in task.baselines().items()]


def run_of(folder: Path, method: Method, seed: int) -> RunFolder:
    """Where :func:`compare` keeps a run."""
    slug = re.sub(r"[^\w.=-]+", "-", method.label).strip("-")
    return RunFolder(folder / slug / f"seed-{seed}")


def _measure_costs(
    config: TrainConfig,
    first: Trained,
    asked: Sequence[tuple[Method, objectives.Objective]],
) -> tuple[Any, list[dict[str, Any]]]:
    """The problem of the first run's model, and a row for stock and each method. An objective is
    measured as it is after its first calls, which may be cheaper."""
    model, task = load_model(first.folders[0].model), first.task
    apply_sce(model, objectives.get("exact"))
    order = DataOrder(task.num_rows, config.per_device_batch_size, 1, config.seed)
    batch = task.batch(next(order.step_batches(0, 0, 1)))
    settled = [
        dataclasses.replace(method, specification=method.specification | {"labels_first": 0})
        if hasattr(objective.config, "labels_first")
        else method
        for method, objective in asked
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="sce_lm-comparison-") as name:
        problem = problem_of_batch(model, batch, Path(name), "the first batch")
        del model
        how = Settings(device, heads=("trainable",), floors=False)
        rows = measure_methods(problem, Path(name), [methods()[STOCK], *settled], how)
    for row, (method, _) in zip(rows[1:], asked):
        row["specification"] = method.specification
        row["resolved"] = method.resolved(problem.positions, problem.vocab_size, problem.width)
    return problem, rows


def _by_seed(tests: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The numbers among the values of each seed, by name."""
    names = [name for name, value in tests[0].items() if isinstance(value, int | float)]
    return {name: [test[name] for test in tests] for name in names}


def sooner(trained: Mapping[str, Trained]) -> dict[str, list[float | None]]:
    """For each method and seed the training time until the validation was as good as the first
    method's best, over that of the first method; None if it never was."""
    first = next(iter(trained.values()))
    sign = 1 if first.task.higher_is_better else -1
    found: dict[str, list[float | None]] = {label: [] for label in trained}
    for seed, records in enumerate(first.records):
        points = validation_curve(records, first.task)
        goal, seconds = max((sign * value, -time) for time, value in points)
        for label, runs in trained.items():
            points = validation_curve(runs.records[seed], first.task)
            times = [time for time, value in points if sign * value >= goal]
            found[label].append(times[0] / -seconds if times else None)
    return found


def validation_curve(records: Records, task: Task) -> list[tuple[float, float]]:
    """(seconds of training, the task's first validation figure) at each evaluation."""
    metric = f"validation/{task.headline[0]}"
    return [(r["seconds"], r[metric]) for r in records if metric in r]
