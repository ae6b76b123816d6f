"""Device functions that several kernels share: raw logits, what follows them, program order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """``tanh x`` by ``exp`` of a number that is never positive."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def transform(x, scale, soft_cap):
    """``s = g(x)``: ``scale·x``, or ``soft_cap·tanh(scale·x / soft_cap)``."""
    if soft_cap is not None:
        return soft_cap * tanh(x * (scale / soft_cap))
    else:
        return x * scale


@triton.jit
def slope(s, scale, soft_cap):
    """``g'(x)`` in terms of ``s = g(x)``: ``scale·(1 - (s / soft_cap)²)``."""
    if soft_cap is not None:
        ratio = s / soft_cap
        return scale * (1.0 - ratio * ratio)
    else:
        return tl.zeros_like(s) + scale


@triton.jit
def raw_logits(
    hidden,
    weight,
    bias,
    position,
    item,
    width,
    stride_hidden,
    stride_weight,
    EVEN_WIDTH: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """``x = h_t·w_j + b_j``, fp32 ``[BLOCK_POSITIONS, BLOCK_COLUMNS]``, rows gathered by index.

    ``position`` and ``item`` are int64, so that a row's offset does not wrap past 2^31 elements;
    lanes beyond the end hold 0 and are masked by the caller.
    """
    x = tl.zeros([BLOCK_POSITIONS, BLOCK_COLUMNS], tl.float32)
    lane = tl.arange(0, BLOCK_WIDTH)
    hidden_rows = hidden + position[:, None] * stride_hidden + lane[None, :]
    weight_rows = weight + item[None, :] * stride_weight + lane[:, None]
    for start in range(0, width, BLOCK_WIDTH):
        if EVEN_WIDTH:
            h = tl.load(hidden_rows + start)
            w = tl.load(weight_rows + start)
        else:
            inside = lane + start < width
            h = tl.load(hidden_rows + start, mask=inside[None, :], other=0.0)
            w = tl.load(weight_rows + start, mask=inside[:, None], other=0.0)
        x = tl.dot(h, w, x, input_precision="ieee")
    if bias is not None:
        x += tl.load(bias + item).to(tl.float32)[None, :]
    return x


@triton.jit
def grouped(program, num_rows, num_columns):
    """(row, column) of a program, ``GROUP`` rows of tiles at a time, so that what programs in
    flight read is a few rows and a few columns of tiles and stays in the cache."""
    GROUP: tl.constexpr = 8  # pyright: ignore[reportAssignmentType]
    group = program // (GROUP * num_columns)
    first = group * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    within = program % (GROUP * num_columns)
    return first + within % height, within // height
