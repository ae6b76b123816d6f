"""Training losses by name: ``objectives.get("sce", tail_candidates=2048)``."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from sce_lm.config import SCEConfig
from sce_lm.objectives.base import Objective, Statistics
from sce_lm.objectives.exact import Exact
from sce_lm.objectives.sce import SCE

__all__ = ["SCE", "Exact", "Objective", "Statistics", "from_config", "get", "names"]

_CONFIGURATIONS = {"exact": (Exact, None), "sce": (SCE, SCEConfig)}


def names() -> list[str]:
    """Names that :func:`get` knows."""
    return list(_CONFIGURATIONS)


def get(name: str, *, published: bool = False, **options: Any) -> Objective:
    """A new objective with a state of its own.

    Args:
        name: "exact" or "sce".
        published: start from the published form's defaults instead of the corrected one's.
        options: fields of the objective's configuration (:class:`sce_lm.SCEConfig` for "sce").

    Raises:
        ValueError: an unknown name, an unknown option, or options that do not go together.
    """
    if name not in _CONFIGURATIONS:
        raise ValueError(f"unknown objective {name!r}; choose one of {', '.join(names())}.")
    objective_class, config_class = _CONFIGURATIONS[name]
    known = [f.name for f in dataclasses.fields(config_class)] if config_class else []
    if published and not hasattr(config_class, "published"):
        raise ValueError(f"objective {name!r} has no other published form; leave published out.")
    if published:
        known.append("mix")
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {known or 'no options'}."
            raise ValueError(f"objective {name!r} has no option {option!r}; {hint}")
    if config_class is None:
        return objective_class()
    return objective_class((config_class.published if published else config_class)(**options))


def from_config(config: SCEConfig | Objective) -> Objective:
    """The objective of a configuration; an objective is returned as it is.

    Raises:
        TypeError: anything else.
    """
    if isinstance(config, Objective):
        return config
    if isinstance(config, SCEConfig):
        return SCE(config)
    raise TypeError(
        f"got {type(config).__name__}; pass an SCEConfig or an objective from objectives.get(...)."
    )
