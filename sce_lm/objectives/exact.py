"""Exact cross-entropy as an objective: the baseline, and what evaluation always uses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sce_lm.config import LikelihoodConfig
from sce_lm.objectives.base import Objective, Statistics
from sce_lm.objectives.call import Call
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.exact_cross_entropy import exact_cross_entropy
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions


@dataclass(frozen=True)
class ExactConfig(LikelihoodConfig):
    """Configuration of exact cross-entropy. Raises ValueError for a value out of range."""


class Exact(Objective):
    """``log sum_j exp(s_tj) - s_{t,y_t}`` over the whole vocabulary, streamed."""

    name = "exact"
    config_class = ExactConfig

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        terms = positions.terms
        plain = replace(positions, weight=None) if terms else positions
        result = exact_cross_entropy(head, plain, backend=call.backend)
        loss = result.loss
        if terms:
            label = _label_logits(head, positions)
            loss = positions.reduce(terms.losses(loss + label, label))
        return loss, Statistics(
            num_valid=len(positions),
            products_per_position=float(head.vocab_size),
            correct=result.correct,
            confidence=result.confidence,
        )


def _label_logits(head: Head, positions: Positions) -> torch.Tensor:
    """``[N]`` s_ty, by autograd."""
    dtype = compute_dtype(positions.hidden, head.weight)
    rows = head.rows(positions.labels, dtype)
    return head.post(torch.linalg.vecdot(head.extend(positions.hidden, dtype), rows))
