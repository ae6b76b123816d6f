"""PNG plots of one or several runs: curves from their metrics.jsonl, recommendations by popularity.

All raise ImportError where matplotlib is not installed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sce_lm.training.metrics import read_metrics, training_seconds


def draw_curves(runs: Mapping[str, Path], path: Path, held_out: str) -> None:
    """Draw training loss and a held-out figure against the step, and the latter against the seconds
    spent in training steps, one line a run.

    Args:
        runs: label and run folder.
        path: PNG file to write.
        held_out: name of the held-out figure, e.g. "nll" or "ndcg@10".
    """
    figure, (loss_axes, held_out_axes, time_axes) = _figure(3)
    for label, folder in runs.items():
        records = read_metrics(Path(folder) / "metrics.jsonl")
        losses = [(r["step"], r["loss"]) for r in records if "loss" in r]
        figures = [(r["step"], r[held_out]) for r in records if held_out in r]
        seconds = dict(training_seconds(records))
        timed = [(seconds[step], value) for step, value in figures if step in seconds]
        loss_axes.plot(*_columns(losses), label=label)
        held_out_axes.plot(*_columns(figures), marker="o", label=label)
        time_axes.plot(*_columns(timed), marker="o", label=label)
    loss_axes.set(title="training loss", xlabel="step", ylabel="nats")
    held_out_axes.set(title=f"held-out {held_out}", xlabel="step")
    time_axes.set(title=f"held-out {held_out}", xlabel="seconds in training steps")
    _save(figure, path, legend=len(runs) > 1)


def draw_popularity(profiles: Mapping[str, dict[str, list[float]]], path: Path) -> None:
    """Draw how much of all recommendations goes to the most popular items, one line a method, and
    how much of the training events does.

    Args:
        profiles: label and ``recsys.metrics.popularity_profile``, all of the same training data.
        path: PNG file to write.
    """
    figure, (axes,) = _figure(1)
    for label, profile in profiles.items():
        axes.plot(profile["catalogue"], profile["recommended"], marker="o", label=label)
    profile = next(iter(profiles.values()))
    axes.plot(profile["catalogue"], profile["trained"], "k--", label="training events")
    axes.set(
        title="popularity of recommended items",
        xlabel="share of the catalogue, most popular items first",
        ylabel="share of list entries",
        xscale="log",
        ylim=(0, 1.02),
    )
    _save(figure, path, legend=True)


def _figure(panels: int) -> tuple[Any, Any]:
    # Imported here: plots are an optional part of the installation.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _save(figure: Any, path: Path, *, legend: bool) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if legend:
            axes.legend()
    figure.savefig(path, dpi=120)
