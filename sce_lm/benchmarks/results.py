"""A measurement as a file: what ran where, at which commit, and the rows that came out.

    {"subcommand", "command", "commit", "date", "machine": {...}, "versions": {...},
     "comparisons": [{"title", ..., "rows": [{"label", "resolved", ...}, ...]}, ...]}

A row of a method has its ``specification``, and ``resolved``, every option with a number for each
"auto". It is stale where the same specification is resolved to something else today.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sce_lm import files
from sce_lm.benchmarks.methods import Method

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "triton", "numpy")


@dataclass
class Comparison:
    """Methods side by side on one problem: what one table shows."""

    title: str
    sizes: dict[str, Any]
    """For instance positions, vocab_size, width and dtype."""
    rows: list[dict[str, Any]]


@dataclass
class Results:
    """The file."""

    subcommand: str
    """Of sce-lm benchmark: whose tables show it."""
    comparisons: list[Comparison]
    command: str = ""
    """As it was typed."""
    commit: str | None = None
    """None: not known; "+" behind it: with changes."""
    date: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        """Machine and versions in a line."""
        gpu, cpu = self.machine.get("gpu"), self.machine.get("cpu")
        threads = f"{self.machine.get('cores')} cores, {self.machine.get('threads')} threads"
        shared = ", shared with other work" * bool(self.machine.get("shared"))
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{f'{gpu}, ' if gpu else ''}{cpu}, {threads}{shared}; {versions}"

    def drop_seconds(self) -> None:
        """Leave out of the rows what means nothing on a machine that others use."""
        for comparison in self.comparisons:
            comparison.rows = _without_seconds(comparison.rows)

    def save(self, path: Path) -> None:
        """Write the file."""
        write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The file's value."""
        comparisons = [{"title": p.title, **p.sizes, "rows": p.rows} for p in self.comparisons]
        return {**vars(self), "comparisons": comparisons}

    @classmethod
    def load(cls, path: Path) -> Results:
        """What :meth:`save` wrote."""
        found = files.read_json(path)
        comparisons = [
            Comparison(comparison.pop("title"), rows=comparison.pop("rows"), sizes=comparison)
            for comparison in found.pop("comparisons")
        ]
        return cls(comparisons=comparisons, **found)


def provenance(device: str, *, shared: bool = False) -> dict[str, Any]:
    """Command, commit, date, machine and versions of this process.

    Args:
        shared: others use the machine, so that seconds mean nothing.
    """
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    is_installed = Path(sys.argv[0]).stem in ("sce-lm", "__main__")
    program = ["sce-lm"] if is_installed else ["python", os.path.relpath(sys.argv[0], ROOT)]
    return {
        "command": shlex.join([*program, *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(device) | {"shared": shared},
        "versions": {"python": platform.python_version(), **found},
    }


def machine(device: str) -> dict[str, Any]:
    """What was measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "sce_lm")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def _without_seconds(value: Any) -> Any:
    """The same value without anything whose name ends in "seconds"."""
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if not k.endswith("seconds")}
        return {name: _without_seconds(item) for name, item in kept.items()}
    return [_without_seconds(item) for item in value] if isinstance(value, list) else value


def changed_options(row: Mapping[str, Any], sizes: Mapping[str, Any]) -> list[str]:
    """What of a row's resolved options is something else today, as "name was x, is y".

    Args:
        row: of a method; others have nothing that could change.
        sizes: of its comparison, where the row has no positions and vocab_size of its own.
    """
    if "resolved" not in row:
        return []
    at = {**sizes, **row}
    try:
        today = Method("", "", row["specification"]).resolved(
            at["positions"], at["vocab_size"], at["width"]
        )
    except ValueError as error:
        return [str(error)]
    was = row["resolved"]
    # An option that the file does not know is new, and one that is gone had its default, or today's
    # objective would have refused it.
    return [
        f"{name} was {was[name]}, is {now}"
        for name, now in today.items()
        if name in was and was[name] != now
    ]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; infinities become null."""
    files.write_json(path, _finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
