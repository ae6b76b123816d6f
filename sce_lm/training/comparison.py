"""The same training with several objectives and seeds, side by side: one table, one plot, one JSON
file."""

import dataclasses
import gc
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sce_lm import objectives
from sce_lm.files import write_json
from sce_lm.hf.adapter import apply_sce, lazy_logits
from sce_lm.training import loss_cost
from sce_lm.training.loss_cost import LossCost
from sce_lm.training.metrics_file import with_costs
from sce_lm.training.models import load_model
from sce_lm.training.plots import draw_curves
from sce_lm.training.run_building import build_run
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.task import DataOrder, Task, on_device
from sce_lm.training.train_config import TrainConfig


@dataclass(frozen=True)
class Method:
    """A line of the comparison."""

    objective: str
    """Its name in sce_lm.objectives."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Its options."""


@dataclass(frozen=True)
class Comparison:
    """Runs that differ in nothing but objective and seed, and what their losses cost."""

    summaries: dict[str, list[dict[str, Any]]]
    """The summary.json of each seed's run, by the method's label."""
    failures: dict[str, str]
    """Why a method has no summaries, by its label."""
    sooner: dict[str, list[float | None]]
    """Seconds of training until the validation was as good as the first method's best, over
    those that the first method took to it; one for each seed, None if it never was."""
    costs: dict[str, LossCost]
    """The loss alone, by label; "stock" is plain cross-entropy."""
    measured: dict[str, Any]
    """Positions, vocabulary, width and dtype at which the costs hold."""
    baselines: dict[str, dict[str, float]]
    """Test figures of methods that need no training."""
    curves: Path
    """The plot."""

    def print(self, title: str, figures: Mapping[str, str]) -> None:
        """Print the table; ``figures`` maps test figures to their headings. With several seeds
        they are means and standard deviations."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        table.add_column("method")
        headings = ("s / step", "s in the loss", "peak MiB of the loss", *figures.values())
        for heading in (*headings, f"time to {next(iter(self.summaries))}'s"):
            table.add_column(heading, justify="right")
        for label, cost in self.costs.items():
            cells = [f"{cost.seconds:.3f}", f"{cost.peak_mib:.0f}"]
            if label not in self.summaries:
                table.add_row(label, "", *cells, *("" for _ in figures))
            else:
                seconds = statistics.mean(s["seconds_per_step"] for s in self.summaries[label])
                test = [_mean_and_deviation(self.test(label, name)) for name in figures]
                table.add_row(label, f"{seconds:.2f}", *cells, *test, self._time(label))
        for label, test in self.baselines.items():
            values = [f"{test[name]:.4f}" if name in test else "" for name in figures]
            table.add_row(label, "", "", "", *values)
        console = Console(width=170)
        console.print(table)
        for label, reason in self.failures.items():
            console.print(f"{label}: failed; {reason}", markup=False)

    def _time(self, label: str) -> str:
        """The mean of what got there."""
        shares = self.sooner[label]
        reached = [share for share in shares if share is not None]
        if not reached:
            return "never"
        count = "" if len(reached) == len(shares) else f" ({len(reached)} of {len(shares)})"
        return f"{statistics.mean(reached):.2f}{count}"

    def test(self, label: str, figure: str) -> list[float]:
        """A test figure of each seed's run, or one of its objective's draws on validation
        positions; none where there is no such figure."""
        found = [s["test"] | s["objective_error"] for s in self.summaries[label]]
        return [figures[figure] for figures in found if figure in figures]


def _mean_and_deviation(values: Sequence[float]) -> str:
    """The mean, and the standard deviation of several."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


Records = list[dict[str, Any]]


def _sooner(runs: Mapping[str, Sequence[Records]], task: Task) -> dict[str, list[float | None]]:
    """See :class:`Comparison`."""
    figure, sign = f"validation/{task.headline[0]}", 1 if task.higher_is_better else -1

    def evaluations(records: Records) -> list[tuple[float, float]]:
        return [(r["seconds"], sign * r[figure]) for r in records if figure in r]

    found: dict[str, list[float | None]] = {label: [] for label in runs}
    for seed, first in enumerate(next(iter(runs.values()))):
        goal, seconds = max((value, -t) for t, value in evaluations(first))
        for label, of_seeds in runs.items():
            times = [t for t, value in evaluations(of_seeds[seed]) if value >= goal]
            found[label].append(times[0] / -seconds if times else None)
    return found


def _settled(objective: objectives.Objective) -> dict[str, Any]:
    """Name and options of what an objective is after its first calls, which may be cheaper."""
    specification = objective.to_dict()
    if "labels_first" in specification:
        specification["labels_first"] = 0
    return specification


