"""The classes that stand in for the catalogue in one call of a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sce_lm.ops.head import Head


class ExpectedRows(NamedTuple):
    """What a call adds to the gradient of the head's rows (:mod:`sce_lm.objectives.row_control`):
    of row j the part ``sum_k a_k share_kj c_k``, with a_k the summed weights of centre k's
    positions."""

    share: torch.Tensor
    """``[C, V]`` fp32 or fp64."""
    centers: torch.Tensor
    """``[C, d]`` c, in the same dtype (``[C, d + r]`` for a head with a low-rank operand)."""
    center_of: torch.Tensor
    """``[N]`` int64: the centre of each position."""

    def rows(self, head: Head, of_positions: torch.Tensor) -> torch.Tensor:
        """``[C, D]`` ``a_k c_k``, for the 0-dim or ``[N]`` weights of the positions."""
        a = self.share.new_zeros(len(self.centers))
        weights = of_positions.to(a.dtype).expand(len(self.center_of))
        a.index_add_(0, self.center_of, weights)
        return head.extend(self.centers, a.dtype) * a.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Three lists, chosen without gradient.

    ``shared``, ``tail`` and each row of ``bucket_items`` hold distinct ids; ``shared`` meets
    neither of the others. ``tail`` may meet ``bucket_items``: such items count for positions of
    other buckets only. None of them holds a masked class, a label aside.
    """

    shared: torch.Tensor
    """``[S]`` int64: in every position's sum, with certainty. -1 marks the empty places, which
    are the last ones, where shapes are static (:mod:`sce_lm.ops.static_shapes`)."""
    tail: torch.Tensor
    """``[m]`` int64: in every position's sum with weight ``exp(c)``."""
    tail_log_weights: torch.Tensor
    """``[m]`` c; -inf marks an empty place, whose id may be any."""
    bucket_items: torch.Tensor | None = None
    """``[n_b, K_b]`` int64, ascending in each row."""
    bucket_of: torch.Tensor | None = None
    """``[N]`` int64: the bucket of each position."""
    bucket_log_weights: torch.Tensor | None = None
    """``[n_b, K_b]`` log-weights of ``bucket_items``; None: all 0. -inf marks an empty slot, whose
    id may be any that keeps the order. Not with ``control_variate``."""
    row_sum: torch.Tensor | None = None
    """``[D]`` sum of the head's rows without the masked ones, where the caller keeps it up to date;
    None: they are all read for it. Used by the control variate only."""
    control_variate: bool = False
    """Take the known part of the tail out of the sample."""
    sparse_grad: bool = False
    """Gradient of the weight as a sparse tensor, without the part through the mean."""
    expected: ExpectedRows | None = None
    """What the head's dense gradient has beside that of the loss; None: nothing."""


def find(ids: torch.Tensor, ascending: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot of each id in an ascending list (last dimension), and whether it is there."""
    if ascending.shape[-1] == 0:
        return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    slot = torch.searchsorted(ascending, ids).clamp_max_(ascending.shape[-1] - 1)
    return slot, ascending.expand(*ids.shape[:-1], -1).gather(-1, slot) == ids
