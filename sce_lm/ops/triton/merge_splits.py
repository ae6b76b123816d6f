"""What a list's splits found, as that of the whole list: one program a tile of positions.

With ``top_i`` and ``total_i = sum_j exp(s_j - top_i)`` of each split i,

    log Z = p + log sum_i total_i exp(top_i - p),     p = max_i top_i

and moments about ``top_i`` are brought to p. Splits are walked in their order, so that the result
has the same bits every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sce_lm.ops.triton.candidate_forward import ListSums
from sce_lm.ops.triton.configurations import configuration


class Merged(NamedTuple):
    """``[N]`` each, fp32; empty where the splits have nothing of it."""

    log_partition: torch.Tensor
    entropy: torch.Tensor
    expected: torch.Tensor
    """Mean logit under the softmax."""
    logit_sum: torch.Tensor
    best: torch.Tensor
    best_item: torch.Tensor
    """int64: the first class with the largest logit."""


@triton.jit
def merge_splits_kernel(
    top,
    total,
    moment,
    logit_sum,
    best,
    best_item,
    log_partition_out,
    entropy_out,
    expected_out,
    logit_sum_out,
    best_out,
    best_item_out,
    num_positions,
    num_splits,
    BLOCK_POSITIONS: tl.constexpr,
):
    position = tl.program_id(0) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    inside = position < num_positions
    peak = tl.full([BLOCK_POSITIONS], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_POSITIONS], tl.float32)
    bent = tl.zeros([BLOCK_POSITIONS], tl.float32)
    logits = tl.zeros([BLOCK_POSITIONS], tl.float32)
    largest = tl.full([BLOCK_POSITIONS], float("-inf"), tl.float32)
    winner = tl.zeros([BLOCK_POSITIONS], tl.int32)
    at = position.to(tl.int64)
    for _ in range(num_splits):
        here = tl.load(top + at, mask=inside, other=float("-inf"))
        of_split = tl.load(total + at, mask=inside, other=0.0)
        new_peak = tl.maximum(peak, here)
        shift = tl.where(new_peak > float("-inf"), new_peak, 0.0)
        # exp is 0 below -1e4, and 0 times -inf is not.
        before, after = tl.maximum(peak - shift, -1e4), tl.maximum(here - shift, -1e4)
        if moment is not None:
            of_moment = tl.load(moment + at, mask=inside, other=0.0)
            bent = (bent + before * z) * tl.exp(before)
            bent += (of_moment + after * of_split) * tl.exp(after)
        z = z * tl.exp(before) + of_split * tl.exp(after)
        peak = new_peak
        if logit_sum is not None:
            logits += tl.load(logit_sum + at, mask=inside, other=0.0)
        if best is not None:
            of_best = tl.load(best + at, mask=inside, other=float("-inf"))
            item = tl.load(best_item + at, mask=inside, other=0)
            is_better = of_best > largest
            largest = tl.where(is_better, of_best, largest)
            winner = tl.where(is_better, item, winner)
        at += num_positions

    log_z = tl.log(z)
    tl.store(log_partition_out + position, peak + log_z, mask=inside)
    if moment is not None:
        mean = bent / z
        tl.store(entropy_out + position, log_z - mean, mask=inside)
        tl.store(expected_out + position, peak + mean, mask=inside)
    if logit_sum is not None:
        tl.store(logit_sum_out + position, logits, mask=inside)
    if best is not None:
        tl.store(best_out + position, largest, mask=inside)
        tl.store(best_item_out + position, winner.to(tl.int64), mask=inside)


def merge_splits(sums: ListSums) -> Merged:
    """The sums ``[splits, N]`` of one list as those of all its columns."""
    num_splits, num_positions = sums.top.shape

    def new(part: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return sums.top.new_empty(num_positions * (part is not None), dtype=dtype)

    merged = Merged(
        new(sums.top),
        new(sums.moment),
        new(sums.moment),
        new(sums.logit_sum),
        new(sums.best),
        new(sums.best, torch.int64),
    )
    blocks = configuration("merge_splits", sums.top)
    blocks.launch(
        merge_splits_kernel,
        (triton.cdiv(num_positions, blocks.block_positions),),
        sums.top,
        sums.total,
        sums.moment,
        sums.logit_sum,
        sums.best,
        sums.best_item,
        *merged,
        num_positions,
        num_splits,
    )
    return merged
