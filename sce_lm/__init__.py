"""Bucketed, sampled and exact softmax heads for language models and recommenders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sce_lm import objectives
from sce_lm.candidates.state import SCEState
from sce_lm.config import SCEConfig
from sce_lm.objectives.sce_loss import sce_loss
from sce_lm.ops.logits import LogitTransform

if TYPE_CHECKING:
    from sce_lm.hf import SCECallback, apply_sce, remove_sce

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


def __getattr__(name: str) -> Any:
    """The names that need transformers are imported when they are first used."""
    if name in ("SCECallback", "apply_sce", "remove_sce"):
        from sce_lm import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
