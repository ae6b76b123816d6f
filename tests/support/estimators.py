"""Monte-Carlo harness: is the mean of Zhat over fresh draws equal to Z?"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch

from sce_lm import LogitTransform
from sce_lm.objectives.base import HeadInputs
from sce_lm.objectives.sce import SCE
from sce_lm.ops.candidate_cross_entropy import candidate_cross_entropy


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
    x = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    log_z = torch.logsumexp(post(x), dim=1)
    inputs = HeadInputs(hidden, weight, labels, bias, post, None, None, False)
    # A past in which some classes were seen five times as often as others.
    state = objective.state
    state.counts, state.step = 20 + torch.arange(len(weight)) * 37 % 81, 1
    sizes = objective.config.resolve(len(labels), len(weight), num_labels=int(state.counts.sum()))
    choose = partial(objective._choose, counted=False, trains_head=False)
    ratios = []
    with torch.no_grad():
        for seed in range(draws):
            counts = state.begin_call(labels, len(weight), seed)[0]
            candidates = replace(choose(inputs, sizes, counts, seed)[0])
            result = candidate_cross_entropy(
                hidden, weight, labels, candidates, bias=bias, post=post
            )
            ratios.append(result.log_partition - log_z)
    return ratio_bias(ratios)


def ratio_bias(log_ratios: Iterable[torch.Tensor]) -> Bias:
    """Mean and standard error of ``exp(log_ratio) - 1`` over draws."""
    ratio = torch.stack(list(log_ratios)).expm1()
    return Bias(ratio.mean(dim=0), ratio.std(dim=0) / len(ratio) ** 0.5)
