"""Files and folders that are complete or not there: written under a temporary name and renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
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


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it when the block ends without an error.

    Where another process has finished the same folder meanwhile, that one stays.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def data_files(folder: Path) -> list[Path]:
    """The files right in a folder that may hold data, in the order of their names, in which numbers
    count as numbers (``part-9`` comes before ``part-10``).

    Passed over are empty files, hidden ones, those whose names begin with an underscore (markers
    such as ``_SUCCESS``), and a README or LICENSE.
    """
    files = [
        file
        for file in folder.iterdir()
        if file.is_file()
        and not file.name.startswith((".", "_"))
        and file.stem not in ("README", "LICENSE")
        and file.stat().st_size
    ]
    # Text and numbers take turns in the key, text first, so that two keys always compare.
    return sorted(
        files,
        key=lambda file: [
            int(piece) if place % 2 else piece
            for place, piece in enumerate(re.split("([0-9]+)", file.name))
        ],
    )


def in_one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, for a sentence of ours: one line of so many characters at most, without
    the full stop."""
    return " ".join(str(error).split())[:most].rstrip(".")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read as JSON ({in_one_line(error, 200)}); it was damaged or is "
            "another file; put the one back that was written."
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
