r"""The gradient of each touched row of W, from all slots and labels that name it, written once.

    dW_u = factor · ( everywhere + sum_{slots with id u} slot + sum_{t: y_t = u} label_t·h_t )

Slots and positions are sorted by id beforehand, so a row is a segment of entries; a program owns
one, and sums it in the order of the sort: no atomics, and the same bits every time. An entry below
the number of slots is a slot, another is a position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sce_lm.ops.triton.configurations import configuration


class TouchedRows(NamedTuple):
    """Entries sorted by id, cut into segments of one id."""

    entry: torch.Tensor
    """``[E]`` int64: a slot, or a position plus the number of slots."""
    start: torch.Tensor
    """``[E + 1]`` int64: where each segment starts; E from the last segment on."""
    ids: torch.Tensor
    """``[E]`` int64 sorted: ``ids[start[u]]`` is segment u's id."""


def touched_rows(slot_ids: torch.Tensor, labels: torch.Tensor) -> TouchedRows:
    """Sort what touches rows of W: slots by their ids, -1 for none, positions by their labels."""
    ids, entry = torch.sort(torch.cat([slot_ids, labels]), stable=True)
    is_new = torch.ones_like(ids, dtype=torch.bool)
    is_new[1:] = ids[1:] != ids[:-1]
    segment = is_new.cumsum(0) - 1
    every = torch.arange(len(ids) + 1, device=ids.device)
    return TouchedRows(entry, torch.searchsorted(segment, every), ids)


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
    start,
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
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(start + segment)
    if first >= num_entries:
        return
    end = tl.load(start + segment + 1)
    item = tl.load(ids + first)
    if item < 0:  # empty places
        return
    row = item
    if COMPACT:
        row = segment
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
        out: ``[V, d]``, or ``[U, d]`` with ``compact``: row u for the u-th smallest id.
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
        touched.start,
        touched.ids,
        out,
        bias_out,
        len(slots),
        len(touched.entry),
        width,
        hidden.stride(0),
        COMPACT=compact,
    )
