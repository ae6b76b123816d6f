"""The softmax at k-means centres: one scan of the catalogue that stands for all positions."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sce_lm.ops.gradient_memory import tile_rows
from sce_lm.ops.head import Head

CENTERS = 16
"""Centres where there are no buckets to take them from; their scan costs 16·V/N products a
position."""
TILE_ELEMENTS = 2**23
"""Scores, or numbers of the head, held at a time on a CPU (32 MiB in fp32)."""


class CenterSoftmax(NamedTuple):
    """How the centres' log-partitions follow the raw logit of every class.

        x_kj = c_k·w_j + b_j,     share_kj = p_kj g'(x_kj) - e_k g'(m_k)
        p_kj = softmax_j(g(x_kj)),     e_k = exp g(m_k) / Z_k,     m_k = mean_j x_kj

    Of the gradient of row j, ``p_tj g'(x_tj)·h_t``, e is the part that the tail's control variate
    knows already (e = 0 without it).
    """

    centers: torch.Tensor
    """``[C, d]`` c, fp32 or fp64."""
    center_of: torch.Tensor
    """``[N]`` int64: the centre that stands for each position."""
    share: torch.Tensor
    """``[C, V]`` in the dtype of the centres."""


def center_softmax(
    centers: torch.Tensor,
    center_of: torch.Tensor,
    head: Head,
    *,
    control_variate: bool,
) -> CenterSoftmax:
    """One scan, ``C·V`` inner products.

    Args:
        centers: ``[C, d]`` (``[C, d + r]`` for a head with a low-rank operand).
        center_of: ``[N]``.
        head: the output head; masked classes have no share and are no part of the mean.
        control_variate: whether the tail has one.
    """
    extended, masked, post = head.extend(centers, centers.dtype), head.masked, head.post
    vocab_size, width = head.weight.shape
    tile = tile_rows(TILE_ELEMENTS, max(len(centers), width), centers.device)
    scores = torch.cat(
        [
            extended @ head.rows(slice(start, start + tile), centers.dtype).T
            for start in range(0, vocab_size, tile)
        ],
        dim=1,
    )
    counted = scores if masked is None else scores.index_fill(1, masked, 0.0)
    g_mean = post(counted.sum(dim=1) / max(head.num_classes, 1))
    s = post.apply_(scores)
    slope = post.slope(s)
    log_z = torch.logsumexp(s, dim=1)
    share = s.sub_(log_z.unsqueeze(1)).exp_().mul_(slope)
    if control_variate:
        share -= ((g_mean - log_z).exp() * post.slope(g_mean)).unsqueeze(1)
    if masked is not None:
        share.index_fill_(1, masked, 0.0)
    return CenterSoftmax(centers, center_of, share)
