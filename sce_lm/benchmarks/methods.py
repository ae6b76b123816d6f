"""The losses that are compared, by name: ours, and what a user would pick instead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TAIL_ONLY = {"name": "sce", "num_buckets": 0, "shared_labels": False, "shared_frequent": 0}
"""Corrected SCE without strata; ``tail_candidates`` is its size."""

DEFAULT_STRATA = {"name": "sce"}
"""Corrected SCE as it comes."""


@dataclass(frozen=True)
class Method:
    """One row of a table."""

    name: str
    """What ``--methods`` takes."""
    label: str
    """What the table shows."""
    specification: dict[str, Any]
    """Arguments of ``objectives.get``, or ``{"name": peer}`` for one of ``peers.PEERS``."""


def choose(methods: Iterable[Method], names: str | None) -> list[Method]:
    """The methods that a comma-separated list names, in its order; all without one."""
    known = {method.name: method for method in methods}
    if names is None:
        return list(known.values())
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"--methods has {name!r}; choose from {', '.join(known)}.")
    return [known[name] for name in names.split(",")]
