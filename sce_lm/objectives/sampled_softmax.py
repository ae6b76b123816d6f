"""Sampled softmax (Bengio & Senécal 2003, 2008; Jean et al. 2015).

    Zhat_t = exp s_ty + sum_{j drawn, j != y} exp(s_tj + c_j),       loss_t = log Zhat_t - s_ty

with ``c_j = -log(expected count of j)`` under the proposal q, which makes Zhat unbiased: the label
is there with certainty and needs no correction, and a draw that hits it is left out. The usual
function of TensorFlow differs in that it also takes ``log(expected count)`` off the label's logit,
whose Zhat is not unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sce_lm.candidates.prior import log_label_prior
from sce_lm.candidates.priority import priority_sample
from sce_lm.candidates.proposals import (
    Categorical,
    LogUniform,
    Proposal,
    Uniform,
    draw_distinct,
    draw_rows,
    draw_with_replacement,
)
from sce_lm.config import LikelihoodConfig, check_choice, check_count, check_share
from sce_lm.objectives.base import Statistics
from sce_lm.objectives.call import Call
from sce_lm.objectives.sampled_objective import SampledObjective
from sce_lm.ops.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.dispatch import Backend
from sce_lm.ops.head import Head
from sce_lm.ops.position_cross_entropy import PositionCandidates, position_cross_entropy
from sce_lm.ops.positions import Positions


@dataclass(frozen=True)
class SampledSoftmaxConfig(LikelihoodConfig):
    """Configuration of sampled softmax. Raises ValueError for a value out of range."""

    num_negatives: int = 1024
    """Draws of a call, or of a position if they are not shared. With sampling "priority" that many
    distinct classes; from V up that is the whole catalogue, and the loss is exact."""

    proposal: Literal["unigram", "log_uniform", "uniform"] = "unigram"
    """"unigram": the label counts seen so far, to a power; counts known beforehand can be put into
    ``objective.state.counts``. "log_uniform": Zipf's law, for ids in order of falling frequency,
    as word vocabularies often are. "uniform": every class alike."""

    power: float = 0.75
    """Power on the counts, in [0, 1]; proposal "unigram" only."""

    uniform_floor: float = 0.1
    """Share of the proposal that is spread evenly, in (0, 1], so that classes never seen can be
    drawn and no weight exceeds V / (floor · num_negatives); proposal "unigram" only."""

    sampling: Literal["replacement", "distinct", "priority"] = "replacement"
    """"replacement": independent draws. "distinct": what is distinct among that many draws.
    "priority": a priority sample, which has the smallest variance."""

    shared: bool = True
    """One sample for all positions of a call, or one for each. A priority sample is shared."""

    sparse_grad: bool = False
    """Return a row-sparse gradient of the weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "num_negatives")
        check_choice(self, "proposal", "unigram", "log_uniform", "uniform")
        check_choice(self, "sampling", "replacement", "distinct", "priority")
        check_share(self, "power")
        check_share(self, "uniform_floor", zero=False)
        check_choice(self, "shared", True, False)
        check_choice(self, "sparse_grad", True, False)
        if self.sampling == "priority" and not self.shared:
            raise ValueError(
                "SampledSoftmaxConfig: a priority sample for each position would cost noise for "
                'every class and position; use shared=True, or sampling="distinct".'
            )


class SampledSoftmax(SampledObjective):
    """Sampled softmax by a :class:`SampledSoftmaxConfig`."""

    name = "sampled_softmax"
    config_class = SampledSoftmaxConfig
    config: SampledSoftmaxConfig

    def has_static_shapes(self, head: Head) -> bool:
        return True

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        config, generator = self.config, call.stream("negatives")
        proposal = self._proposal(call.counts[head.kept])
        if config.shared:
            places, c = self._draw(proposal, generator, call.backend)
            ids = head.named(places)
            candidates = Candidates(ids[:0], ids, c, sparse_grad=config.sparse_grad)
            loss = candidate_cross_entropy(head, positions, candidates, backend=call.backend).loss
        else:
            is_distinct = config.sampling == "distinct"
            places, c = draw_rows(
                proposal, len(positions), config.num_negatives, generator, distinct=is_distinct
            )
            ids = head.named(places)
            own = PositionCandidates(ids, c, sparse_grad=config.sparse_grad)
            loss = position_cross_entropy(head, positions, own, backend=call.backend).loss
        return loss, self.statistics(positions, call, float(ids.shape[-1]), ids=[ids])

    def _proposal(self, counts: torch.Tensor) -> Proposal:
        if self.config.proposal == "uniform":
            return Uniform(len(counts))
        if self.config.proposal == "log_uniform":
            return LogUniform(len(counts))
        return Categorical(log_label_prior(counts, self.config.power, self.config.uniform_floor))

    def _draw(self, proposal: Proposal, generator: torch.Generator, backend: Backend):
        """Ids and log-weights of a shared sample."""
        if self.config.sampling == "replacement":
            return draw_with_replacement(proposal, self.config.num_negatives, generator)
        if self.config.sampling == "distinct":
            return draw_distinct(proposal, self.config.num_negatives, generator)
        everyone = torch.arange(proposal.vocab_size, device=generator.device)
        log_q, size = proposal.log_prob(everyone), self.config.num_negatives
        return priority_sample(log_q, size, generator, backend=backend)
