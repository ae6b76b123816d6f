"""Monte-Carlo harness: is the mean of Zhat over fresh draws equal to Z?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from sce_lm import LogitTransform
from sce_lm.objectives.call import Call
from sce_lm.objectives.reference import raw_logits
from sce_lm.objectives.sce import SCE
from sce_lm.ops.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions


class Bias(NamedTuple):
    """Relative bias of Zhat, one number a position."""

    mean: torch.Tensor
    standard_error: torch.Tensor

    @property
    def is_zero(self) -> bool:
        """No position is more than 5 standard errors away."""
        return bool((self.mean.abs() <= 5 * self.standard_error + 1e-9).all())


def measure(objective: SCE, problem, post: LogitTransform, draws: int, replace=lambda c: c) -> Bias:
    """Zhat / Z - 1 over ``draws`` independent choices of candidates.

    ``replace`` may plant an error into the candidates of each draw.
    """
    hidden, weight, labels, bias = (t if t is None else t.detach() for t in problem)
    head, positions = Head(weight, None, bias, post), Positions(hidden, labels)
    log_z = torch.logsumexp(post(raw_logits(head, hidden)), dim=1)
    # A past in which some classes were seen five times as often as others.
    state = objective.state
    state.counts, state.step = 20 + torch.arange(len(weight)) * 37 % 81, 1
    ratios = []
    with torch.no_grad():
        for seed in range(draws):
            generator = torch.Generator().manual_seed(seed)
            call = Call().begin(state, labels, len(weight), generator)
            candidates = replace(objective.choose(head, positions, call).candidates)
            result = candidate_cross_entropy(head, positions, candidates)
            ratios.append(result.log_partition - log_z)
    return ratio_bias(ratios)


def ratio_bias(log_ratios: Iterable[torch.Tensor]) -> Bias:
    """Mean and standard error of ``exp(log_ratio) - 1`` over draws."""
    ratio = torch.stack(list(log_ratios)).expm1()
    return Bias(ratio.mean(dim=0), ratio.std(dim=0) / len(ratio) ** 0.5)
