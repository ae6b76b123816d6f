r"""Gradient of the hidden states from a list's logit gradient: ``dH_t += sum_j G_tj·W_j``.

A program owns a tile of positions and a piece of the width, and walks over the columns, so every
element is written once a launch. Several launches (lists, pieces of a long list) follow one another
in a fp32 accumulator; the first starts it from the terms that belong to no list,

    label_t · W_{y_t}  +  mean_t · M_{k(t)}              (label, mean row of the control variate)

and the last multiplies by ``factor`` and writes the result in its own dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sce_lm.ops.triton.candidate_lists import CandidateList, positions_of_tile
from sce_lm.ops.triton.configurations import configuration


class RowTerm(NamedTuple):
    """``coefficient_t · rows[index_t]``, added to a position's gradient."""

    coefficient: torch.Tensor
    """``[N]`` fp32."""
    rows: torch.Tensor
    """``[R, d]``."""
    index: torch.Tensor
    """``[N]`` int64."""


NO_TERM = (None, None, None)


@triton.jit
def hidden_gradient_kernel(
    gradient,
    weight,
    ids,
    order,
    bounds,
    tile_segment,
    tile_start,
    label_coefficient,
    label_rows,
    label_index,
    mean_coefficient,
    mean_rows,
    mean_index,
    sums,
    factor,
    out,
    num_positions,
    first_column,
    end_column,
    num_columns,
    num_width_tiles,
    width,
    stride_gradient,
    stride_weight,
    stride_mean,
    IS_FIRST: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    tile = tl.program_id(0) // num_width_tiles
    segment, end, place, position = positions_of_tile(
        order, bounds, tile_segment, tile_start, tile, num_positions, BLOCK_POSITIONS
    )
    is_position = place < end
    if tl.max(is_position.to(tl.int32), axis=0) == 0:
        return
    lane = tl.program_id(0) % num_width_tiles * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    is_lane = lane < width
    inside = is_position[:, None] & is_lane[None, :]
    at = position[:, None] * width + lane[None, :]

    total = tl.zeros([BLOCK_POSITIONS, BLOCK_WIDTH], tl.float32)
    for column_start in range(first_column, end_column, BLOCK_COLUMNS):
        column = column_start + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < end_column
        if ids is not None:
            item = tl.load(ids + segment * num_columns + column, mask=is_column, other=0)
        else:
            item = tl.where(is_column, column, 0).to(tl.int64)
        g = tl.load(
            gradient + place[:, None] * stride_gradient + (column - first_column)[None, :],
            mask=is_position[:, None] & is_column[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + item[:, None] * stride_weight + lane[None, :],
            mask=is_lane[None, :],
            other=0.0,
        )
        total = tl.dot(g, w, total, input_precision="ieee")

    if IS_FIRST:
        if label_coefficient is not None:
            row = tl.load(label_index + position)
            w = tl.load(label_rows + row[:, None] * stride_weight + lane[None, :], mask=inside)
            total += tl.load(label_coefficient + position)[:, None] * w.to(tl.float32)
        if mean_coefficient is not None:
            row = tl.load(mean_index + position)
            m = tl.load(mean_rows + row[:, None] * stride_mean + lane[None, :], mask=inside)
            total += tl.load(mean_coefficient + position)[:, None] * m.to(tl.float32)
    else:
        total += tl.load(sums + at, mask=inside, other=0.0)
    if IS_LAST:
        total *= tl.load(factor)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(sums + at, total, mask=inside)


def hidden_gradient(
    gradient: torch.Tensor,
    weight: torch.Tensor,
    members: CandidateList,
    columns: range,
    sums: torch.Tensor | None,
    factor: torch.Tensor,
    out: torch.Tensor,
    *,
    label: RowTerm | None = None,
    mean: RowTerm | None = None,
    is_first: bool,
    is_last: bool,
) -> None:
    """Add a piece of a list to the gradient of the hidden states.

    Args:
        gradient: ``[N, C]``, from :func:`~sce_lm.ops.triton.logit_gradient.logit_gradient`.
        columns: the columns it holds.
        sums: ``[N, d]`` fp32 accumulator; None if one launch is all.
        factor: 0-dim fp32, for the last launch.
        out: ``[N, d]``, written by the last launch.
        label, mean: terms for the first launch; ``label.rows`` is ``weight``.
    """
    width = weight.shape[1]
    blocks = configuration("hidden_gradient", weight)
    tiles = members.tiles(blocks.block_positions)
    width_tiles = triton.cdiv(width, blocks.block_width)
    blocks.launch(
        hidden_gradient_kernel,
        (width_tiles * tiles.count,),
        gradient,
        weight,
        members.ids,
        members.order,
        members.bounds,
        tiles.segment,
        tiles.start,
        *(label or NO_TERM),
        *(mean or NO_TERM),
        sums,
        factor,
        out,
        members.num_positions,
        columns.start,
        columns.stop,
        members.num_columns,
        width_tiles,
        width,
        gradient.stride(0),
        weight.stride(0),
        mean.rows.stride(0) if mean else 0,
        IS_FIRST=is_first,
        IS_LAST=is_last,
    )
