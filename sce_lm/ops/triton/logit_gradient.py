r"""Gradient with respect to a list's raw logits, for a few of its columns at a time.

The logits are computed again, a tile on chip, and leave as

    G_tj = r_t · ( exp(s_tj + c_j - log Zhat_t)·g'(x_tj)  -  exp(c_j)·pull_t )

with ``r_t`` the weight of the position's loss, and ``pull_t = e0·g'(m)/Zhat`` for the control
variate's tail (0 elsewhere). A position whose control variate was clamped takes its tail with
``c = 0``. The label's column is 0, because its gradient has other terms and goes another way.

Of the whole catalogue no label is left out, and the loss may be any of what is read off logits
(:class:`sce_lm.ops.logit_stream.LogitGradient`):

    G_tj = ( p_tj (r_t + b_t log p_tj) + c_t + sum_k [ids_tk = j] e_tk )·g'(x_tj)

G is a workspace in the dtype of the operands of the two products that read it; in it, row i is the
i-th position of the list's order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.triton.candidate_lists import CandidateList, positions_of_tile
from sce_lm.ops.triton.configurations import configuration
from sce_lm.ops.triton.logit_math import grouped, raw_logits, slope, transform


class LossGradient(NamedTuple):
    """What the gradient of each position's loss needs beside the logits; ``[N]`` tensors."""

    log_partition: torch.Tensor
    """fp32 log Zhat."""
    ratio: torch.Tensor
    """fp32 r."""
    pull: torch.Tensor | None = None
    """fp32, with a control variate."""
    clamped: torch.Tensor | None = None
    """int8, with a control variate and a soft cap."""
    log_ratio: torch.Tensor | None = None
    """fp32 b."""
    constant: torch.Tensor | None = None
    """fp32 c."""
    ids: torch.Tensor | None = None
    """``[N, K]`` int64, contiguous, perhaps repeated."""
    at_ids: torch.Tensor | None = None
    """``[N, K]`` fp32, contiguous: e."""


@triton.jit
def logit_gradient_kernel(
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
    log_partition,
    ratio,
    pull,
    clamped,
    log_ratio,
    constant,
    single,
    at_single,
    out,
    num_positions,
    first_column,
    end_column,
    num_columns,
    num_tiles,
    num_column_tiles,
    width,
    stride_hidden,
    stride_weight,
    stride_out,
    scale,
    soft_cap,
    num_single,
    EVEN_WIDTH: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    tile, column_tile = grouped(tl.program_id(0), num_tiles, num_column_tiles)
    segment, end, place, position = positions_of_tile(
        order, bounds, tile_segment, tile_start, tile, num_positions, BLOCK_POSITIONS
    )
    is_position = place < end
    if tl.max(is_position.to(tl.int32), axis=0) == 0:
        return
    column = first_column + column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column = column < end_column
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
    t = s - tl.load(log_partition + position)[:, None]
    if log_weights is not None:
        if weight_row is not None:
            row = tl.load(weight_row + position)[:, None]
        else:
            row = tl.zeros_like(position)[:, None] + segment
        c = tl.load(log_weights + row * num_columns + column[None, :], mask=present, other=0.0)
        present &= c > float("-inf")
        if clamped is not None:
            c = tl.where(tl.load(clamped + position)[:, None] != 0, 0.0, c)
        t += c
    # A masked lane's exponent may be anything: it must not overflow before it is dropped.
    gradient = tl.exp(tl.where(present, t, float("-inf")))
    r = tl.load(ratio + position)[:, None]
    if log_ratio is not None:
        # exp is 0 below -1e4, and 0 times -inf is not.
        gradient *= r + tl.load(log_ratio + position)[:, None] * tl.maximum(t, -1e4)
    else:
        gradient *= r
    if constant is not None:
        gradient += tl.load(constant + position)[:, None]
    if single is not None:
        for k in range(num_single):
            at = position * num_single + k
            is_single = tl.load(single + at).to(tl.int32)[:, None] == item.to(tl.int32)[None, :]
            gradient += tl.where(is_single, tl.load(at_single + at)[:, None], 0.0)
    gradient *= slope(s, scale, soft_cap)
    if pull is not None:
        gradient -= tl.exp(c) * tl.load(pull + position)[:, None] * r
    if labels is not None:
        label = tl.load(labels + position).to(tl.int32)
        is_label = label[:, None] == item.to(tl.int32)[None, :]
        present &= ~is_label
    gradient = tl.where(present, gradient, 0.0)
    # Columns past the end hold 0: the workspace is padded to whole tiles.
    at = place[:, None] * stride_out + (column - first_column)[None, :]
    tl.store(out + at, gradient.to(out.dtype.element_ty), mask=is_position[:, None])


def logit_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor | None,
    members: CandidateList,
    post: LogitTransform,
    columns: range,
    out: torch.Tensor,
    loss: LossGradient,
) -> None:
    """Fill ``out`` with the gradient at some columns of a list.

    Args:
        labels: ``[N]`` int64, whose columns are 0; None: no column is.
        columns: which columns.
        out: ``[N, C]`` workspace of the dtype of ``hidden``; C is at least the number of columns
            rounded up to a multiple of :func:`column_block`.
        loss: the loss as a function of the logits.
    """
    width = hidden.shape[1]
    blocks = configuration(_kind(members), hidden, weight)
    tiles = members.tiles(blocks.block_positions)
    column_tiles = triton.cdiv(len(columns), blocks.block_columns)
    blocks.launch(
        logit_gradient_kernel,
        (tiles.count * column_tiles,),
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
        loss.log_partition,
        loss.ratio,
        loss.pull if members.kind == "tail" else None,
        loss.clamped if members.kind == "tail" else None,
        loss.log_ratio,
        loss.constant,
        loss.ids,
        loss.at_ids,
        out,
        members.num_positions,
        columns.start,
        columns.stop,
        members.num_columns,
        tiles.count,
        column_tiles,
        width,
        hidden.stride(0),
        weight.stride(0),
        out.stride(0),
        post.scale,
        post.soft_cap,
        0 if loss.ids is None else loss.ids.shape[1],
        EVEN_WIDTH=width % blocks.block_width == 0,
    )


def column_block(members: CandidateList, *operands: torch.Tensor) -> int:
    """Columns of a tile: workspaces are padded to a multiple of it."""
    return configuration(_kind(members), *operands).block_columns


def _kind(members: CandidateList) -> str:
    return "logit_gradient" if members.log_weights is None else "logit_gradient_weighted"
