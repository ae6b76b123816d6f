"""Inner product of each position with one row of a table: label logits, and mean logits.

x_t = h_t · rows[index_t] + bias[index_t]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sce_lm.ops.triton.configurations import configuration


@triton.jit
def row_dot_kernel(
    hidden,
    rows,
    bias,
    index,
    out,
    num_positions,
    width,
    stride_hidden,
    stride_rows,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    is_position = position < num_positions
    row = tl.load(index + position, mask=is_position, other=0)
    lane = tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_POSITIONS, BLOCK_WIDTH], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        inside = is_position[:, None] & (lane + start < width)[None, :]
        at = start + lane[None, :]
        h = tl.load(hidden + position[:, None] * stride_hidden + at, mask=inside, other=0.0)
        r = tl.load(rows + row[:, None] * stride_rows + at, mask=inside, other=0.0)
        total += h.to(tl.float32) * r.to(tl.float32)
    x = tl.sum(total, axis=1)
    if bias is not None:
        x += tl.load(bias + row, mask=is_position, other=0.0).to(tl.float32)
    tl.store(out + position, x, mask=is_position)


def row_dot(
    hidden: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``[N]`` fp32 inner products.

    Args:
        hidden: ``[N, d]``.
        rows: ``[R, d]`` of any dtype; both with unit stride along d.
        index: ``[N]`` int64 rows.
        bias: ``[R]``, added to each product.
    """
    num_positions, width = hidden.shape
    blocks = configuration("row_dot", hidden)
    out = hidden.new_empty(num_positions, dtype=torch.float32)
    blocks.launch(
        row_dot_kernel,
        (triton.cdiv(num_positions, blocks.block_positions),),
        hidden,
        rows,
        bias,
        index,
        out,
        num_positions,
        width,
        hidden.stride(0),
        rows.stride(0),
    )
    return out
