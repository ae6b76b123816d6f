"""Bucketed, sampled and exact softmax heads for language models and recommenders."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sce_lm import objectives
    from sce_lm.candidates.state import SCEState
    from sce_lm.config import SCEConfig
    from sce_lm.hf import SCECallback, apply_sce, remove_sce
    from sce_lm.objectives.sce_loss import sce_loss
    from sce_lm.ops.logits import LogitTransform

__all__ = [
    "LogitTransform",
    "SCECallback",
    "SCEConfig",
    "SCEState",
    "apply_sce",
    "objectives",
    "remove_sce",
    "sce_loss",
]

_HOMES = {
    "LogitTransform": "sce_lm.ops.logits",
    "SCECallback": "sce_lm.hf",
    "SCEConfig": "sce_lm.config",
    "SCEState": "sce_lm.candidates.state",
    "apply_sce": "sce_lm.hf",
    "remove_sce": "sce_lm.hf",
    "sce_loss": "sce_lm.objectives.sce_loss",
}


def __getattr__(name: str) -> Any:
    """A name is imported when it is first used: losses need no transformers, `sce-lm --help` no
    torch."""
    if name == "objectives":
        return importlib.import_module("sce_lm.objectives")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
