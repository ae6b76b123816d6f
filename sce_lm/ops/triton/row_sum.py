"""Weighted sums of gathered rows, segment by segment: ``out_k = sum_i f_i · rows[index_i]``.

A program owns a segment and a piece of the width and walks over the segment's entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sce_lm.ops.triton.configurations import configuration


@triton.jit
def row_sum_kernel(
    rows,
    index,
    bounds,
    coefficient,
    out,
    num_width_tiles,
    width,
    stride_rows,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    segment = (tl.program_id(0) // num_width_tiles).to(tl.int64)
    start = tl.load(bounds + segment)
    end = tl.load(bounds + segment + 1)
    lane = tl.program_id(0) % num_width_tiles * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    is_lane = lane < width
    total = tl.zeros([BLOCK_WIDTH], tl.float32)
    for entry_start in range(start, end, BLOCK_COLUMNS):
        entry = entry_start + tl.arange(0, BLOCK_COLUMNS)
        is_entry = entry < end
        row = tl.load(index + entry, mask=is_entry, other=0)
        r = tl.load(
            rows + row[:, None] * stride_rows + lane[None, :],
            mask=is_entry[:, None] & is_lane[None, :],
            other=0.0,
        ).to(tl.float32)
        if coefficient is not None:
            r *= tl.load(coefficient + row, mask=is_entry, other=0.0)[:, None]
        total += tl.sum(r, axis=0)
    tl.store(out + segment * width + lane, total, mask=is_lane)


def row_sum(
    rows: torch.Tensor,
    index: torch.Tensor,
    bounds: torch.Tensor,
    coefficient: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[L, d]`` fp32.

    Args:
        rows: ``[R, d]`` with unit stride along d.
        index: ``[E]`` int64 rows, segment after segment.
        bounds: ``[L + 1]`` int64: where segments start in ``index``.
        coefficient: ``[R]`` fp32, one a row; None: 1.
    """
    width, segments = rows.shape[1], len(bounds) - 1
    blocks = configuration("row_sum", rows)
    out = rows.new_empty(segments, width, dtype=torch.float32)
    width_tiles = triton.cdiv(width, blocks.block_width)
    blocks.launch(
        row_sum_kernel,
        (width_tiles * segments,),
        rows,
        index,
        bounds,
        coefficient,
        out,
        width_tiles,
        width,
        rows.stride(0),
    )
    return out
