"""What the candidates that were drawn say of the variance of Zhat."""

from __future__ import annotations

import torch

from sce_lm.ops.candidate_blocks import BLOCK_ELEMENTS, Lists
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.control_variate import Rest
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.static_shapes import needs_static_shapes


def candidate_variance(
    head: Head,
    positions: Positions,
    candidates: Candidates,
    log_partition: torch.Tensor,
    chosen: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Estimated relative variance of Zhat at some positions, without and with control variate.

        Vhat = sum_{j in T \ B, != y} (1 - pi_j) f_j² / pi_j²,     pi = exp(-c)

    with ``f = exp s``, or ``exp s - e0·(1 + g'(m)(x - m))`` under the control variate, over Zhat².
    Only drawn items are seen, so mass that no sample has met is not in it.

    Args:
        log_partition: ``[N]``, from :func:`candidate_cross_entropy`.
        chosen: ``[P]`` which positions to look at.

    Returns:
        Two ``[P]`` tensors.
    """
    is_static = needs_static_shapes(positions.labels.device)
    lists, post = Lists(head, positions, candidates, is_static=is_static), head.post
    plain = lists.dense_rows.new_zeros(len(chosen))
    control = torch.zeros_like(plain)
    if lists.num_tail == 0:
        return plain, control
    rest = Rest(lists, candidates.row_sum)
    rest.set_all_means()
    w = lists.dense_weight[lists.tail]
    factor = (w * (w - 1.0)).clamp_min_(0.0)
    step = max(1, BLOCK_ELEMENTS // lists.num_tail)
    for start in range(0, len(chosen), step):
        at = chosen[start : start + step]
        h, bucket = head.extend(positions.hidden[at], lists.dtype), lists.bucket_of[at]
        x = h @ lists.tail_rows.T
        column = lists.label_column[at].unsqueeze(1) - lists.num_shared
        left_out = (torch.arange(lists.num_tail, device=x.device) == column) | (w == 0)
        if lists.own_tail is not None:
            left_out |= lists.own_tail[bucket]
        shift = log_partition[at].unsqueeze(1)
        mean = rest.dot(h, rest.mean_rows, bucket).unsqueeze(1)
        g_mean = post(mean)
        tangent = (g_mean - shift).exp() * (1.0 + post.slope(g_mean) * (x - mean))
        f = (post(x) - shift).exp().masked_fill_(left_out, 0.0)
        tangent = tangent.masked_fill(left_out, 0.0)
        plain[start : start + step] = f.square() @ factor
        control[start : start + step] = (f - tangent).square() @ factor
    return plain, control


def bucket_variance(
    head: Head,
    positions: Positions,
    candidates: Candidates,
    log_partition: torch.Tensor,
    chosen: torch.Tensor,
) -> torch.Tensor:
    """The same for samples of the buckets' own, which have no control variate: ``[P]``."""
    items, log_weights = candidates.bucket_items, candidates.bucket_log_weights
    assert items is not None
    assert log_weights is not None
    assert candidates.bucket_of is not None
    dtype = compute_dtype(positions.hidden, head.weight)
    hidden = head.extend(positions.hidden[chosen], dtype)
    labels, bucket = positions.labels[chosen].unsqueeze(1), candidates.bucket_of[chosen]
    shift = log_partition[chosen].unsqueeze(1)
    w = log_weights.to(dtype).exp()
    factor = (w * (w - 1.0)).clamp_min_(0.0)

    def of(own: int, at: torch.Tensor | slice) -> torch.Tensor:
        x = hidden[at] @ head.rows(items[own], dtype).T
        f = (head.post(x) - shift[at]).exp().masked_fill_(items[own] == labels[at], 0.0)
        return f.square() @ factor[own]

    variance = hidden.new_zeros(len(chosen))
    for own in range(len(items)):
        is_here = bucket == own
        if needs_static_shapes(chosen.device):
            variance = torch.where(is_here, of(own, slice(None)), variance)
        else:
            at = is_here.nonzero().squeeze(1)
            variance[at] = of(own, at)
    return variance
