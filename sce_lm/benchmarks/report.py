"""How results are shown and kept: machine, tables, plots, JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sce_lm import files
from sce_lm.png_plots import png


def progress(message: str) -> None:
    """Text on standard error."""
    print(message, file=sys.stderr, flush=True)


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_heading(described: Mapping[str, Any], what: object) -> None:
    """The machine in one line, and what was measured in another."""
    gpu = f"{described['gpu']}, " if described["gpu"] else ""
    print_line(
        f"{gpu}{described['cpu']}, {described['cores']} cores, {described['threads']} threads; "
        f"torch {described['torch']}, Python {described['python']}\n{what}"
    )


def print_line(text: str) -> None:
    """Text on standard output."""
    print(text, flush=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is text and whose others are figures."""
    lines = [columns, *rows]
    first, *others = (max(map(len, cells)) for cells in zip(*lines))

    def shown(line: Sequence[str]) -> str:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], others))
        return "  ".join([line[0].ljust(first), *cells])

    rule = "-" * len(shown(columns))
    print_line("\n".join(["", title, shown(columns), rule, *map(shown, rows)]))


def figures(values: Mapping[str, float | None], forms: Mapping[str, str]) -> list[str]:
    """Cells of the values that ``forms`` names; empty where there is none."""
    found = [(values.get(name), form) for name, form in forms.items()]
    return ["" if value is None or math.isnan(value) else format(value, f) for value, f in found]


def write_json(path: Path | None, value: Any) -> None:
    """Write a JSON file; infinities become null. None: write nothing."""
    if path is not None:
        files.write_json(path, _finite(value), allow_nan=False)


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Panel:
    """A log-log plot."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float, str]]]
    """By label, points and the text beside them; points without text are joined by a line."""


def draw(path: Path | None, panels: Sequence[Panel]) -> None:
    """Write the panels, two a row, as one PNG. None: draw nothing.

    Raises ImportError where matplotlib is not installed.
    """
    if path is None:
        return
    rows = -(-len(panels) // 2)
    with png(path, 13, 4.5 * rows) as figure:
        for panel, axes in zip(panels, figure.subplots(rows, 2, squeeze=False).flat):
            for label, series in panel.series.items():
                points = [point for point in series if min(point[:2]) > 0]
                style = "none" if any(text for *_, text in points) else "solid"
                xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
                axes.plot(xs, ys, linestyle=style, marker="o", label=label)
                for x, y, text in points:
                    axes.annotate(text, (x, y), (3, 3), textcoords="offset points", fontsize=6)
            axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y, xscale="log", yscale="log")
            axes.grid(alpha=0.3, which="both")
            axes.legend()
