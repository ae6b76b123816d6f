"""NAME (authors, venue year): one sentence on what it minimises.

The equation, with the field's symbols:

    loss_t = log(exp s_ty + sum_{j in C} w_j exp s_tj) - s_ty

What is corrected against the paper, and which section has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sce_lm.config import ObjectiveConfig, check_count
from sce_lm.objectives.base import Statistics
from sce_lm.objectives.call import Call
from sce_lm.objectives.sampled_objective import SampledObjective
from sce_lm.ops.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions


@dataclass(frozen=True)
class UniformConfig(ObjectiveConfig):
    """Configuration. Raises ValueError for a value out of range."""

    num_draws: int = 1024
    """Draws, with replacement, shared by all positions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "num_draws")


class Uniform(SampledObjective):
    """Softmax over the label and uniform draws, by a :class:`UniformConfig`."""

    name = "uniform"
    config_class = UniformConfig
    config: UniformConfig

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        draws, vocab_size = self.config.num_draws, head.vocab_size
        drawn = torch.randint(
            vocab_size, (draws,), generator=call.stream("draws"), device=positions.labels.device
        )
        ids, occurrences = torch.unique(drawn, return_counts=True)
        # n_j draws of probability 1/V stand for n_j · V / draws classes.
        log_weights = (occurrences.to(torch.float64) * vocab_size / draws).log()
        candidates = Candidates(ids[:0], ids, log_weights)
        loss = candidate_cross_entropy(head, positions, candidates, backend=call.backend).loss
        return loss, self.statistics(positions, call, float(draws), ids=[ids])
