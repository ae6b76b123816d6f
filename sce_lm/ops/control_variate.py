"""The control variate of a sampled tail: the part of its sum that is known without drawing.

R is everything outside a position's shared and bucket lists, and m its mean raw logit over R, known
from the sum of W's rows. The equations are those of :mod:`sce_lm.ops.candidate_cross_entropy`; the
masked classes are no part of R.
"""

from __future__ import annotations

import torch

from sce_lm.ops.candidate_blocks import Block, Lists
from sce_lm.ops.logits import LogitTransform


class Rest:
    """What is known of R, bucket by bucket."""

    def __init__(self, lists: Lists, row_sum: torch.Tensor | None) -> None:
        """Args: row_sum: ``[D]`` sum of the head's rows; None: they are read for it."""
        num_buckets = len(lists.items)
        total = lists.head.row_sum() if row_sum is None else row_sum
        self.lists = lists
        certain = lists.dense_rows[: lists.num_shared]
        if lists.is_static:
            certain = certain * lists.dense_weight[: lists.num_shared].unsqueeze(1)
        self._total = total - certain.sum(dim=0)
        count = lists.head.num_classes - lists.num_certain - lists.bucket_size
        self.size = lists.dense_rows.new_ones(num_buckets) * count
        """``[n_b]`` |R|."""
        tail_weight = lists.dense_weight[lists.tail].unsqueeze(0)
        if lists.own_tail is not None:
            tail_weight = tail_weight.masked_fill(lists.own_tail, 0.0)
        self.tail_weight = tail_weight
        """``[n_b, m]`` w, 0 where the item is in the bucket's own list; ``[1, m]`` without any."""
        self.tail_total = tail_weight.sum(dim=1)
        self.tail_rows = tail_weight @ lists.tail_rows
        self.mean_rows = lists.dense_rows.new_empty(num_buckets, lists.dense_rows.shape[1])
        """``[n_b, D]`` mean of the rows of R; blocks fill in those of their buckets."""
        if lists.bucket_size == 0:
            self.set_means(slice(0, 1), lists.dense_rows.new_zeros(1, 0, len(self._total)))

    def set_means(self, buckets: torch.Tensor | list[int] | slice, item_rows: torch.Tensor) -> None:
        """Fill in the mean rows of some buckets from the rows ``[b, K_b, d]`` of their lists."""
        rest = self._total - item_rows.sum(dim=1)
        size = self.size[buckets].clamp_min(1.0).unsqueeze(1)
        self.mean_rows[buckets] = (rest / size).to(self.mean_rows.dtype)

    def set_all_means(self) -> None:
        """Fill in those of every bucket."""
        lists = self.lists
        for start in range(0, len(lists.items), lists.most_buckets):
            buckets = slice(start, start + lists.most_buckets)
            self.set_means(buckets, lists.bucket_rows(lists.items[buckets]))

    def of(self, table: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
        """Each position's row of a table by bucket; a single row broadcasts."""
        return table if len(table) == 1 else table[bucket]

    def dot(self, h: torch.Tensor, table: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
        """``[n]`` inner products of positions with their rows of a table."""
        rows = self.of(table, bucket)
        return h @ rows[0] if len(rows) == 1 else torch.linalg.vecdot(h, rows)


class Control:
    """The control variate of one block: the mean logit over R and the tangent's sampled sums."""

    def __init__(self, rest: Rest, block: Block, post: LogitTransform) -> None:
        bucket = block.bucket
        self.rest_size = rest.of(rest.size, bucket)
        mean = rest.dot(block.h, rest.mean_rows, bucket)
        self.g_mean = post(mean)
        self.slope, self.curvature = post.slope(self.g_mean), post.curvature(self.g_mean)
        self.label_share = block.outside - block.label_weight
        self.a0 = rest.of(rest.tail_total, bucket) + self.label_share
        a1 = rest.dot(block.h, rest.tail_rows, bucket)
        label_raw = block.label_raw.masked_fill(self.label_share == 0, 0.0)  # it may be infinite
        self.spread = a1 + self.label_share * label_raw - mean * self.a0
        self.e0 = torch.zeros_like(mean)

    def least_shift(self) -> torch.Tensor:
        """g(m), -inf where R is empty."""
        return self.g_mean.masked_fill(self.rest_size == 0, -torch.inf)

    def known_part(self, shift: torch.Tensor) -> torch.Tensor:
        """``e0·(|R| - A0 - g'(m)·(A1 - m·A0))`` with e0 = exp(g(m) - shift)."""
        self.e0 = (self.least_shift() - shift).exp()
        return self.e0 * (self.rest_size - self.a0 - self.slope * self.spread)

    def pull(self) -> torch.Tensor:
        """``e0·g'(m)``, what the gradients of the sampled terms lack."""
        return self.e0 * self.slope

    def mean_gradient(self) -> torch.Tensor:
        """d Zhat / dm."""
        bend = self.slope * self.slope + self.curvature
        return self.e0 * (self.slope * self.rest_size - bend * self.spread)
