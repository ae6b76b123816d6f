r"""The control variate's part of Zhat, from the sums that the forward kernel left.

With R everything outside a position's certain lists and m its mean raw logit there,

    e0·( |R| - A0 - g'(m)·(A1 - m·A0) ),     e0 = exp g(m)

is added to Zhat; see :mod:`sce_lm.ops.candidate_cross_entropy`. The mean needs no logits: it is the
product of h with the mean row of R, the same for all positions of a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.static_shapes import needs_static_shapes
from sce_lm.ops.triton.candidate_forward import ListSums
from sce_lm.ops.triton.candidate_lists import CandidateTensors
from sce_lm.ops.triton.row_dot import row_dot
from sce_lm.ops.triton.row_sum import row_sum

ROW_SUM_CHUNK = 256
"""Rows of a long list that one program adds up."""


@dataclass(frozen=True)
class Rest:
    """R of each bucket; one for all positions without buckets."""

    size: int | torch.Tensor
    """|R|: a number, or 0-dim on the device."""
    rows: torch.Tensor
    """``[n_b, d]`` fp32: mean of R's rows of W."""
    bias: torch.Tensor | None
    """``[n_b]`` fp32: mean of R's biases."""
    bucket_of: torch.Tensor
    """``[N]`` int64."""

    @property
    def divisor(self) -> int | torch.Tensor:
        """Of a mean over R."""
        return self.size.clamp_min(1) if torch.is_tensor(self.size) else max(self.size, 1)


def rest_size(tensors: CandidateTensors, vocab_size: int) -> int | torch.Tensor:
    """|R|: what neither the shared list nor a bucket's own holds."""
    own = 0 if tensors.bucket_items is None else tensors.bucket_items.shape[1]
    masked = 0 if tensors.masked is None else len(tensors.masked)
    return vocab_size - own - masked - tensors.num_shared


def rest_of(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tensors: CandidateTensors,
    labels: torch.Tensor,
    total: torch.Tensor | None,
) -> Rest:
    """Everything outside the shared list and each bucket's own.

    Args:
        labels: ``[N]``, for its size and device.
        total: ``[d]``, with a bias ``[d + 1]``, sum of all rows that are not masked; None: the
            weight is read.
    """
    shared, items, masked = tensors.shared, tensors.bucket_items, tensors.masked
    width = weight.shape[1]
    if total is None:
        total = weight.sum(dim=0, dtype=torch.float32)
        if masked is not None:
            total = total - _long_sum(weight, masked)
        if bias is not None:
            finite = bias if masked is None else bias.index_fill(0, masked, 0.0)
            total = torch.cat([total, finite.sum(dtype=torch.float32).view(1)])
    certain = _long_sum(weight, shared, tensors.num_shared)
    rows = (total[:width] - certain).float().unsqueeze(0)
    biases = None
    if bias is not None:
        certain = bias[shared]
        if needs_static_shapes(shared.device):
            certain = certain.masked_fill(shared < 0, 0.0)
        biases = (total[width:] - certain.sum(dtype=torch.float32)).float()
    bucket_of = torch.zeros_like(labels)
    if items is not None and tensors.bucket_of is not None:
        bucket_of = tensors.bucket_of
        edges = torch.arange(len(items) + 1, device=weight.device) * items.shape[1]
        rows = rows - row_sum(weight, items.reshape(-1), edges)
        if biases is not None and bias is not None:
            biases = biases - bias[items].sum(dim=1, dtype=torch.float32)
    rest = Rest(rest_size(tensors, len(weight)), rows, biases, bucket_of)
    biases = None if biases is None else biases / rest.divisor
    return replace(rest, rows=rows / rest.divisor, bias=biases)


def _long_sum(
    weight: torch.Tensor, ids: torch.Tensor, count: int | torch.Tensor | None = None
) -> torch.Tensor:
    """``[d]`` fp32 sum of the rows at the first ``count`` (None: all) of a long list of ids."""
    count = len(ids) if count is None else count
    chunks = torch.arange(0, len(ids) + ROW_SUM_CHUNK, ROW_SUM_CHUNK, device=weight.device)
    return row_sum(weight, ids, chunks.clamp_max_(count)).sum(dim=0)


