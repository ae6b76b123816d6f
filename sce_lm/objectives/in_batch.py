"""In-batch softmax with logQ correction (Yi et al., RecSys 2019).

The labels of the other positions are the negatives. They come from the label distribution q, so a
class that stands n_j times among the labels of N positions gets the weight of ``N - 1`` draws:

    Zhat_t = exp s_ty + sum_{j in batch, j != y} n_j / ((N - 1) q_j) · exp s_tj

The position's own label is no draw, hence N - 1, and needs no correction: Zhat is then unbiased for
labels that are drawn from q, on the classes that q covers. The paper subtracts log q from the
label's logit too and drops the factor 1/N, which leaves the ratio of negatives to label to chance.

q is unknown and estimated: from all labels seen so far, or, where it drifts, from the gap between
occurrences (the paper's streaming estimate, with positions as the clock and an entry a class):

    gap_j <- (1 - r)^n gap_j + (1 - (1 - r)^n) · (now - last_j) / n,       q_j = 1 / gap_j

A class that is met for the first time has the gap ``now / n``. Both count the batch at hand, so no
candidate is unseen and no weight is infinite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sce_lm.candidates.distinct import distinct
from sce_lm.candidates.state import SCEState
from sce_lm.config import SoftmaxConfig, check_choice, check_share
from sce_lm.objectives.base import Statistics
from sce_lm.objectives.call import Call
from sce_lm.objectives.sampled_objective import SampledObjective
from sce_lm.ops.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions


@dataclass(frozen=True)
class InBatchConfig(SoftmaxConfig):
    """Configuration of the in-batch softmax. Raises ValueError for a value out of range."""

    logq: bool = True
    """Weigh negatives by their inverse frequency; without it frequent classes are pushed down."""

    frequency: Literal["counts", "streaming"] = "counts"
    """Estimate of the label frequencies: all labels so far, or the streaming gap."""

    streaming_rate: float = 0.01
    """Weight r of the newest gap, in (0, 1]; frequency "streaming" only."""

    sparse_grad: bool = False
    """Return a row-sparse gradient of the weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "logq", True, False)
        check_choice(self, "frequency", "counts", "streaming")
        check_share(self, "streaming_rate", zero=False)
        check_choice(self, "sparse_grad", True, False)


class InBatch(SampledObjective):
    """In-batch softmax by an :class:`InBatchConfig`."""

    name = "in_batch"
    config_class = InBatchConfig
    config: InBatchConfig

    def has_static_shapes(self, head: Head) -> bool:
        return True

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        counts, num_labels = call.counts, positions.num_valid
        found = distinct(positions.labels, len(counts), positions.is_valid)
        ids, occurrences = found.ids, found.occurrences
        log_weights = occurrences.to(torch.float64).log()
        if self.config.logq:
            q = counts[ids].to(torch.float64) / counts.sum()
            if self.config.frequency == "streaming":
                q = call.once(
                    "frequency",
                    lambda: streaming_frequency(
                        self.state,
                        ids,
                        occurrences,
                        num_labels,
                        len(counts),
                        self.config.streaming_rate,
                        keep=call.counted,
                    ),
                )
            draws = num_labels - 1
            draws = draws.clamp_min(1) if torch.is_tensor(draws) else max(draws, 1)
            log_weights -= torch.log(q * draws)
        log_weights = found.once(log_weights)
        candidates = Candidates(ids[:0], ids, log_weights, sparse_grad=self.config.sparse_grad)
        loss = candidate_cross_entropy(head, positions, candidates, backend=call.backend).loss
        return loss, self.statistics(positions, call, float(len(ids)), ids=[ids])


def streaming_frequency(
    state: SCEState,
    ids: torch.Tensor,
    occurrences: torch.Tensor,
    num_labels: torch.Tensor | int,
    vocab_size: int,
    rate: float,
    *,
    keep: bool,
) -> torch.Tensor:
    """``[U]`` fp64 frequency of the classes of a batch, by the gaps between them.

    Args:
        state: its memory holds ``gap [V]`` (0: never met), ``last_met [V]`` and ``clock``.
        ids: ``[U]`` classes of the batch, distinct or with static shapes repeated.
        occurrences: ``[U]`` how often each stands in it.
        num_labels: N, all of them.
        keep: write the new gaps into the memory.
    """
    memory = state.memory
    new = ids.new_zeros(vocab_size)
    gap = memory.get("gap", new.to(torch.float64)).to(ids.device)
    last = memory.get("last_met", new).to(ids.device)
    clock = memory.get("clock", new[:1]).to(ids.device) + num_labels
    newest = (clock - last[ids]) / occurrences.to(torch.float64)
    past = (1.0 - rate) ** occurrences.to(torch.float64)
    past = torch.where(gap[ids] > 0, past, 0.0)
    updated = past * gap[ids] + (1.0 - past) * newest
    if keep:
        is_met = occurrences > 0  # none is, if no position has a label
        memory["gap"] = gap.index_copy_(0, ids, torch.where(is_met, updated, gap[ids]))
        memory["last_met"] = last.index_copy_(0, ids, torch.where(is_met, clock, last[ids]))
        memory["clock"] = clock
    return 1.0 / updated
