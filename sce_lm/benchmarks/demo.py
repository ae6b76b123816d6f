"""The demo's comparison: quality against the time of training, for several methods.

A row has its test figures, ``validation``, the validation figure at the end, and, of a method that
is trained, ``curve``, (seconds of training, validation figure) at each evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sce_lm.benchmarks.comparison import Trained, baselines, sooner, validation_curve
from sce_lm.benchmarks.report import METHOD, Column, Row, Table
from sce_lm.benchmarks.results import Comparison
from sce_lm.training.plots import limits
from sce_lm.training.task import DataOrder
from sce_lm.training.train_config import TrainConfig

Lines = Mapping[str, Sequence[tuple[float, float]]]
"""Points by name."""
NLL = Column("test NLL", "test.nll", ".3f", "nats a token, lower is better")
NDCG = Column(
    "test NDCG@10", "test.ndcg@10", ".4f", "1: the next item is always first; higher is better"
)
TABLES = (
    Table(
        "Trained alike, tested exactly",
        (
            METHOD,
            Column("s / step", "seconds_per_step", ".2f"),
            Column("of it in the loss", "loss_seconds_per_step", ".2f"),
            Column(
                *("time to exact's best", "sooner", ".2f"),
                "training time until the validation was as good as exact's best, over what exact "
                "took to it",
            ),
            NLL,
            Column("accuracy", "test.accuracy", ".3f"),
            NDCG,
            Column("HR@10", "test.hr@10", ".4f", "share of the lists with the next item"),
        ),
    ),
)


@dataclass(frozen=True)
class Curves:
    """Validation figures against seconds of training, each curve named at its end with the test
    figure that the table has; methods without training are lines across."""

    title: str
    ylabel: str
    tested: Column
    higher_is_better: bool

    def lines(self, rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
        """Points by name; one point alone is a line across."""
        found = {}
        for row in rows:
            if self.tested.cell(row):
                name = f"{row['label']}, test {self.tested.cell(row)}"
                points = row.get("curve") or [(0.0, row["validation"])]
                found[name] = [(x, y) for x, y in points]
        return found

    def limits(self, lines: Lines) -> tuple[float, float]:
        """Of the figure's axis; what does not fit is named at its end."""
        figures = [[y for _, y in points] for points in lines.values()]
        curves = [curve for curve in figures if len(curve) > 1]
        across = [curve[0] for curve in figures if len(curve) == 1]
        return limits(curves, higher_is_better=self.higher_is_better, lines=across)

    def draw(self, axes: Any, title: str, lines: Lines) -> None:
        """Into matplotlib's axes."""
        low, high = self.limits(lines)
        ends: list[tuple[float, float, float, str, str]] = []
        right = max(x for points in lines.values() for x, _ in points)
        for number, (name, points) in enumerate(lines.items()):
            color = f"C{number}"
            if len(points) > 1:
                axes.plot(*zip(*points), color=color, marker="o", markersize=4)
            else:
                axes.axhline(points[0][1], color=color, linestyle="--", linewidth=1)
                points = [(right, points[0][1])]
            x, y = points[-1]
            if not low <= y <= high:
                name += " (off the axis)"
            shown = min(max(y, low), high)
            ends.append(((shown - low) / (high - low), x, shown, name, color))
        place = -1.0
        for fraction, x, y, name, color in sorted(ends):
            place = max(fraction, place + 0.07)
            axes.annotate(
                name,
                (x, y),
                xytext=(1.03, place),
                textcoords="axes fraction",
                color=color,
                va="center",
                fontsize=9,
                arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.4},
            )
        axes.set(
            title=f"{title}: {self.title}",
            xlabel="seconds of training",
            ylabel=self.ylabel,
            xlim=(0, None),
            ylim=(low, high),
        )
        axes.grid(alpha=0.3)


PLOTS = (
    Curves("likelihood over time", "validation NLL, nats a token (lower is better)", NLL, False),
    Curves("lists over time", "validation NDCG@10 (higher is better)", NDCG, True),
)


def shown(trained: Sequence[Trained], config: TrainConfig, what: str) -> Comparison:
    """Rows of the methods, exact cross-entropy first, and of those that need no training."""
    task = trained[0].task
    order = DataOrder(task.num_rows, config.per_device_batch_size, 1, config.seed)
    labels = task.batch(next(order.step_batches(0, 0, 1)))["labels"][:, 1:]
    positions, width = int((labels != -100).sum()), config.model_config["hidden_size"]
    sizes = {"positions": positions, "vocab_size": len(task.tokenizer), "width": width}
    times = sooner({found.method.label: found for found in trained})
    rows: list[dict[str, Any]] = []
    for found in trained:
        curve = validation_curve(found.records[0], task)
        row = dataclasses.asdict(found.method) | found.figures
        row |= {"resolved": found.method.resolved(**sizes), "curve": curve}
        rows.append(row | {"sooner": times[found.method.label], "validation": curve[-1][1]})
    asked = task.baselines("validation")
    for row in baselines(task):
        rows.append(row | {"validation": asked[row["label"]][task.headline[0]]})
    title = (
        f"{what}: {config.max_steps} steps of {positions:,} positions, vocabulary "
        f"{len(task.tokenizer):,}, width {width}"
    )
    return Comparison(title, sizes | {"steps": config.max_steps}, rows)
