r"""Gradient of a list's rows of W from its logit gradient: ``slot_j = sum_t G_tj·h_t``.

A program owns a tile of one segment's columns and a piece of the width, and walks over the
segment's positions, so every slot is written once, summed in fp32. What the control variate's mean
passes to every row except the list's own is taken off here: ``slot_j -= offset_k``. The gradient of
the bias is the sum of G over positions; the program with the first piece of the width writes it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sce_lm.ops.triton.candidate_lists import CandidateList
from sce_lm.ops.triton.configurations import configuration


class RowTarget(NamedTuple):
    """Where a list's slots go; slot ``k·K + j`` is column j of segment k."""

    rows: torch.Tensor
    """``[L·K, d]`` contiguous."""
    bias: torch.Tensor | None = None
    """``[L·K]``; None: no gradient of a bias."""
    offset: torch.Tensor | None = None
    """``[L, d]`` fp32, taken off each slot of a segment."""
    bias_offset: torch.Tensor | None = None
    """``[L]`` fp32."""
    factor: torch.Tensor | None = None
    """0-dim fp32 on the results; None: 1."""


@triton.jit
def row_gradient_kernel(
    gradient,
    hidden,
    order,
    bounds,
    offset,
    bias_offset,
    factor,
    out,
    bias_out,
    num_positions,
    first_column,
    end_column,
    num_columns,
    num_column_tiles,
    num_width_tiles,
    width,
    stride_gradient,
    stride_hidden,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    width_tile = tl.program_id(0) % num_width_tiles
    tile = tl.program_id(0) // num_width_tiles
    segment = (tile // num_column_tiles).to(tl.int64)
    start = segment * 0
    end = start + num_positions
    if bounds is not None:
        start = tl.load(bounds + segment)
        end = tl.load(bounds + segment + 1)
    local = tile % num_column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column = first_column + local
    is_column = column < end_column
    lane = width_tile * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    is_lane = lane < width

    total = tl.zeros([BLOCK_COLUMNS, BLOCK_WIDTH], tl.float32)
    for place_start in range(start, end, BLOCK_POSITIONS):
        place = place_start + tl.arange(0, BLOCK_POSITIONS)
        is_position = place < end
        if order is not None:
            position = tl.load(order + place, mask=is_position, other=0)
        else:
            position = tl.where(is_position, place, 0)
        g = tl.load(
            gradient + place[None, :] * stride_gradient + local[:, None],
            mask=is_position[None, :] & is_column[:, None],
            other=0.0,
        )
        h = tl.load(
            hidden + position[:, None] * stride_hidden + lane[None, :],
            mask=is_lane[None, :],
            other=0.0,
        )
        total = tl.dot(g, h, total, input_precision="ieee")

    scale = 1.0
    if factor is not None:
        scale = tl.load(factor)
    slot = segment * num_columns + column
    if offset is not None:
        total -= tl.load(offset + segment * width + lane, mask=is_lane, other=0.0)[None, :]
    total *= scale
    tl.store(
        out + slot[:, None] * width + lane[None, :],
        total.to(out.dtype.element_ty),
        mask=is_column[:, None] & is_lane[None, :],
    )
    if bias_out is not None:  # noqa: SIM102
        if width_tile == 0:
            count = tl.zeros([BLOCK_COLUMNS], tl.float32)
            for place_start in range(start, end, BLOCK_POSITIONS):
                place = place_start + tl.arange(0, BLOCK_POSITIONS)
                g = tl.load(
                    gradient + place[None, :] * stride_gradient + local[:, None],
                    mask=(place < end)[None, :] & is_column[:, None],
                    other=0.0,
                )
                count += tl.sum(g.to(tl.float32), axis=1)
            if bias_offset is not None:
                count -= tl.load(bias_offset + segment)
            count *= scale
            tl.store(bias_out + slot, count.to(bias_out.dtype.element_ty), mask=is_column)


def row_gradient(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    members: CandidateList,
    columns: range,
    target: RowTarget,
) -> None:
    """Write the slots of some columns.

    Args:
        gradient: ``[N, C]``, from :func:`~sce_lm.ops.triton.logit_gradient.logit_gradient`.
        columns: the columns it holds.
    """
    width = hidden.shape[1]
    blocks = configuration("row_gradient", hidden)
    width_tiles = triton.cdiv(width, blocks.block_width)
    column_tiles = triton.cdiv(len(columns), blocks.block_columns)
    blocks.launch(
        row_gradient_kernel,
        (width_tiles * column_tiles * members.num_segments,),
        gradient,
        hidden,
        members.order,
        members.bounds,
        target.offset,
        target.bias_offset,
        target.factor,
        target.rows,
        target.bias,
        members.num_positions,
        columns.start,
        columns.stop,
        members.num_columns,
        column_tiles,
        width_tiles,
        width,
        gradient.stride(0),
        hidden.stride(0),
    )
