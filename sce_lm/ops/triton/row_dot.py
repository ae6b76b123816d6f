"""Inner product of each position with a row or a few of a table: label logits, and mean logits.

x_tk = h_t · rows[index_tk] + bias[index_tk]
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
    num_products,
    num_each,
    width,
    stride_hidden,
    stride_rows,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    product = tl.program_id(0).to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    is_product = product < num_products
    position = product // num_each
    row = tl.load(index + product, mask=is_product, other=0)
    lane = tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros([BLOCK_POSITIONS, BLOCK_WIDTH], tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        inside = is_product[:, None] & (lane + start < width)[None, :]
        at = start + lane[None, :]
        h = tl.load(hidden + position[:, None] * stride_hidden + at, mask=inside, other=0.0)
        r = tl.load(rows + row[:, None] * stride_rows + at, mask=inside, other=0.0)
        total += h.to(tl.float32) * r.to(tl.float32)
    x = tl.sum(total, axis=1)
    if bias is not None:
        x += tl.load(bias + row, mask=is_product, other=0.0).to(tl.float32)
    tl.store(out + product, x, mask=is_product)


def row_dot(
    hidden: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``[N]`` or ``[N, K]`` fp32 inner products, as the index.

    Args:
        hidden: ``[N, d]``.
        rows: ``[R, d]`` of any dtype; both with unit stride along d.
        index: ``[N]`` or ``[N, K]`` int64 rows, contiguous, not empty.
        bias: ``[R]``, added to each product.
    """
    width = hidden.shape[1]
    blocks = configuration("row_dot", hidden)
    out = torch.empty_like(index, dtype=torch.float32)
    blocks.launch(
        row_dot_kernel,
        (triton.cdiv(index.numel(), blocks.block_positions),),
        hidden,
        rows,
        bias,
        index,
        out,
        index.numel(),
        index.numel() // len(index),
        width,
        hidden.stride(0),
        rows.stride(0),
    )
    return out
