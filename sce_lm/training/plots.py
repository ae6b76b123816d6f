"""PNG plots of one or several runs, from the records of their metrics.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sce_lm.objectives.probe import Probe
from sce_lm.png import png
from sce_lm.training.run_folder import RunFolder

if TYPE_CHECKING:
    from sce_lm.png import Axes

LINES = 10
"""Colours of matplotlib's default cycle; further labels get another line style."""


def draw_curves(
    runs: Mapping[str, Sequence[Sequence[dict[str, Any]]]], path: Path, metric: str
) -> None:
    """Draw training loss and a validation metric against the step, the latter against the seconds
    of training and the operations of the loss; of language models also accuracy against NLL, where
    up and left is better. One line a run, one colour a label.

    Args:
        runs: label and records of runs, as from ``metrics.with_costs``, for instance one a seed.
        path: PNG file to write.
        metric: of validation, e.g. "nll" or "ndcg@10".

    Raises ImportError where matplotlib is not installed.
    """
    validation = f"validation/{metric}"
    panels = [
        ("loss", "step", ""),
        (validation, "step", "o"),
        (validation, "seconds", "o"),
        (validation, "inner products in the loss", "o"),
    ]
    if metric == "nll":
        panels.append(("validation/accuracy", validation, "o"))
    with png(path, 5 * len(panels), 4) as figure:
        for axes, (name, x, marker) in zip(figure.subplots(1, len(panels)), panels):
            for number, (label, found) in enumerate(runs.items()):
                dashes = ("-", "--", ":", "-.")[number // LINES % 4]
                style = f"C{number % LINES}{marker}{dashes}"
                for index, records in enumerate(found):
                    points = [(r[x], r[name]) for r in records if name in r]
                    of_first = {} if index else {"label": label}
                    axes.plot(*np.reshape(points, (-1, 2)).T, style, markersize=3, **of_first)
            is_loss = name == "loss"
            title = "training loss" if is_loss else name.replace("/", " ")
            axes.set(title=title, xlabel=x.replace("/", " "), ylabel="nats" if is_loss else "")
            axes.grid(alpha=0.3)
            if name == validation:
                curves = [line.get_ydata() for line in axes.lines if len(line.get_ydata())]
                axes.set_ylim(*limits(curves, higher_is_better=metric != "nll"))
        if len(runs) > 1:
            figure.legend(
                *figure.axes[0].get_legend_handles_labels(),
                loc="outside lower center",
                ncols=min(len(runs), 6),
                fontsize=8,
            )


def limits(
    curves: Sequence[Sequence[float]], *, higher_is_better: bool, lines: Sequence[float] = ()
) -> tuple[float, float]:
    """Of an axis with these curves and, across, these lines: what is never as good as the best
    curve was at its first point does not stretch it."""
    sign = 1 if higher_is_better else -1
    start = max(curves, key=lambda curve: sign * curve[-1])[0]
    values = [y for curve in (*curves, lines) for y in curve if sign * (y - start) >= 0]
    margin = 0.08 * (max(values) - min(values)) or 1e-3
    return min(values) - margin, max(values) + margin


def draw_report(
    folder: RunFolder, records: Sequence[dict[str, Any]], metric: str, probe: Probe
) -> None:
    """Draw ``report.png`` of a run: its curves, how far the objective was from exact cross-entropy,
    which classes it looked at and where the time went. What the run has not measured is left out.

    Args:
        records: of its metrics.jsonl.
        metric: of validation, e.g. "nll" or "ndcg@10".
        probe: of validation positions, at the end.

    Raises ImportError where matplotlib is not installed.
    """
    own = "objective/"
    curves: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("training loss", {"loss": "loss"}, {}),
        (f"validation {metric}", {metric: f"validation/{metric}"}, {}),
        ("gradient norm", {"grad_norm": "before clipping"}, {}),
        (
            "relative error of the softmax's denominator",
            {
                f"{own}relative_error": "root mean square",
                f"{own}relative_error_p95": "95 % of positions are below",
            },
            {},
        ),
        ("loss - exact loss while training, nats", {f"{own}probe_bias": "mean of a batch"}, {}),
        (
            "cosine of the gradient to the exact one",
            {f"{own}probe_cos_hidden": "of the hidden states"},
            {},
        ),
        (
            "seconds a step",
            {"seconds_per_step": "whole step", "loss_seconds_per_step": "in the loss"},
            {"bottom": 0},
        ),
    ]
    panels: list[Callable[[Axes], None]] = []
    for title, names, limits in curves:
        lines = {label: _points(records, name) for name, label in names.items()}
        if any(lines.values()):
            panels.append(partial(_draw_lines, title=title, lines=lines, limits=limits))
    if len(probe.errors):
        panels.append(partial(_draw_errors, errors=probe.errors.tolist()))
    if probe.by_frequency:
        panels.append(partial(_draw_frequencies, frequencies=probe.by_frequency))
    rows = -(-len(panels) // 3)
    with png(folder.report, 15, 4 * rows) as figure:
        figure.suptitle(str(folder))
        for axes, draw in zip_longest(figure.subplots(rows, 3, squeeze=False).flat, panels):
            if draw is None:
                axes.remove()
            else:
                draw(axes)


def _points(records: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(r["step"], r[name]) for r in records if r.get(name) is not None]


def _draw_lines(
    axes: Axes, title: str, lines: Mapping[str, list[tuple[int, float]]], limits: dict[str, Any]
) -> None:
    for label, points in lines.items():
        if points:
            axes.plot(*zip(*points), label=label, marker="o" if len(points) < 50 else "")
    axes.set(title=title, xlabel="step")
    axes.set_ylim(**limits)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        _legend(axes)


def _draw_errors(axes: Axes, errors: Sequence[float]) -> None:
    axes.hist(errors, bins=40)
    axes.axvline(statistics.mean(errors), color="k", linestyle="--", label="mean")
    axes.set(title="loss - exact loss at validation positions", xlabel="nats", ylabel="positions")
    _legend(axes)


def _draw_frequencies(axes: Axes, frequencies: Mapping[str, Sequence[float]]) -> None:
    for name in ("candidates", "labels"):
        axes.plot(frequencies["classes"], frequencies[name], marker="o", label=name)
    axes.set(
        title="classes that one call looks at",
        xlabel="rank of the class, most frequent first",
        ylabel="share of the classes of a frequency band",
        xscale="log",
        ylim=(-0.02, 1.02),
    )
    axes.grid(alpha=0.3)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Above the data and under the title, where no line runs through it."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0, fontsize=8
    )
    axes.set_title(axes.get_title(), pad=20)


def draw_popularity(profiles: Mapping[str, dict[str, list[float]]], path: Path) -> None:
    """Draw how much of all recommendations goes to the most popular items, one line a method, and
    how much of the training events does.

    Args:
        profiles: label and ``recsys.metrics.popularity_profile``, all of the same training data.
        path: PNG file to write.

    Raises ImportError where matplotlib is not installed.
    """
    with png(path, 6, 4) as figure:
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
        _legend(axes)
