"""Top-K of the catalogue by inner product, a tile of classes at a time."""

from __future__ import annotations

import torch

from sce_lm.ops.dispatch import Backend, kernels
from sce_lm.ops.head import Head
from sce_lm.ops.static_shapes import needs_static_shapes

TILE_ELEMENTS = 2**23
"""Scores held at a time (32 MiB in fp32)."""


def catalogue_topk(
    queries: torch.Tensor,
    head: Head,
    size: int,
    *,
    excluded: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """The ``size`` classes with the largest raw logit ``q·w_j + b_j`` for each query.

    Args:
        queries: ``[Q, d]``; ``[Q, d + r]`` for a head with a low-rank operand.
        head: the output head; its transform of the logits takes no part.
        size: K; at most V minus the excluded classes.
        excluded: ``[E]`` int64 ids that no query may take.
        backend: :data:`~sce_lm.ops.dispatch.Backend`.

    Returns:
        ``[Q, K]`` int64 ids, ascending in each row.

    Raises:
        ValueError: backend "triton", and it cannot run.
    """
    run = kernels("catalogue_topk", backend, queries.device, head, queries)
    if run is not None:
        return run(queries, head, size, excluded=excluded)
    weight, low_rank, bias = head.tensors
    vocab_size, num_queries = weight.shape[0], queries.shape[0]
    tile = max(size, TILE_ELEMENTS // num_queries)
    q, q_low = queries[:, : weight.shape[1]].to(weight.dtype), queries[:, weight.shape[1] :]
    scores = torch.empty(num_queries, 0, device=weight.device)
    ids = torch.empty(num_queries, 0, dtype=torch.int64, device=weight.device)
    offset = None
    if excluded is not None and needs_static_shapes(weight.device):
        offset = torch.zeros(vocab_size, device=weight.device)
        offset.index_fill_(0, excluded, -torch.inf)
    for start in range(0, vocab_size, tile):
        stop = min(start + tile, vocab_size)
        s = (q @ weight[start:stop].T).float()
        if low_rank is not None:
            s += q_low.to(low_rank.dtype) @ low_rank[start:stop].T
        if bias is not None:
            s += bias[start:stop]
        if offset is not None:
            s += offset[start:stop]
        elif excluded is not None:
            here = excluded[(excluded >= start) & (excluded < stop)]
            s[:, here - start] = -torch.inf
        top = torch.topk(s, min(size, stop - start), dim=1, sorted=False)
        scores, ids = torch.cat([scores, top.values], 1), torch.cat([ids, top.indices + start], 1)
        if start:
            keep = torch.topk(scores, size, dim=1, sorted=False).indices
            scores, ids = scores.gather(1, keep), ids.gather(1, keep)
    return ids.sort(dim=1).values
