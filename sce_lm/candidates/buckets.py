"""Buckets of positions: centres, and which position belongs where. All of it without gradient."""

from __future__ import annotations

import torch

KMEANS_STEPS = 4
KMEANS_POSITIONS_PER_BUCKET = 64
"""The centres are fitted on at most this many positions a bucket; all are assigned at the end."""


def kmeans_buckets(
    hidden: torch.Tensor,
    num_buckets: int,
    generator: torch.Generator,
    is_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One bucket for each position: a few Lloyd steps on this batch's hidden states.

    Args:
        hidden: ``[N, d]`` fp32 or fp64, N >= num_buckets.
        num_buckets: n_b.
        generator: picks the positions that the centres start from.
        is_valid: ``[N]`` bool: which positions the centres are fitted on, the others have hidden
            states of 0; None: all.

    Returns:
        Centres ``[n_b, d]`` and each position's bucket, ``[N]`` int64.
    """
    order = torch.randperm(len(hidden), generator=generator, device=hidden.device)
    if is_valid is not None:
        order = order[torch.argsort(is_valid[order], descending=True, stable=True)]
    some = order[: num_buckets * KMEANS_POSITIONS_PER_BUCKET]
    sample, is_there = hidden[some], None if is_valid is None else is_valid[some]
    centers = sample[:num_buckets].clone()
    for _ in range(KMEANS_STEPS):
        centers = _bucket_means(sample, _nearest(sample, centers), centers, is_there)
    bucket = _nearest(hidden, centers)
    return _bucket_means(hidden, bucket, centers, is_valid), bucket


def _nearest(hidden: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """argmin |h - c|² = argmax h·c - |c|²/2."""
    offset = centers.square().sum(dim=1).mul_(-0.5)
    return torch.addmm(offset, hidden, centers.T).argmax(dim=1)


def _bucket_means(hidden, bucket, centers, is_valid=None):
    """Mean of each bucket; an empty one keeps its centre."""
    one = hidden.new_ones(1).expand(len(hidden)) if is_valid is None else is_valid.to(hidden.dtype)
    count = hidden.new_zeros(len(centers)).index_add_(0, bucket, one).unsqueeze(1)
    total = torch.zeros_like(centers).index_add_(0, bucket, hidden)
    return torch.where(count > 0, total / count.clamp_min(1), centers)


def random_centers(
    hidden: torch.Tensor, num_buckets: int, generator: torch.Generator, *, mix: bool
) -> torch.Tensor:
    """Centres of published SCE, ``[n_b, d]``: ``Omega' h`` with ``Omega ~ N(0,1)[N, n_b]`` if
    ``mix``, else ``N(0,1)[n_b, d]`` (arXiv 2409.18721, algorithm 1)."""
    shape = (num_buckets, hidden.shape[0] if mix else hidden.shape[1])
    normal = torch.randn(shape, generator=generator, device=hidden.device, dtype=hidden.dtype)
    return normal @ hidden if mix else normal
