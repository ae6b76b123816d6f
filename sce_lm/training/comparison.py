"""The same training with several objectives, side by side: one table, one plot, one JSON file."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from sce_lm import objectives
from sce_lm.files import write_json
from sce_lm.hf.adapter import apply_sce, lazy_logits
from sce_lm.training import loss_cost
from sce_lm.training.config import TrainConfig
from sce_lm.training.loop import Run
from sce_lm.training.loss_cost import LossCost
from sce_lm.training.plots import draw_curves
from sce_lm.training.task import DataOrder, Task, on_device


@dataclass(frozen=True)
class Method:
    """A line of the comparison."""

    objective: str
    """Its name in sce_lm.objectives."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Its options."""


@dataclass(frozen=True)
class Comparison:
    """Runs that differ in nothing but the objective, and what their losses cost."""

    summaries: dict[str, dict[str, Any]]
    """A run's summary.json by the method's label."""
    costs: dict[str, LossCost]
    """The loss alone, by label; "stock" is plain cross-entropy."""
    measured: dict[str, Any]
    """Positions, vocabulary, width and dtype at which the costs hold."""
    baselines: dict[str, dict[str, float]]
    """Held-out figures of methods that need no training."""
    curves: Path
    """The plot."""

    def print(self, title: str, figures: Mapping[str, str]) -> None:
        """Print the table; ``figures`` maps held-out figures to their headings."""
        table = Table(title=title, title_justify="left")
        table.add_column("method")
        for heading in ("s / step", "s in the loss", "peak MiB of the loss", *figures.values()):
            table.add_column(heading, justify="right")
        for label, cost in self.costs.items():
            summary = self.summaries.get(label)
            cells = [f"{cost.seconds:.3f}", f"{cost.peak_mib:.0f}"]
            if summary is None:
                table.add_row(label, "", *cells, *("" for _ in figures))
            else:
                held_out = [f"{summary['test'][name]:.4f}" for name in figures]
                table.add_row(label, f"{summary['seconds_per_step']:.2f}", *cells, *held_out)
        for label, held_out in self.baselines.items():
            table.add_row(label, "", "", "", *(f"{held_out[name]:.4f}" for name in figures))
        Console(width=110).print(table)


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
        parts = model(**inputs, use_cache=False).logits.parts()
    columns = [part for part in (parts.weight, parts.low_rank) if part is not None]
    weight = torch.cat(columns, dim=1) if len(columns) > 1 else parts.weight
    valid = labels != -100
    tensors = {
        "hidden_states": parts.hidden_states[:, :-1][valid],
        "weight": weight.detach(),
        "labels": labels[valid],
    }
    if parts.bias is not None:
        tensors["bias"] = parts.bias.detach()
    loss_cost.save_inputs(path, tensors, parts.post)
    vocab_size, width = weight.shape
    return {
        "positions": int(valid.sum()),
        "vocab_size": vocab_size,
        "width": width,
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def compare(config: TrainConfig, methods: Mapping[str, Method], folder: Path) -> Comparison:
    """Train ``config`` with each method in turn and measure each loss in a process of its own.

    Runs that are finished, or that can be resumed, are not trained anew. The costs are taken on
    the hidden states of the first method's trained model for the first batch of training.

    Args:
        config: its objective, options and output folder are replaced.
        methods: by label; the first one trains the model that the losses are measured on.
        folder: where the runs, curves.png and comparison.json go.
    """
    runs = {label: folder / label.replace(" ", "-") for label in methods}
    summaries: dict[str, dict[str, Any]] = {}
    task: Task | None = None
    for label, method in methods.items():
        run = Run(
            dataclasses.replace(
                config,
                objective=method.objective,
                objective_options=type(config.objective_options)(method.options),
                output_dir=str(runs[label]),
            )
        )
        summaries[label] = run.train()
        task = run.task
    assert task is not None

    trained = AutoModelForCausalLM.from_pretrained(next(iter(runs.values())) / "model")
    apply_sce(trained, objectives.get("exact"))
    order = DataOrder(task.num_rows, config.per_device_batch_size, 1, config.seed)
    inputs = folder / "loss_inputs.safetensors"
    batch = task.batch(next(order.step_batches(0, 0, 1)))
    measured = save_loss_inputs(trained, batch, inputs)
    asked = {"stock": {"name": loss_cost.STOCK}} | {
        label: objectives.get(method.objective, **method.options).to_dict()
        for label, method in methods.items()
    }
    costs = {label: loss_cost.measure(inputs, method) for label, method in asked.items()}
    inputs.unlink()

    curves = folder / "curves.png"
    draw_curves(runs, curves, task.headline[0])
    comparison = Comparison(summaries, costs, measured, task.baselines(), curves)
    write_json(folder / "comparison.json", dataclasses.asdict(comparison) | {"curves": str(curves)})
    return comparison
