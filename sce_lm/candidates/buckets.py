"""Buckets of positions: centres, and which position belongs where. All of it without gradient."""

from __future__ import annotations

import torch

KMEANS_STEPS = 4
KMEANS_POSITIONS_PER_BUCKET = 64
"""The centres are fitted on at most this many positions a bucket; all are assigned at the end."""
FAINT = 2.0**-100
"""Weight of a bucket's last centre in its mean: only an empty bucket shows it."""


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
    counts = hidden.new_ones(len(hidden)) if is_valid is None else is_valid.to(hidden.dtype)
    sample, counts_there = hidden[some], counts[some]
    centers = sample[:num_buckets]
    for _ in range(KMEANS_STEPS):
        centers = _bucket_means(sample, _nearest(sample, centers), centers, counts_there)
    bucket = _nearest(hidden, centers)
    return _bucket_means(hidden, bucket, centers, counts), bucket


def _nearest(hidden: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """argmin |h - c|² = argmin |c|² - 2 h·c."""
    return torch.addmm(centers.square().sum(dim=1), hidden, centers.T, alpha=-2.0).argmin(dim=1)


def _bucket_means(hidden, bucket, centers, counts):
    """Mean of each bucket, where a position counts 1 or (and is 0 itself) 0; an empty bucket keeps
    its centre."""
    count = centers.new_full((len(centers),), FAINT).index_add_(0, bucket, counts)
    return (centers * FAINT).index_add_(0, bucket, hidden) / count.unsqueeze(1)


def random_centers(
    hidden: torch.Tensor, num_buckets: int, generator: torch.Generator, *, mix: bool
) -> torch.Tensor:
    """Centres of published SCE, ``[n_b, d]``: ``Omega' h`` with ``Omega ~ N(0,1)[N, n_b]`` if
    ``mix``, else ``N(0,1)[n_b, d]`` (arXiv 2409.18721, algorithm 1)."""
    shape = (num_buckets, hidden.shape[0] if mix else hidden.shape[1])
    normal = torch.randn(shape, generator=generator, device=hidden.device, dtype=hidden.dtype)
    return normal @ hidden if mix else normal