def outside_lists(labels: torch.Tensor, tensors: CandidateTensors, vocab_size: int) -> torch.Tensor:
    """``[N]`` fp32, 1 where the label lies in R: in neither the shared list nor its bucket's, and
    not masked."""
    known = _is_in(labels, tensors.shared)
    if tensors.masked is not None:
        known |= _is_in(labels, tensors.masked)
    if tensors.bucket_items is not None and tensors.bucket_of is not None:
        bucket = torch.arange(len(tensors.bucket_items), device=labels.device)
        keys = tensors.bucket_items + bucket.unsqueeze(1) * vocab_size
        known |= _is_in(labels + tensors.bucket_of * vocab_size, keys.reshape(-1))
    return (~known).float()


def _is_in(ids: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    if len(members) == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    members = members.sort().values
    return members[torch.searchsorted(members, ids).clamp_max_(len(members) - 1)] == ids


class Control:
    """One call's control variate, position by position."""

    def __init__(
        self,
        hidden: torch.Tensor,
        label_raw: torch.Tensor,
        outside: torch.Tensor,
        rest: Rest,
        sums: list[ListSums],
        post: LogitTransform,
    ) -> None:
        self.rest_size = rest.size
        mean = row_dot(hidden, rest.rows, rest.bucket_of, rest.bias)
        self.g_mean = post(mean)
        self.slope, self.curvature = post.slope(self.g_mean), post.curvature(self.g_mean)
        self.outside = outside
        # The logit of a label that is left out may be infinite.
        self.a0, a1 = outside, outside * label_raw.masked_fill(outside == 0, 0.0)
        for s in sums:
            if s.a0 is not None and s.a1 is not None:
                self.a0, a1 = self.a0 + s.a0.sum(dim=0), a1 + s.a1.sum(dim=0)
        self.spread = a1 - mean * self.a0
        self.e0 = torch.zeros_like(mean)
        self.clamped = torch.zeros_like(mean, dtype=torch.int8)

    def shift(self, shift: torch.Tensor) -> torch.Tensor:
        """The exponent to take out, so that e0 stays in range too."""
        return shift.maximum(self.least_shift())

    def least_shift(self) -> torch.Tensor:
        """g(m), -inf where R is empty."""
        if torch.is_tensor(self.rest_size):
            return self.g_mean.masked_fill(self.rest_size == 0, -torch.inf)
        return self.g_mean if self.rest_size else torch.full_like(self.g_mean, -torch.inf)

    def add_to(self, z: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Zhat with the known part, both over ``exp shift``."""
        self.e0 = (self.least_shift() - shift).exp()
        return z + self.e0 * (self.rest_size - self.a0 - self.slope * self.spread)

    def clamp(self, z: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Zhat from below by the terms that were seen; where it was less, the variate is off."""
        clamped = z < seen
        self.clamped = clamped.to(torch.int8)
        self.e0 = self.e0.masked_fill(clamped, 0.0)
        return torch.where(clamped, seen, z)

    def mean_gradient(self) -> torch.Tensor:
        """d Zhat / dm, over ``exp shift``."""
        bend = self.slope * self.slope + self.curvature
        return self.e0 * (self.slope * self.rest_size - bend * self.spread)


class MeanGradient(NamedTuple):
    """What the mean passes on to rows: every row of W has the share ``grad m_k / |R|`` of each
    bucket k, except the shared ones, and except a bucket's own items in that bucket's mean."""

    share: torch.Tensor
    """``[n_b, d]`` fp32."""
    bias_share: torch.Tensor
    """``[n_b]`` fp32."""

    def offsets(self, kind: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What a list's slots must give back: (``[L, d]``, ``[L]``)."""
        if kind == "tail":
            return None, None
        if kind == "bucket":
            return self.share, self.bias_share
        return self.share.sum(dim=0, keepdim=True), self.bias_share.sum(dim=0, keepdim=True)


def mean_gradient(hidden: torch.Tensor, grad_mean: torch.Tensor, rest: Rest) -> MeanGradient:
    """From the gradients ``[N]`` fp32 at the mean logits."""
    by_bucket, order = torch.sort(rest.bucket_of, stable=True)
    edges = torch.arange(len(rest.rows) + 1, device=hidden.device)
    bounds = torch.searchsorted(by_bucket, edges)
    return MeanGradient(
        row_sum(hidden, order, bounds, grad_mean) / rest.divisor,
        row_sum(grad_mean.unsqueeze(1), order, bounds).squeeze(1) / rest.divisor,
    )
