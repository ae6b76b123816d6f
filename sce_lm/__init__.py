"""Bucketed, sampled and exact softmax heads for language models and recommenders."""

from sce_lm import objectives
from sce_lm.candidates.state import SCEState
from sce_lm.config import SCEConfig
from sce_lm.objectives.functional import sce_loss
from sce_lm.ops.logits import LogitTransform

__all__ = ["LogitTransform", "SCEConfig", "SCEState", "objectives", "sce_loss"]
