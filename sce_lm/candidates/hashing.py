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
    is_valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sort vectors by their nearest direction and cut the order into equal chunks.

    Args:
        vectors: ``[M, d]``, as one tensor or more whose columns stand side by side.
        directions: ``[n_b, d]``; a vector's hash is the direction of its largest inner product.
        count: chunks; at most M.
        kept: which vectors are sorted and cut.
        elsewhere: the chunk of the others.
        is_valid: ``[M]`` bool: which vectors are cut, where shapes are static; the others go
            into the last chunk. None: all are.

    Returns:
        ``[M]`` int64, the chunk of each vector; sizes differ by at most 1, and place k of n in the
        order is in chunk ``k·count // n``.
    """
    tile = max(1, TILE_ELEMENTS // len(directions))
    by_part = directions.split([part.shape[1] for part in vectors], dim=1)
    nearest = []
    for tiles in zip(*(part.split(tile) for part in vectors)):
        products = (part.to(d.dtype) @ d.T for part, d in zip(tiles, by_part))
        nearest.append(sum(products, torch.zeros((), device=directions.device)).argmax(dim=1))
    hashes = torch.cat(nearest)
    if is_valid is not None:
        hashes = hashes.masked_fill(~is_valid, len(directions))
    order = torch.argsort(hashes[kept], stable=True)
    num_cut = len(order) if is_valid is None else is_valid.sum().clamp_min_(1)
    place = torch.arange(len(order), device=order.device)
    chunk = (place * count // num_cut).clamp_max_(count - 1)
    chunks = torch.full_like(hashes, elsewhere)
    chunks[kept] = torch.empty_like(order).index_copy_(0, order, chunk)
    return chunks
