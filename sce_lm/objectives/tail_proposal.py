"""The proposal of corrected SCE's tail: a mixture of what the other objectives draw from.

    q_j = (1 - floor) · sum_i share_i · q_ij + floor / V

    labels     label frequencies seen so far, to a power                     (sampled softmax)
    in_batch   frequencies of this batch's labels                            (in-batch softmax)
    cache      how often each class would have been drawn from the softmax   (XIR)
    kernel     the positions' mean kernel mass, centred, alpha "auto"        (kernel sampling)
    gradient   the norm of each row's gradient at k-means centres            (none so far)
    uniform    1 / V

The tail is a priority sample weighed by the density of the whole mixture, so the partition function
is unbiased whatever the components are. All of them are fixed before the tail's noise is drawn.

XIR counts draws; here each position's share of its estimated softmax stands for one draw, its
expectation: ``exp(c_j + s_tj) / Zhat_t``, whose mean over tails is p_tj. Occurrences fade by
``CACHE_DECAY`` a call, since the parameters move.
"""

from __future__ import annotations

import torch

from sce_lm.candidates.buckets import kmeans_buckets
from sce_lm.candidates.cache import occurrences_of, record_draws
from sce_lm.candidates.center_softmax import CENTERS, CenterSoftmax, center_softmax
from sce_lm.candidates.noise import stream
from sce_lm.candidates.prior import gradient_prior, label_prior, log_with_floor
from sce_lm.candidates.state import SCEState
from sce_lm.config import SCEConfig, SCESizes
from sce_lm.objectives.base import HeadInputs
from sce_lm.objectives.kernel import Kernel, KernelConfig
from sce_lm.ops.candidate_cross_entropy import Candidates
from sce_lm.ops.exact_cross_entropy import compute_dtype

CACHE_DECAY = 0.99
"""Factor on past occurrences at each call."""
CACHE_POSITIONS = 256
"""Positions that stand for all of a call's in the cache, spread evenly."""

_KERNEL = KernelConfig(shared=True, alpha="auto", center=True)


class TailProposal:
    """What one call's tail is drawn from. All of it without gradient."""

    def __init__(
        self, config: SCEConfig, state: SCEState, inputs: HeadInputs, sizes: SCESizes
    ) -> None:
        self.config, self.state, self.inputs, self.sizes = config, state, inputs, sizes
        self._at_centers: CenterSoftmax | None = None

    def log_density(self, counts: torch.Tensor, seed: int, *, counted: bool) -> torch.Tensor:
        """log q, fp64 ``[V]``, -inf for masked classes.

        Args:
            counts: ``[V]`` label counts.
            seed: of the call.
            counted: whether the state may change.
        """
        mixture = torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
        for name, share in self.config.prior_shares().items():
            mixture += share * self._component(name, counts, seed, counted)
        return log_with_floor(mixture, self.sizes.uniform_floor, self.inputs.masked)

    def _component(self, name: str, counts: torch.Tensor, seed: int, counted: bool) -> torch.Tensor:
        inputs, vocab_size = self.inputs, len(counts)
        if name == "labels":
            return label_prior(counts, self.config.prior_power)
        if name == "in_batch":
            return label_prior(torch.bincount(inputs.labels, minlength=vocab_size), 1.0)
        if name == "cache":
            occurrences = occurrences_of(self.state, vocab_size, counts.device)
            return occurrences / occurrences[inputs.kept].sum()
        if name == "kernel":
            everyone = torch.arange(inputs.num_classes, device=counts.device)
            kernel = Kernel(_KERNEL, self.state)
            density = torch.zeros_like(counts, dtype=torch.float64)
            density[inputs.kept] = kernel.proposal(inputs, seed, counted).log_prob(everyone).exp()
            return density
        if name == "gradient":
            return gradient_prior(self.at_centers(seed))
        return torch.full_like(counts, 1.0 / max(inputs.num_classes, 1), dtype=torch.float64)

    def at_centers(self, seed: int) -> CenterSoftmax:
        """The softmax at a few k-means centres of the positions; scanned once."""
        if self._at_centers is None:
            inputs = self.inputs
            centers, center_of = kmeans_buckets(
                inputs.hidden.to(compute_dtype(inputs.hidden)),
                min(CENTERS, len(inputs.hidden)),
                stream(seed, "prior", inputs.hidden.device),
                balanced=False,
            )
            self._at_centers = center_softmax(
                centers,
                center_of,
                inputs.columns,
                inputs.post,
                control_variate=self.sizes.control_variate,
                left_out=inputs.masked,
            )
        return self._at_centers

    def products(self) -> float:
        """Inner products of width d a position that the components cost."""
        vocab_size, width = self.inputs.weight.shape
        num_positions, total = len(self.inputs.labels), 0.0
        shares = self.config.prior_shares()
        if "gradient" in shares:
            total += min(CENTERS, num_positions) * vocab_size / num_positions
        if "kernel" in shares:
            kernel = Kernel(_KERNEL, self.state)
            total += kernel.proposal_products(self.inputs.num_classes, width, num_positions)
        return total


@torch.no_grad()
def record_softmax(
    state: SCEState, inputs: HeadInputs, candidates: Candidates, log_partition: torch.Tensor
) -> None:
    """Bring the cache up to date by the classes of a call's shared list and tail.

    Args:
        log_partition: ``[N]`` log Zhat.
    """
    num_positions, dtype = len(inputs.labels), compute_dtype(inputs.hidden, inputs.weight)
    step = -(-num_positions // CACHE_POSITIONS)
    ids = torch.cat([candidates.shared, candidates.tail])
    hidden = inputs.columns.extend(inputs.hidden[::step], dtype)
    logits = inputs.post(hidden @ inputs.columns.rows(ids, dtype).T)
    share = (logits - log_partition[::step].unsqueeze(1)).clamp_max_(0.0).exp_()
    mass = share.sum(dim=0).double()
    mass[len(candidates.shared) :] *= candidates.tail_log_weights.exp()
    scale = num_positions / len(hidden)
    record_draws(state, ids, mass * scale, len(inputs.weight), CACHE_DECAY)
