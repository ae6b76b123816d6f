"""Exact cross-entropy as an objective: the baseline, and what evaluation always uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sce_lm.config import LikelihoodConfig
from sce_lm.objectives.base import Objective, Statistics
from sce_lm.objectives.call import Call
from sce_lm.ops.dispatch import Backend
from sce_lm.ops.exact_cross_entropy import ExactLoss, exact_cross_entropy
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.row_reductions import row_reductions


@dataclass(frozen=True)
class ExactConfig(LikelihoodConfig):
    """Configuration of exact cross-entropy. Raises ValueError for a value out of range."""


class Exact(Objective):
    """``log sum_j exp(s_tj) - s_{t,y_t}`` over the whole vocabulary, streamed."""

    name = "exact"
    config_class = ExactConfig

    def has_static_shapes(self, head: Head) -> bool:
        return True

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        find = _with_terms if positions.terms else exact_cross_entropy
        result = find(head, positions, backend=call.backend)
        return result.loss, Statistics(
            num_valid=len(positions),
            products_per_position=float(head.vocab_size),
            correct=result.correct,
            confidence=result.confidence,
        )

    def mean_logits(self, head: Head, positions: Positions) -> torch.Tensor:
        """Behind a soft cap in a stream of its own."""
        if head.post.soft_cap is None:
            return super().mean_logits(head, positions)
        found = row_reductions(
            head, positions.hidden, logit_sum=True, backend=self.config.backend
        ).logit_sum
        assert found is not None
        return found / head.vocab_size


def _with_terms(head: Head, positions: Positions, *, backend: Backend) -> ExactLoss:
    """:func:`~sce_lm.ops.exact_cross_entropy.exact_cross_entropy` with the terms of the loss."""
    labels = positions.labels
    found = row_reductions(head, positions.hidden, ids=labels, top_k=1, backend=backend)
    log_z, label, top = found.log_partition, found.logits_at, found.top
    assert label is not None
    assert top is not None
    return ExactLoss(
        positions.reduce(positions.terms.losses(log_z, label)),
        top.indices[:, 0] == labels,
        (top.values[:, 0] - log_z).exp().detach(),
    )
