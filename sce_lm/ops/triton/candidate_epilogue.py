r"""Loss and gradients of each position from what the forward kernel left of its lists.

With peak p of all logits, Zhat over ``exp p`` is ``exp(s_y - p)`` and the sum of
``total·exp(top - p)`` over lists and splits. With a control variate, m the mean raw logit over the
rest R,

    e0·( |R| - A0 - g'(m)·(A1 - m·A0) ),     e0 = exp(g(m) - p)

is added, where A0 and A1 hold the label's term if it lies in R. Under a soft cap Zhat is kept from
falling below the terms that were seen; where it would, e0 is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import LossTerms
from sce_lm.ops.triton.candidate_forward import ListSums
from sce_lm.ops.triton.configurations import configuration
from sce_lm.ops.triton.logit_math import slope, transform


class Control(NamedTuple):
    """What the control variate knows of the rest R."""

    size: torch.Tensor
    """0-dim int64: |R|."""
    mean: torch.Tensor
    """``[N]`` fp32 mean raw logit."""
    is_known: torch.Tensor
    """``[N]`` bool: the label is not in R."""


class Epilogue(NamedTuple):
    """``[N]`` fp32 each; the last three empty without a control variate."""

    loss: torch.Tensor
    log_partition: torch.Tensor
    grad_label: torch.Tensor
    """Gradient of the loss at the label's raw logit."""
    pull: torch.Tensor
    """``e0·g'(m) / Zhat``."""
    grad_mean: torch.Tensor
    """At m."""
    clamped: torch.Tensor
    """int8."""


@triton.jit
def _peak(top, num_splits, position, inside, num_positions, peak):
    at = position.to(tl.int64)
    for _ in range(num_splits):
        peak = tl.maximum(peak, tl.load(top + at, mask=inside, other=float("-inf")))
        at += num_positions
    return peak


@triton.jit
def _total(top, total, num_splits, position, inside, num_positions, peak):
    at = position.to(tl.int64)
    z = tl.zeros_like(peak)
    for _ in range(num_splits):
        here = tl.load(top + at, mask=inside, other=float("-inf"))
        z += tl.load(total + at, mask=inside, other=0.0) * tl.exp(here - peak)
        at += num_positions
    return z


