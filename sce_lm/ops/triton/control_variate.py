"""The rest R that a control variate stands for: its size, its mean row, and what the gradient at
the mean passes on to the rows of W.

The mean logit over R needs no logits: it is the product of h with the mean row of R, the same for
all positions of a bucket. What Zhat makes of it is :mod:`sce_lm.ops.triton.candidate_epilogue`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from sce_lm.ops.static_shapes import needs_static_shapes
from sce_lm.ops.triton.candidate_lists import CandidateTensors
from sce_lm.ops.triton.row_sum import row_sum

ROW_SUM_CHUNK = 256
"""Rows of a long list that one program adds up."""


@dataclass(frozen=True)
class Rest:
    """R of each bucket; one for all positions without buckets."""

    size: torch.Tensor
    """0-dim int64: |R|."""
    rows: torch.Tensor
    """``[n_b, d]`` fp32: mean of R's rows of W."""
    bias: torch.Tensor | None
    """``[n_b]`` fp32: mean of R's biases."""
    bucket_of: torch.Tensor
    """``[N]`` int64."""

    @cached_property
    def divisor(self) -> torch.Tensor:
        """Of a mean over R."""
        return self.size.clamp_min(1)


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
    num_shared = tensors.num_shared
    own = 0 if items is None else items.shape[1]
    num_masked = 0 if masked is None else len(masked)
    size = len(weight) - own - num_masked - num_shared
    if not torch.is_tensor(size):
        size = labels.new_full((), size)
    certain = _long_sum(weight, shared, num_shared)
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
    rest = Rest(size, rows, biases, bucket_of)
    biases = None if biases is None else biases / rest.divisor
    return replace(rest, rows=rows / rest.divisor, bias=biases)


def _long_sum(
    weight: torch.Tensor, ids: torch.Tensor, count: int | torch.Tensor | None = None
) -> torch.Tensor:
    """``[d]`` fp32 sum of the rows at the first ``count`` (None: all) of a long list of ids."""
    count = len(ids) if count is None else count
    chunks = torch.arange(0, len(ids) + ROW_SUM_CHUNK, ROW_SUM_CHUNK, device=weight.device)
    return row_sum(weight, ids, chunks.clamp_max_(count)).sum(dim=0)


def in_lists(labels: torch.Tensor, tensors: CandidateTensors, vocab_size: int) -> torch.Tensor:
    """``[N]`` bool: the label does not lie in R, but in the shared list or its bucket's, or it is
    masked."""
    known = _is_in(labels, tensors.shared)
    if tensors.masked is not None:
        known |= _is_in(labels, tensors.masked)
    if tensors.bucket_items is not None and tensors.bucket_of is not None:
        bucket = torch.arange(len(tensors.bucket_items), device=labels.device)
        keys = tensors.bucket_items + bucket.unsqueeze(1) * vocab_size
        known |= _is_in(labels + tensors.bucket_of * vocab_size, keys.reshape(-1))
    return known


def _is_in(ids: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    if len(members) == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    members = members.sort().values
    return members[torch.searchsorted(members, ids).clamp_max_(len(members) - 1)] == ids


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