def save_loss_inputs(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], path: Path
) -> dict[str, Any]:
    """Write what enters the head for one batch of causal language modelling.

    Args:
        model: patched by ``apply_sce``; its transform of the logits must be a LogitTransform.
        batch: its inputs, with ``labels``.
        path: safetensors file to write.

    Returns:
        The problem's ``positions``, ``vocab_size``, ``width`` and ``dtype``.
    """
    inputs = on_device(batch, model.device)
    labels = inputs.pop("labels")[:, 1:]
    model.eval()
    with torch.no_grad(), lazy_logits(model):
        hidden_states, head = model(**inputs, use_cache=False).logits.parts()
    columns = [part for part in (head.weight, head.low_rank) if part is not None]
    weight = torch.cat(columns, dim=1) if len(columns) > 1 else head.weight
    valid = labels != -100
    tensors = {
        "hidden_states": hidden_states[:, :-1][valid],
        "weight": weight.detach(),
        "labels": labels[valid],
    }
    if head.bias is not None:
        tensors["bias"] = head.bias.detach()
    loss_cost.save_inputs(path, tensors, head.post)
    vocab_size, width = weight.shape
    return {
        "positions": int(valid.sum()),
        "vocab_size": vocab_size,
        "width": width,
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def compare(
    config: TrainConfig,
    methods: Mapping[str, Method],
    folder: Path,
    seeds: Sequence[int] | None = None,
) -> Comparison:
    """Train ``config`` with each method and seed, and measure each loss in a process of its own.

    Runs that are finished, or that can be resumed, are not trained anew. The costs are taken on
    the hidden states of the first method's trained model for the first batch of training. A method
    whose loss does not stay finite is reported and left out.

    Args:
        config: its objective, options, seed and output folder are replaced.
        methods: by label; the first one trains the model that the losses are measured on.
        folder: where the runs, curves.png and comparison.json go.
        seeds: of initialisation, data order and noise; None: the one of ``config``.

    Raises:
        ValueError: a method that is none, before anything is trained.
        FloatingPointError: the first method's loss does not stay finite.
    """
    seeds = [config.seed] if seeds is None else seeds
    asked = {label: objectives.get(m.objective, **m.options) for label, m in methods.items()}
    summaries: dict[str, list[dict[str, Any]]] = {}
    records: dict[str, list[Records]] = {}
    failures: dict[str, str] = {}
    task: Task | None = None

    def folder_of(label: str, seed: int) -> RunFolder:
        return RunFolder(folder / label.replace(" ", "-") / f"seed-{seed}")

    for label, method in methods.items():
        try:
            found = [_train(config, method, seed, folder_of(label, seed)) for seed in seeds]
        except FloatingPointError as error:
            if not summaries:
                raise
            failures[label] = str(error)
            continue
        summaries[label] = [summary for summary, _, _ in found]
        records[label] = [with_seconds for _, with_seconds, _ in found]
        task = found[-1][2]
    assert task is not None

    first = folder_of(next(iter(methods)), seeds[0])
    costs, measured = _measure_losses(config, first, task, asked, folder)
    curves = folder / "curves.png"
    draw_curves(records, curves, task.headline[0])
    sooner = _sooner(records, task)
    comparison = Comparison(summaries, failures, sooner, costs, measured, task.baselines(), curves)
    write_json(folder / "comparison.json", dataclasses.asdict(comparison) | {"curves": str(curves)})
    return comparison


def _train(
    config: TrainConfig, method: Method, seed: int, folder: RunFolder
) -> tuple[dict[str, Any], Records, Task]:
    """A run's summary, records and task; nothing else of it stays in memory."""
    changes = {"objective": method.objective, "objective_options": dict(method.options)}
    run = build_run(dataclasses.replace(config, **changes, output_dir=str(folder), seed=seed))
    summary, task = run.train(), run.task
    # A run, its model and its optimiser refer to each other; the next one needs room.
    del run
    gc.collect()
    return summary, with_costs(folder.records(), summary["vocabulary"]), task


def _measure_losses(
    config: TrainConfig,
    run: RunFolder,
    task: Task,
    asked: Mapping[str, objectives.Objective],
    folder: Path,
) -> tuple[dict[str, LossCost], dict[str, Any]]:
    """The costs on what enters the head of a run's model, and its sizes."""
    trained = load_model(run.model)
    apply_sce(trained, objectives.get("exact"))
    order = DataOrder(task.num_rows, config.per_device_batch_size, 1, config.seed)
    inputs = folder / "loss_inputs.safetensors"
    batch = task.batch(next(order.step_batches(0, 0, 1)))
    measured = save_loss_inputs(trained, batch, inputs)
    costs = {loss_cost.STOCK: loss_cost.measure(inputs, {"name": loss_cost.STOCK})}
    costs |= {label: loss_cost.measure(inputs, _settled(o)) for label, o in asked.items()}
    inputs.unlink()
    return costs, measured
