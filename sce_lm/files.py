"""Files that are complete or not there: written under a temporary name and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``, which becomes ``path`` when the block ends well, and goes
    away when it does not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} cannot be read as JSON ({reason}); it was damaged or is another file; put the "
            "one back that was written."
        ) from None


def write_json(path: Path, value: Any, *, allow_nan: bool = True) -> None:
    """Write a JSON file, on the disk when this returns.

    Raises:
        ValueError: NaN or infinity without ``allow_nan``.
    """
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=allow_nan)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
