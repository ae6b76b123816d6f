"""The proposal of the tail of SCE (default): a mixture of densities.

    q_j = (1 - floor) · sum_i share_i · q_ij + floor / V

    labels     label frequencies seen so far, to a power
    gradient   the norm of each row's gradient at k-means centres
    uniform    1 / V

The tail is a priority sample weighed by the density of the whole mixture, so the partition function
is unbiased whatever the components are. All of them are fixed before the tail's noise is drawn.
"""

from __future__ import annotations

import torch

from sce_lm.candidates.buckets import kmeans_buckets
from sce_lm.candidates.center_softmax import CENTERS, CenterSoftmax, center_softmax
from sce_lm.candidates.prior import gradient_prior, label_prior, log_with_floor
from sce_lm.config import SCEConfig, SCESizes
from sce_lm.objectives.call import Call
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions


class TailProposal:
    """What one call's tail is drawn from. All of it without gradient."""

    def __init__(
        self, config: SCEConfig, sizes: SCESizes, head: Head, positions: Positions, call: Call
    ) -> None:
        self.config, self.sizes = config, sizes
        self.head, self.positions, self.call = head, positions, call
        self._at_centers: CenterSoftmax | None = None

    def log_density(self) -> torch.Tensor:
        """log q, fp64 ``[V]``, -inf for masked classes."""
        shares = self.config.prior_shares()
        parts = [self._component(name).mul_(share) for name, share in shares.items()]
        mixture = sum(parts[1:], parts[0])
        return log_with_floor(mixture, self.sizes.uniform_floor, self.head.masked)

    def _component(self, name: str) -> torch.Tensor:
        counts = self.call.counts
        if name == "labels":
            return label_prior(counts, self.config.prior_power)
        if name == "gradient":
            return gradient_prior(self.at_centers(), self.positions.is_valid)
        return torch.full_like(counts, 1.0 / max(self.head.num_classes, 1), dtype=torch.float64)

    def at_centers(self) -> CenterSoftmax:
        """The softmax at a few k-means centres of the positions; scanned once."""
        if self._at_centers is None:
            hidden = self.positions.hidden
            centers, center_of = kmeans_buckets(
                hidden.to(compute_dtype(hidden)),
                min(CENTERS, len(hidden)),
                self.call.stream("prior"),
                self.positions.is_valid,
            )
            self._at_centers = center_softmax(
                centers, center_of, self.head, control_variate=self.sizes.control_variate
            )
        return self._at_centers

    def products(self) -> float:
        """Inner products of width d a position that the components cost."""
        num_positions = len(self.positions)
        if "gradient" not in self.config.prior_shares():
            return 0.0
        return min(CENTERS, num_positions) * self.head.vocab_size / num_positions
