"""A claim of a paper beside what was measured, as rows of a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sce_lm.benchmarks import results
from sce_lm.benchmarks.report import Column, Table

CLAIMS = Table(
    "Claims",
    (Column("claim", "label"), Column("measured", "measured"), Column("held", "held")),
)

Rows = Mapping[str, Mapping[str, Any]]
"""Rows of a comparison by their labels."""


def by_label(comparison: results.Comparison) -> dict[str, dict[str, Any]]:
    """The rows that were tested."""
    return {row["label"]: row for row in comparison.rows if "test" in row}


def better(claim: str, rows: Rows, metric: str, first: str, second: str) -> dict[str, Any]:
    """The claim that ``first`` is better than ``second``, by the differences of runs with the same
    seed: held where their mean is above two standard errors, not where it is below minus two, and
    with one seed undecided."""
    pairs = zip(rows[first]["test"][metric], rows[second]["test"][metric])
    return judged(f"{claim}: {first} over {second}, {metric}", [a - b for a, b in pairs])


def judged(claim: str, differences: Sequence[float]) -> dict[str, Any]:
    """A claim that differences, one a seed, are above 0."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return {"label": claim, "measured": f"{mean:+.4f}, one seed", "held": "one seed"}
    error = statistics.stdev(differences) / len(differences) ** 0.5
    held = "yes" if mean > 2 * error else "no, the opposite" if mean < -2 * error else "no"
    measured = f"{mean:+.4f}, standard error {error:.4f}, {len(differences)} seeds"
    return {"label": claim, "measured": measured, "held": held}


def agrees(claim: str, values: Sequence[float], published: float) -> dict[str, Any]:
    """The claim that one published run is one of ours: within two standard deviations of runs."""
    mean = statistics.mean(values)
    measured = f"{mean:.4f}, published {published:.4f}"
    if len(values) < 2:
        return {"label": claim, "measured": measured, "held": "one seed"}
    spread = statistics.stdev(values)
    held = "yes" if abs(mean - published) <= 2 * spread else "no"
    return {"label": claim, "measured": f"{measured}, sd {spread:.4f}", "held": held}
