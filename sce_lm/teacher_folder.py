"""A teacher stored for the rows of a text: parts of equal length, and what they belong to.

    FOLDER/teacher.json               the text, its rows, k, rest, temperature, classes
    FOLDER/part-00000.safetensors     rows 0 to rows_per_part - 1, [rows, positions, k]
    FOLDER/part-00001.safetensors     ...

A part is a file of :mod:`sce_lm.teacher_files`, so it is complete or not there, and a folder that
was interrupted goes on with the parts that are missing. Rows are mapped into memory when they are
asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sce_lm.distillation import StoredTopK
from sce_lm.files import in_one_line, read_json, write_json
from sce_lm.ops.teachers import Rest

MANIFEST = "teacher.json"
FORMAT = "sce_lm.teacher_folder.1"


@dataclass(frozen=True)
class Stored:
    """What a folder holds, and of which text."""

    teacher: str
    """The model, as it was named."""
    text: str
    """Says which tokens: equal for equal documents, tokenizer and order."""
    rows: int
    positions: int
    """Of a row that have a next token: a row's length less 1."""
    vocab_size: int
    """Classes of the softmax."""
    k: int
    rest: Rest
    temperature: float
    rows_per_part: int

    @property
    def parts(self) -> int:
        return -(-self.rows // self.rows_per_part)

    def rows_of(self, part: int) -> range:
        """The rows that a part holds."""
        first = part * self.rows_per_part
        return range(first, min(first + self.rows_per_part, self.rows))


class TeacherFolder:
    """A folder of parts."""

    def __init__(self, path: str | Path, stored: Stored) -> None:
        self.path, self.stored = Path(path), stored
        self._opened: dict[int, Any] = {}

    @classmethod
    def is_at(cls, path: str | Path) -> bool:
        """Whether a folder says of itself that it is one."""
        return (Path(path) / MANIFEST).is_file()

    @classmethod
    def begin(cls, path: str | Path, stored: Stored) -> TeacherFolder:
        """A new folder, or one that holds a part of the same.

        Raises:
            ValueError: there is something else.
        """
        path = Path(path)
        if cls.is_at(path):
            before = cls.read(path).stored
            changed = [
                f"{field.name} {getattr(before, field.name)!r} -> {getattr(stored, field.name)!r}"
                for field in dataclasses.fields(Stored)
                if getattr(before, field.name) != getattr(stored, field.name)
            ]
            if changed:
                raise ValueError(
                    f"{path} holds another stored teacher ({', '.join(changed)}); name another "
                    "folder, or delete it."
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(
                f"{path} is there already and holds something else than a stored teacher; name a "
                "new folder."
            )
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / MANIFEST, {"format": FORMAT, **dataclasses.asdict(stored)})
        return cls(path, stored)

    @classmethod
    def read(cls, path: str | Path) -> TeacherFolder:
        """What :meth:`begin` made.

        Raises:
            FileNotFoundError: there is no manifest.
            ValueError: it is another file's.
        """
        path = Path(path)
        found = read_json(path / MANIFEST)
        names = {field.name for field in dataclasses.fields(Stored)}
        if (
            not isinstance(found, dict)
            or found.pop("format", None) != FORMAT
            or found.keys() != names
        ):
            raise ValueError(f"{path / MANIFEST} is none of a stored teacher's; write it again.")
        return cls(path, Stored(**found))

    def part(self, number: int) -> Path:
        return self.path / f"part-{number:05d}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there yet."""
        return [n for n in range(self.stored.parts) if not self.part(n).is_file()]

    def rows(self, numbers: Sequence[int]) -> StoredTopK:
        """``[len(numbers), positions, k]`` of these rows, ids int64.

        Raises:
            ValueError: a part is not what belongs there.
        """
        stored, found = self.stored, []
        for number in numbers:
            part, row = divmod(number, stored.rows_per_part)
            if part not in self._opened:
                self._opened[part] = self._open(part)
            found.append([tensor[row : row + 1] for tensor in self._opened[part]])
        ids, log_probs = (torch.cat(tensors) for tensors in zip(*found))
        return StoredTopK(ids.long(), log_probs, stored.rest, stored.temperature)

    def _open(self, part: int) -> tuple[Any, Any]:
        stored, path = self.stored, self.part(part)
        wanted = [len(stored.rows_of(part)), stored.positions, stored.k]
        try:
            file = safe_open(path, "pt")
            ids, log_probs = file.get_slice("ids"), file.get_slice("log_probs")
            shapes = ids.get_shape(), log_probs.get_shape()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read ({in_one_line(error)}); delete it and write the teacher "
                "again, which goes on with the parts that are missing."
            ) from None
        if any(list(shape) != wanted for shape in shapes):
            raise ValueError(
                f"{path} has parts of shape {shapes[0]} and {shapes[1]} where {wanted} belong; "
                "delete it and write the teacher again."
            )
        return ids, log_probs
