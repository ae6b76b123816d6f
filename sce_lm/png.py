"""PNG plots by matplotlib, an optional part of the installation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sce_lm.files import replacing
from sce_lm.requirements import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure


@contextmanager
def png(path: Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many inches, written to ``path`` when the block ends well.

    Raises ImportError where matplotlib is not installed.
    """
    require("a plot", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
