r"""Exact top-K of the catalogue for a few queries, without their ``[Q, V]`` scores.

Cut the catalogue into groups of ``GROUP_SIZE`` neighbouring classes. The K best classes of a query
lie in the K groups with the largest maxima: a class outside them is beaten by the best class of
each of these K. So a first pass over W keeps, of the scores that it makes on chip, each group's
maximum (``V / GROUP_SIZE`` numbers a query); K groups are chosen; and a second pass writes the
scores of the chosen groups alone, each to the place that its group's rank gives it. The K best of
those ``K·GROUP_SIZE`` are the answer, whatever the ties, with every output written by one program.
A tile of the second pass in which no query has chosen a group is left out before its product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sce_lm.ops.head import Head
from sce_lm.ops.triton.configurations import configuration
from sce_lm.ops.triton.logit_math import grouped, raw_logits
from sce_lm.ops.triton.supported import contiguous, products_supported

GROUP_SIZE = 16
"""Classes of a group."""


@triton.jit
def catalogue_scan_kernel(
    queries,
    weight,
    bias,
    is_excluded,
    rank,
    out,
    num_queries,
    vocab_size,
    num_groups,
    num_ranks,
    num_query_tiles,
    num_class_tiles,
    width,
    stride_queries,
    stride_weight,
    GROUP_SIZE: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    tile, class_tile = grouped(tl.program_id(0), num_query_tiles, num_class_tiles)
    query = tile.to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    is_query = query < num_queries
    GROUPS: tl.constexpr = BLOCK_COLUMNS // GROUP_SIZE
    group = class_tile * GROUPS + tl.arange(0, GROUPS)
    is_group = is_query[:, None] & (group < num_groups)[None, :]
    if rank is not None:
        place = tl.load(
            rank + query[:, None] * num_groups + group[None, :], mask=is_group, other=-1
        )
        highest = tl.max(tl.max(place, axis=1), axis=0)
        if highest < 0:  # pyright: ignore[reportOperatorIssue]
            return
    item = class_tile.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_item = item < vocab_size
    item = tl.where(is_item, item, 0)
    x = raw_logits(
        queries,
        weight,
        bias,
        tl.where(is_query, query, 0),
        item,
        width,
        stride_queries,
        stride_weight,
        EVEN_WIDTH,
        BLOCK_POSITIONS,
        BLOCK_COLUMNS,
        BLOCK_WIDTH,
    )
    if is_excluded is not None:
        is_item &= tl.load(is_excluded + item) == 0
    x = tl.where(is_item[None, :], x, float("-inf"))
    x = tl.reshape(x, [BLOCK_POSITIONS, GROUPS, GROUP_SIZE])
    if rank is not None:
        lane = tl.arange(0, GROUP_SIZE)
        at = (query[:, None] * num_ranks + place)[:, :, None] * GROUP_SIZE + lane[None, None, :]
        chosen = tl.broadcast_to(tl.expand_dims(place >= 0, 2), x.shape)
        tl.store(out + at, x, mask=chosen)
    else:
        best = tl.max(x, axis=2)
        tl.store(out + query[:, None] * num_groups + group[None, :], best, mask=is_group)


def catalogue_topk_supported(head: Head, queries: Tensor) -> str | None:
    """Why the kernels cannot take these inputs; None if they can. Queries are cast."""
    return products_supported(head, queries.to(head.weight.dtype))


def catalogue_topk(
    queries: Tensor, head: Head, size: int, *, excluded: Tensor | None = None
) -> Tensor:
    """As :func:`sce_lm.ops.catalogue_scan.catalogue_topk`; scores are kept in fp32."""
    return _topk(queries, head.weight, *contiguous(head.bias, excluded), size)


@torch.library.custom_op("sce_lm::catalogue_topk", mutates_args=())
def _topk(
    queries: Tensor, weight: Tensor, bias: Tensor | None, excluded: Tensor | None, size: int
) -> Tensor:
    queries = queries.to(weight.dtype).contiguous()
    num_groups = triton.cdiv(len(weight), GROUP_SIZE)
    is_excluded = None
    if excluded is not None and len(excluded):
        is_excluded = torch.zeros(len(weight), dtype=torch.int8, device=weight.device)
        is_excluded.index_fill_(0, excluded, 1)

    maxima = queries.new_empty(len(queries), num_groups, dtype=torch.float32)
    _scan(queries, weight, bias, is_excluded, None, maxima)
    ranks = min(size, num_groups)
    chosen = torch.topk(maxima, ranks, dim=1, sorted=False).indices
    rank = torch.full(maxima.shape, -1, dtype=torch.int32, device=weight.device)
    every = torch.arange(ranks, dtype=torch.int32, device=weight.device)
    rank.scatter_(1, chosen, every.expand_as(chosen))

    scores = queries.new_empty(len(queries), ranks * GROUP_SIZE, dtype=torch.float32)
    _scan(queries, weight, bias, is_excluded, rank, scores)
    best = torch.topk(scores, size, dim=1, sorted=False).indices
    group = chosen.gather(1, best // GROUP_SIZE)
    return (group * GROUP_SIZE + best % GROUP_SIZE).sort(dim=1).values


@_topk.register_fake
def _(queries, weight, bias, excluded, size):
    return queries.new_empty(len(queries), size, dtype=torch.int64)


def _scan(queries, weight, bias, is_excluded, rank, out) -> None:
    """Group maxima into ``[Q, G]``, or with ``rank [Q, G]`` scores into ``[Q, R·GROUP_SIZE]``."""
    width = queries.shape[1]
    blocks = configuration("catalogue_scan", queries, weight)
    query_tiles = triton.cdiv(len(queries), blocks.block_positions)
    class_tiles = triton.cdiv(len(weight), blocks.block_columns)
    blocks.launch(
        catalogue_scan_kernel,
        (query_tiles * class_tiles,),
        queries,
        weight,
        bias,
        is_excluded,
        rank,
        out,
        len(queries),
        len(weight),
        triton.cdiv(len(weight), GROUP_SIZE),
        out.shape[1] // GROUP_SIZE,
        query_tiles,
        class_tiles,
        width,
        queries.stride(0),
        weight.stride(0),
        GROUP_SIZE=GROUP_SIZE,
        EVEN_WIDTH=width % blocks.block_width == 0,
    )