@triton.jit
def candidate_epilogue_kernel(
    label_raw,
    top,
    total,
    second_top,
    second_total,
    tail_top,
    tail_total,
    tail_a0,
    tail_a1,
    tail_seen,
    rest_size,
    mean,
    is_known,
    loss_out,
    log_partition_out,
    grad_label_out,
    pull_out,
    grad_mean_out,
    clamped_out,
    num_positions,
    num_splits,
    second_splits,
    tail_splits,
    scale,
    soft_cap,
    z_loss,
    of_label,
    BLOCK_POSITIONS: tl.constexpr,
):
    position = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    inside = position < num_positions
    raw = tl.load(label_raw + position, mask=inside, other=0.0)
    s = transform(raw, scale, soft_cap)
    peak = s
    g, m, size, least, outside, slope_m = s, s, s, s, s, s  # of the control variate
    if top is not None:
        peak = _peak(top, num_splits, position, inside, num_positions, peak)
    if second_top is not None:
        peak = _peak(second_top, second_splits, position, inside, num_positions, peak)
    if tail_top is not None:
        peak = _peak(tail_top, tail_splits, position, inside, num_positions, peak)
    if mean is not None:
        m = tl.load(mean + position, mask=inside, other=0.0)
        g = transform(m, scale, soft_cap)
        size = tl.load(rest_size).to(tl.float32)
        least = tl.where(size > 0, g, float("-inf"))
        peak = tl.maximum(peak, least)

    e_label = tl.exp(s - peak)
    certain = e_label
    if top is not None:
        certain += _total(top, total, num_splits, position, inside, num_positions, peak)
    if second_top is not None:
        certain += _total(
            second_top, second_total, second_splits, position, inside, num_positions, peak
        )
    z, pull, of_mean = certain, s, s
    if tail_top is not None:
        z += _total(tail_top, tail_total, tail_splits, position, inside, num_positions, peak)
    if mean is not None:
        outside = tl.where(tl.load(is_known + position, mask=inside, other=1) != 0, 0.0, 1.0)
        # The logit of a label that is left out may be infinite.
        a0, a1 = outside, tl.where(outside > 0, raw, 0.0)
        if tail_a0 is not None:
            at = position.to(tl.int64)
            for _ in range(tail_splits):
                a0 += tl.load(tail_a0 + at, mask=inside, other=0.0)
                a1 += tl.load(tail_a1 + at, mask=inside, other=0.0)
                at += num_positions
        slope_m = slope(g, scale, soft_cap)
        spread = a1 - m * a0
        e0 = tl.exp(least - peak)
        z += e0 * (size - a0 - slope_m * spread)
        bend = slope_m * slope_m
        if soft_cap is not None:
            ratio = g / soft_cap
            bend += -2.0 * scale * scale / soft_cap * ratio * (1.0 - ratio * ratio)
            seen = certain
            if tail_seen is not None:
                seen += _total(
                    tail_top, tail_seen, tail_splits, position, inside, num_positions, peak
                )
            is_clamped = z < seen
            z = tl.where(is_clamped, seen, z)
            e0 = tl.where(is_clamped, 0.0, e0)
            tl.store(clamped_out + position, is_clamped.to(tl.int8), mask=inside)
        pull = e0 * slope_m
        of_mean = e0 * (slope_m * size - bend * spread)
    log_z = tl.log(z) + peak
    per_row = (1.0 + 2.0 * z_loss * log_z) / z
    grad_label = (e_label * per_row - of_label) * slope(s, scale, soft_cap)
    if mean is not None:
        grad_label -= pull * per_row * outside
        tl.store(pull_out + position, pull / z, mask=inside)
        tl.store(grad_mean_out + position, of_mean * per_row, mask=inside)
    tl.store(loss_out + position, log_z + z_loss * log_z * log_z - of_label * s, mask=inside)
    tl.store(log_partition_out + position, log_z, mask=inside)
    tl.store(grad_label_out + position, grad_label, mask=inside)


def candidate_epilogue(
    label_raw: torch.Tensor,
    certain: list[ListSums],
    tail: ListSums | None,
    control: Control | None,
    post: LogitTransform,
    terms: LossTerms,
) -> Epilogue:
    """Launch the kernel.

    Args:
        label_raw: ``[N]`` fp32 raw logits of the labels.
        certain: sums of at most two lists.
        tail: those of the tail, with what a control variate needs if there is one.
    """
    count = len(label_raw)

    def new(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return label_raw.new_empty(size, dtype=dtype)

    of_control = 0 if control is None else count
    can_clamp = control is not None and post.soft_cap is not None
    clamped = label_raw.new_zeros(0 if can_clamp else of_control, dtype=torch.int8)
    out = Epilogue(
        new(count),
        new(count),
        new(count),
        new(of_control),
        new(of_control),
        new(count, torch.int8) if can_clamp else clamped,
    )
    lists = [*certain, None, None][:2]
    tops = [(None, None) if s is None else (s.top, s.total) for s in lists]
    splits = [0 if s is None else len(s.top) for s in (*lists, tail)]
    blocks = configuration("candidate_epilogue", label_raw)
    blocks.launch(
        candidate_epilogue_kernel,
        (triton.cdiv(count, blocks.block_positions),),
        label_raw,
        *tops[0],
        *tops[1],
        *((None,) * 5 if tail is None else (tail.top, tail.total, tail.a0, tail.a1, tail.seen)),
        *((None,) * 3 if control is None else control),
        *out,
        count,
        *splits,
        post.scale,
        post.soft_cap,
        terms.z_loss,
        1.0 - terms.label_smoothing,
    )
    return out
