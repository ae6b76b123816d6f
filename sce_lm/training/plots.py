"""PNG curves of one or several runs, read from their metrics.jsonl."""

from collections.abc import Mapping
from pathlib import Path

from sce_lm.training.metrics import read_metrics


def draw_curves(runs: Mapping[str, Path], path: Path, held_out: str) -> None:
    """Draw training loss and a held-out figure against the step, one line a run.

    Args:
        runs: label and run folder.
        path: PNG file to write.
        held_out: name of the held-out figure, e.g. "nll" or "ndcg@10".

    Raises ImportError where matplotlib is not installed.
    """
    # Imported here: plots are an optional part of the installation.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, held_out_axes = figure.subplots(1, 2)
    for label, folder in runs.items():
        records = read_metrics(Path(folder) / "metrics.jsonl")
        for axes, name, marker in ((loss_axes, "loss", ""), (held_out_axes, held_out, "o")):
            points = [(r["step"], r[name]) for r in records if name in r]
            axes.plot([s for s, _ in points], [v for _, v in points], marker=marker, label=label)
    loss_axes.set(title="training loss", xlabel="step", ylabel="nats")
    held_out_axes.set(title=f"held-out {held_out}", xlabel="step")
    for axes in (loss_axes, held_out_axes):
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend()
    figure.savefig(path, dpi=120)


def draw_popularity(profiles: Mapping[str, dict[str, list[float]]], path: Path) -> None:
    """Draw how much of all recommendations goes to the most popular items, one line a method, and
    how much of the training events does.

    Args:
        profiles: label and ``recsys.metrics.popularity_profile``, all of the same training data.
        path: PNG file to write.

    Raises ImportError where matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
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
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
