"""Locality-sensitive hashing by random directions, and chunks of equal size along the hash."""

from __future__ import annotations

from collections.abc import Sequence

import torch

TILE_ELEMENTS = 2**23
"""Scores held at a time (32 MiB in fp32)."""


def hash_chunks(
    vectors: Sequence[torch.Tensor],
    directions: torch.Tensor,
    count: int,
    kept: torch.Tensor | slice = slice(None),
    elsewhere: int = -1,
) -> torch.Tensor:
    """Sort vectors by their nearest direction and cut the order into equal chunks.

    Args:
        vectors: ``[M, d]``, as one tensor or more whose columns stand side by side.
        directions: ``[n_b, d]``; a vector's hash is the direction of its largest inner product.
        count: chunks; at most M.
        kept: which vectors are sorted and cut.
        elsewhere: the chunk of the others.

    Returns:
        ``[M]`` int64, the chunk of each vector; sizes differ by at most 1.
    """
    tile = max(1, TILE_ELEMENTS // len(directions))
    by_part = directions.split([part.shape[1] for part in vectors], dim=1)
    nearest = []
    for tiles in zip(*(part.split(tile) for part in vectors)):
        products = (part.to(d.dtype) @ d.T for part, d in zip(tiles, by_part))
        nearest.append(sum(products, torch.zeros((), device=directions.device)).argmax(dim=1))
    hashes = torch.cat(nearest)
    order = torch.argsort(hashes[kept], stable=True)
    chunk = torch.arange(len(order), device=order.device) * count // len(order)
    chunks = torch.full_like(hashes, elsewhere)
    chunks[kept] = torch.empty_like(order).index_copy_(0, order, chunk)
    return chunks
