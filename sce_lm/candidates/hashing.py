"""Locality-sensitive hashing by random directions, and chunks of equal size along the hash."""

from __future__ import annotations

import torch

TILE_ELEMENTS = 2**23
"""Scores held at a time (32 MiB in fp32)."""


def hash_chunks(vectors: torch.Tensor, directions: torch.Tensor, count: int) -> torch.Tensor:
    """Sort vectors by their nearest direction and cut the order into equal chunks.

    Args:
        vectors: ``[M, d]``.
        directions: ``[n_b, d]``; a vector's hash is the direction of its largest inner product.
        count: chunks; at most M.

    Returns:
        ``[M]`` int64, the chunk of each vector; sizes differ by at most 1.
    """
    tile = max(1, TILE_ELEMENTS // len(directions))
    nearest = [
        (part.to(directions.dtype) @ directions.T).argmax(dim=1) for part in vectors.split(tile)
    ]
    order = torch.argsort(torch.cat(nearest), stable=True)
    chunk = torch.arange(len(order), device=order.device) * count // len(order)
    return torch.empty_like(order).index_copy_(0, order, chunk)
