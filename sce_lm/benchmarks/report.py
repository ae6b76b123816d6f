"""How results are shown: text on the terminal, tables there and in Markdown, plots.

A result is a list of rows, mappings of JSON values; a column or a plot's axis names a value of them
by a dotted path. What no row has is not shown, and a cell without a value is blank.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sce_lm.png import png

Row = Mapping[str, Any]
"""One method, or one method at one size; "notes" are sentences that stand under the table."""


def progress(message: str) -> None:
    """Text on standard error."""
    print(message, file=sys.stderr, flush=True)


def print_line(text: str) -> None:
    """Text on standard output."""
    print(text, flush=True)


@dataclass(frozen=True)
class Column:
    """A value of the rows."""

    heading: str
    key: str
    """Dotted path; of one that ends in "seconds" nothing is shown where a machine was shared."""
    form: str = ""
    """As ``format`` takes it. Of a list, one value a seed, and of a mapping with "mean" and "sd",
    where the values are not known, both are shown; of a list with None how many are there."""
    meaning: str = ""
    """For the legend."""
    factor: float = 1.0
    """The value is shown times this."""

    def value(self, row: Row) -> Any:
        """Of the row; None: it has none."""
        found: Any = row
        for name in self.key.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        if isinstance(found, float):
            return None if math.isnan(found) else found * self.factor
        return found

    def number(self, row: Row) -> float | None:
        """The value, or the mean of the list."""
        value = self.value(row)
        if isinstance(value, Mapping):
            return value["mean"]
        if not isinstance(value, Sequence):
            return value
        known = [item for item in value if item is not None]
        return statistics.mean(known) if known else None

    def cell(self, row: Row) -> str:
        """The value as text."""
        value, mean = self.value(row), self.number(row) if self.form else None
        if isinstance(value, Mapping):
            return f"{mean:{self.form}} ± {value['sd']:{self.form}}"
        if not isinstance(value, list):
            return "" if value is None else format(value, self.form)
        if mean is None:
            return "never" if value else ""
        known = [item for item in value if item is not None]
        if len(known) < len(value):
            return f"{mean:{self.form}} ({len(known)} of {len(value)})"
        spread = f" ± {statistics.stdev(value):{self.form}}" if len(value) > 1 else ""
        return f"{mean:{self.form}}{spread}"


METHOD = Column("method", "label")


@dataclass(frozen=True)
class Table:
    """Columns under a title; the first one names the row."""

    title: str
    columns: tuple[Column, ...]

    def filled(self, rows: Sequence[Row]) -> tuple[list[Column], list[list[str]]]:
        """Columns and cells, without columns and rows that are blank; no cells: nothing at all."""
        lines = [[column.cell(row) for column in self.columns] for row in rows]
        kept = [line for line in lines if any(line[1:])]
        used = [i for i in range(len(self.columns)) if any(line[i] for line in kept)]
        return [self.columns[i] for i in used], [[line[i] for i in used] for line in kept]

    def print(self, rows: Sequence[Row]) -> None:
        """On standard output, with the legend under it."""
        columns, cells = self.filled(rows)
        if cells:
            print_table(self.title, [column.heading for column in columns], cells)
            print_line(legend(columns))

    def markdown(self, rows: Sequence[Row]) -> str:
        """For a page, with the legend under it; empty: nothing was measured."""
        columns, cells = self.filled(rows)
        if not cells:
            return ""
        rule = ["---"] + ["---:"] * (len(columns) - 1)
        lines = [[column.heading for column in columns], rule, *cells]
        table = "\n".join(f"| {' | '.join(c.replace('|', '&#124;') for c in r)} |" for r in lines)
        return f"{self.title}:\n\n{table}\n" + f"\n{legend(columns, '*')}\n" * bool(legend(columns))


def legend(columns: Sequence[Column], mark: str = "") -> str:
    """What the headings mean, in one line."""
    meanings = {c.meaning: c.heading for c in reversed(columns) if c.meaning}
    shown = [f"{mark}{heading}{mark}: {text}" for text, heading in meanings.items()]
    return "; ".join(reversed(shown))


def print_table(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are numbers."""
    lines = [headings, *cells]
    first, *others = (max(map(len, column)) for column in zip(*lines))

    def shown(line: Sequence[str]) -> str:
        padded = (cell.rjust(width) for cell, width in zip(line[1:], others))
        return "  ".join([line[0].ljust(first), *padded])

    rule = "-" * len(shown(headings))
    print_line("\n".join(["", title, shown(headings), rule, *map(shown, cells)]))


@dataclass(frozen=True)
class Plot:
    """A log-log plot of the rows."""

    title: str
    x: Column
    y: Column
    joined: bool = False
    """Whether the rows of one label are a line; else they are points."""
    keep: Callable[[Row], bool] = lambda row: True
    """Which rows are in it."""

    def lines(self, rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
        """Points by label, without those that a logarithm cannot show."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in filter(self.keep, rows):
            x, y = self.x.number(row), self.y.number(row)
            if x is not None and y is not None and min(x, y) > 0:
                found.setdefault(row["label"], []).append((x, y))
        return found

    def draw(
        self, axes: Any, title: str, lines: Mapping[str, Sequence[tuple[float, float]]]
    ) -> None:
        """Into matplotlib's axes."""
        for label, points in lines.items():
            xs, ys = zip(*sorted(points))
            axes.plot(xs, ys, linestyle="solid" if self.joined else "none", marker="o", label=label)
        axes.set(title=f"{self.title}: {title}", xlabel=self.x.heading, ylabel=self.y.heading)
        axes.set(xscale="log", yscale="log")
        axes.tick_params(which="minor", labelsize=6)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)


class Panel(Protocol):
    """What :func:`draw` draws: :class:`Plot`, for instance."""

    def lines(self, rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
        """Points by label; none: there is nothing to draw."""
        ...

    def draw(
        self, axes: Any, title: str, lines: Mapping[str, Sequence[tuple[float, float]]]
    ) -> None:
        """Into matplotlib's axes."""


def draw(
    path: Path, plots: Sequence[Panel], comparisons: Sequence[tuple[str, Sequence[Row]]]
) -> None:
    """Every plot of every comparison that has points in it, two in a line, as one PNG; no file
    where there is none.

    Raises ImportError where matplotlib is not installed.
    """
    panels = [
        (plot, title, lines)
        for title, rows in comparisons
        for plot in plots
        for lines in (plot.lines(rows),)
        if sum(map(len, lines.values())) > 1
    ]
    if not panels:
        return
    height = -(-len(panels) // 2)
    with png(path, 13, 4.5 * height) as figure:
        places = list(figure.subplots(height, 2, squeeze=False).flat)
        for axes, (plot, title, lines) in zip(places, panels):
            plot.draw(axes, title, lines)
        for axes in places[len(panels) :]:
            axes.remove()
