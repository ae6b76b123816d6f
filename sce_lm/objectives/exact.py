"""Exact cross-entropy as an objective: the baseline, and what evaluation always uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sce_lm.config import ObjectiveConfig
from sce_lm.objectives.base import HeadInputs, Objective, Statistics
from sce_lm.ops.exact_cross_entropy import exact_cross_entropy


@dataclass(frozen=True)
class ExactConfig(ObjectiveConfig):
    """Configuration of exact cross-entropy. Raises ValueError for a value out of range."""


class Exact(Objective):
    """``log sum_j exp(s_tj) - s_{t,y_t}`` over the whole vocabulary, streamed."""

    name = "exact"
    config_class = ExactConfig

    def compute(self, inputs: HeadInputs) -> tuple[torch.Tensor, Statistics]:
        result = exact_cross_entropy(*inputs.head, **inputs.options)
        return result.loss, Statistics(
            num_valid=inputs.labels.numel(),
            products_per_position=float(inputs.weight.shape[0]),
            correct=result.correct,
            confidence=result.confidence,
        )
