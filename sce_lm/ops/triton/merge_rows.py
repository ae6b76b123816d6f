r"""The gradient of each touched row of W, from all slots and labels that name it, written once.

    dW_u = factor · ( everywhere + sum_{slots with id u} slot + sum_{t: y_t = u} label_t·h_t )

Slots and positions are sorted by id beforehand, so a row is a segment of entries; the program of
its first entry sums it in the order of the sort: no atomics, and the same bits every time. An
entry below the number of slots is a slot, another is a position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sce_lm.ops.triton.configurations import configuration


class TouchedRows(NamedTuple):
    """Entries sorted by id."""

    entry: torch.Tensor
    """``[E]`` int64: a slot, or a position plus the number of slots."""
    ids: torch.Tensor
    """``[E]`` int64, sorted: their ids."""


def touched_rows(ids: list[torch.Tensor]) -> TouchedRows:
    """Sort what touches rows of W: slots by their ids, -1 for none, and last positions by their
    labels."""
    ordered = torch.sort(torch.cat(ids), stable=True)
    return TouchedRows(ordered.indices, ordered.values)


@triton.jit
def merge_rows_kernel(
    slots,
    bias_slots,
    label_coefficient,
    hidden,
    everywhere,
    bias_everywhere,
    factor,
    entry,
    ids,
    out,
    bias_out,
    num_slots,
    num_entries,
    width,
    stride_hidden,
    COMPACT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64)
    item = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if (item < 0) | (item == before):  # empty places, and what another program sums
        return
    end, found = first, first * 0 + BLOCK_COLUMNS
    while found == BLOCK_COLUMNS:
        place = end + tl.arange(0, BLOCK_COLUMNS)
        here = tl.load(ids + place, mask=place < num_entries, other=-1) == item
        found = tl.sum(here.to(tl.int64), axis=0)
        end += found
    row = item
    if COMPACT:
        row = first
    scale = tl.load(factor)
    for lane_start in range(0, width, BLOCK_WIDTH):
        lane = lane_start + tl.arange(0, BLOCK_WIDTH)
        is_lane = lane < width
        total = tl.zeros([BLOCK_WIDTH], tl.float32)
        if everywhere is not None:
            total += tl.load(everywhere + lane, mask=is_lane, other=0.0)
        for entry_start in range(first, end, BLOCK_COLUMNS):
            place = entry_start + tl.arange(0, BLOCK_COLUMNS)
            e = tl.load(entry + place, mask=place < end, other=0)
            is_slot = (place < end) & (e < num_slots)
            r = tl.load(
                slots + e[:, None] * width + lane[None, :],
                mask=is_slot[:, None] & is_lane[None, :],
                other=0.0,
            )
            is_label = (place < end) & (e >= num_slots)
            position = e - num_slots
            h = tl.load(
                hidden + position[:, None] * stride_hidden + lane[None, :],
                mask=is_label[:, None] & is_lane[None, :],
                other=0.0,
            )
            f = tl.load(label_coefficient + position, mask=is_label, other=0.0)
            r += f[:, None] * h.to(tl.float32)
            total += tl.sum(r, axis=0)
        tl.store(out + row * width + lane, (total * scale).to(out.dtype.element_ty), mask=is_lane)
    if bias_out is not None:
        b = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for entry_start in range(first, end, BLOCK_COLUMNS):
            place = entry_start + tl.arange(0, BLOCK_COLUMNS)
            e = tl.load(entry + place, mask=place < end, other=0)
            is_slot = (place < end) & (e < num_slots)
            b += tl.load(bias_slots + e, mask=is_slot, other=0.0)
            is_label = (place < end) & (e >= num_slots)
            b += tl.load(label_coefficient + e - num_slots, mask=is_label, other=0.0)
        total_bias = tl.sum(b, axis=0)
        if bias_everywhere is not None:
            total_bias += tl.load(bias_everywhere)
        tl.store(bias_out + item, (total_bias * scale).to(bias_out.dtype.element_ty))


def merge_rows(
    slots: torch.Tensor,
    touched: TouchedRows,
    hidden: torch.Tensor,
    label_coefficient: torch.Tensor,
    factor: torch.Tensor,
    out: torch.Tensor,
    *,
    bias_slots: torch.Tensor | None = None,
    bias_out: torch.Tensor | None = None,
    everywhere: torch.Tensor | None = None,
    bias_everywhere: torch.Tensor | None = None,
    compact: bool = False,
) -> None:
    """Write the touched rows of the gradient.

    Args:
        slots: ``[S, d]`` fp32.
        touched: from :func:`touched_rows`.
        label_coefficient: ``[N]`` fp32.
        factor: 0-dim fp32.
        out: ``[V, d]``; with ``compact`` ``[E, d]``, at the first entry of each id.
        bias_slots, bias_out: ``[S]`` fp32 and ``[V]``, if there is a bias.
        everywhere, bias_everywhere: ``[d]`` and 0-dim fp32, what every row receives.
    """
    width = hidden.shape[1]
    blocks = configuration("merge_rows", hidden)
    blocks.launch(
        merge_rows_kernel,
        (len(touched.entry),),
        slots,
        bias_slots,
        label_coefficient,
        hidden,
        everywhere,
        bias_everywhere,
        factor,
        touched.entry,
        touched.ids,
        out,
        bias_out,
        len(slots),
        len(touched.entry),
        width,
        hidden.stride(0),
        COMPACT=compact,
    )
