r"""Forward pass over one list: each position's sums over the list's columns.

A program holds a tile of positions and walks over some of the list's column tiles. Rows of W are
gathered by index inside the product; the logits of a tile live in registers and leave as sums that
are kept in range by a running maximum (online log-sum-exp):

    top   = max_j (s_tj + c_j)                      over columns j with c_j > -inf and j != y_t
    total = sum_j exp(s_tj + c_j - top)

For a tail with control variate also ``A0 = sum_j exp(c_j)`` and
``A1 = sum_j exp(c_j) x_tj`` and, where a soft cap makes a clamp possible,
``seen = sum_j exp(s_tj - top)``. Of the whole catalogue, where no label is left out, whatever else
is read off logits: the largest one and its class, the first one if several tie,
``moment = sum_j (s_tj - top) exp(s_tj - top)`` for means under the softmax, and ``sum_j s_tj``.

Each (split of the columns, position) is written by one program, so the result does not depend on
the order of programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.triton.candidate_lists import CandidateList, positions_of_tile
from sce_lm.ops.triton.configurations import configuration
from sce_lm.ops.triton.logit_math import grouped, raw_logits, transform

MAX_SPLITS = 64
"""Most programs that share a tile of positions: the columns are split among them."""


class ListSums(NamedTuple):
    """Sums of one list, ``[splits, N]`` each; None where they were not asked for."""

    top: torch.Tensor
    total: torch.Tensor
    a0: torch.Tensor | None = None
    a1: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    best: torch.Tensor | None = None
    """Largest logit."""
    best_item: torch.Tensor | None = None
    """int32, its class."""
    moment: torch.Tensor | None = None
    """sum_j (s_j - top) exp(s_j - top)."""
    logit_sum: torch.Tensor | None = None
    """sum_j s_j."""


@triton.jit
def forward_kernel(
    hidden,
    weight,
    bias,
    labels,
    ids,
    log_weights,
    weight_row,
    order,
    bounds,
    tile_segment,
    tile_start,
    top_out,
    total_out,
    a0_out,
    a1_out,
    seen_out,
    best_out,
    best_item_out,
    moment_out,
    logit_sum_out,
    num_positions,
    num_columns,
    num_tiles,
    num_splits,
    tiles_per_split,
    width,
    stride_hidden,
    stride_weight,
    scale,
    soft_cap,
    EVEN_WIDTH: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    tile, split = grouped(tl.program_id(0), num_tiles, num_splits)
    segment, end, place, position = positions_of_tile(
        order, bounds, tile_segment, tile_start, tile, num_positions, BLOCK_POSITIONS
    )
    is_position = place < end
    if tl.max(is_position.to(tl.int32), axis=0) == 0:
        return
    if labels is not None:
        label = tl.load(labels + position).to(tl.int32)

    top = tl.full([BLOCK_POSITIONS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_POSITIONS], tl.float32)
    a0 = tl.zeros([BLOCK_POSITIONS], tl.float32)
    a1 = tl.zeros([BLOCK_POSITIONS], tl.float32)
    seen = tl.zeros([BLOCK_POSITIONS], tl.float32)
    best = tl.full([BLOCK_POSITIONS], float("-inf"), tl.float32)
    best_item = tl.zeros([BLOCK_POSITIONS], tl.int32)
    moment = tl.zeros([BLOCK_POSITIONS], tl.float32)
    logit_sum = tl.zeros([BLOCK_POSITIONS], tl.float32)

    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(num_columns, BLOCK_COLUMNS))
    for column_tile in range(first, last):
        column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < num_columns
        if ids is not None:
            item = tl.load(ids + segment * num_columns + column, mask=is_column, other=0)
        else:
            item = tl.where(is_column, column, 0).to(tl.int64)
        x = raw_logits(
            hidden,
            weight,
            bias,
            position,
            item,
            width,
            stride_hidden,
            stride_weight,
            EVEN_WIDTH,
            BLOCK_POSITIONS,
            BLOCK_COLUMNS,
            BLOCK_WIDTH,
        )
        s = transform(x, scale, soft_cap)
        present = is_position[:, None] & is_column[None, :]
        t = s
        if log_weights is not None:
            if weight_row is not None:
                row = tl.load(weight_row + position)[:, None]
            else:
                row = tl.zeros_like(position)[:, None] + segment
            c = tl.load(log_weights + row * num_columns + column[None, :], mask=present, other=0.0)
            present &= c > float("-inf")
            t += c
        if best_out is not None:
            in_tile, where = tl.max(tl.where(present, s, float("-inf")), 1, return_indices=True)
            better = in_tile > best
            best = tl.where(better, in_tile, best)
            best_item = tl.where(better, column_tile * BLOCK_COLUMNS + where, best_item)
        if logit_sum_out is not None:
            logit_sum += tl.sum(tl.where(present, s, 0.0), axis=1)
        if labels is not None:
            present &= label[:, None] != item.to(tl.int32)[None, :]

        t = tl.where(present, t, float("-inf"))
        new_top = tl.maximum(top, tl.max(t, axis=1))
        shift = tl.where(new_top > float("-inf"), new_top, 0.0)
        shrink = tl.exp(top - shift)
        e = tl.exp(t - shift[:, None])
        if moment_out is not None:
            # exp is 0 below -1e4, and 0 times -inf is not.
            moment = (moment + tl.maximum(top - shift, -1e4) * total) * shrink
            moment += tl.sum(e * tl.maximum(t - shift[:, None], -1e4), axis=1)
        total = total * shrink + tl.sum(e, axis=1)
        top = new_top
        if a0_out is not None:
            inverse = tl.where(present, tl.exp(c), 0.0)
            a0 += tl.sum(inverse, axis=1)
            a1 += tl.sum(inverse * x, axis=1)
        if seen_out is not None:
            e = tl.where(present, tl.exp(s - shift[:, None]), 0.0)
            seen = seen * shrink + tl.sum(e, axis=1)

    at = split.to(tl.int64) * num_positions + position
    tl.store(top_out + at, top, mask=is_position)
    tl.store(total_out + at, total, mask=is_position)
    if a0_out is not None:
        tl.store(a0_out + at, a0, mask=is_position)
        tl.store(a1_out + at, a1, mask=is_position)
    if seen_out is not None:
        tl.store(seen_out + at, seen, mask=is_position)
    if best_out is not None:
        tl.store(best_out + at, best, mask=is_position)
        tl.store(best_item_out + at, best_item, mask=is_position)
    if moment_out is not None:
        tl.store(moment_out + at, moment, mask=is_position)
    if logit_sum_out is not None:
        tl.store(logit_sum_out + at, logit_sum, mask=is_position)


def list_sums(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor | None,
    members: CandidateList,
    post: LogitTransform,
    *,
    control: bool = False,
    best: bool = False,
    moment: bool = False,
    logit_sum: bool = False,
) -> ListSums:
    """Launch the kernel on one list.

    Args:
        hidden: ``[N, d]``; weight: ``[V, d]`` of the same dtype; both with unit stride along d.
        bias: ``[V]`` or None.
        labels: ``[N]`` int64, whose columns are left out; None: no column is.
        control: also what the control variate needs of this list.
        best: also the largest logit and its class.
        moment, logit_sum: also these.
    """
    num_positions, width = hidden.shape
    blocks = configuration(_kind(members), hidden, weight)
    tiles = members.tiles(blocks.block_positions)
    column_tiles = triton.cdiv(members.num_columns, blocks.block_columns)
    tiles_per_split = max(1, triton.cdiv(column_tiles, MAX_SPLITS))
    splits = max(1, triton.cdiv(column_tiles, tiles_per_split))

    def new(wanted: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        return hidden.new_empty(splits, num_positions, dtype=dtype) if wanted else None

    of_tail = control and members.kind == "tail"
    sums = ListSums(
        hidden.new_empty(splits, num_positions, dtype=torch.float32),
        hidden.new_empty(splits, num_positions, dtype=torch.float32),
        a0=new(of_tail),
        a1=new(of_tail),
        seen=new(of_tail and post.soft_cap is not None),
        best=new(best),
        best_item=new(best, torch.int32),
        moment=new(moment),
        logit_sum=new(logit_sum),
    )
    blocks.launch(
        forward_kernel,
        (tiles.count * splits,),
        hidden,
        weight,
        bias,
        labels,
        members.ids,
        members.log_weights,
        members.weight_row,
        members.order,
        members.bounds,
        tiles.segment,
        tiles.start,
        *sums,
        num_positions,
        members.num_columns,
        tiles.count,
        splits,
        tiles_per_split,
        width,
        hidden.stride(0),
        weight.stride(0),
        post.scale,
        post.soft_cap,
        EVEN_WIDTH=width % blocks.block_width == 0,
    )
    return sums


def _kind(members: CandidateList) -> str:
    return "forward" if members.log_weights is None else "forward_weighted"
