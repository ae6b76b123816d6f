"""Blocks of positions and the logits of their lists: the layout of one pass over candidates.

Positions are sorted by bucket; each block's buckets are multiplied together, in groups of sizes
so alike that padding them to the largest adds at most a tenth.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from sce_lm.ops.candidates import Candidates, find
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.static_shapes import needs_static_shapes, tiles_of_groups

BLOCK_ELEMENTS = 2**22
"""Logits of a block of positions (16 MiB in fp32), and elements of the rows of W that its buckets
hold."""
PADDING = 1.1
"""Rows of a group of buckets, padding included, over its positions: at most this."""


class Group(NamedTuple):
    """Buckets of a block that are multiplied together."""

    rows: slice
    """Their positions, rows of the block."""
    buckets: slice
    """Their place in the block's list of buckets."""
    longest: int
    """Positions of the largest."""
    slot: torch.Tensor | None
    """``[n]`` place of each position in ``[buckets · longest]``; None: no padding."""

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, ...]`` of the group's positions as ``[buckets, longest, ...]``, 0 in between."""
        shape = (self.buckets.stop - self.buckets.start, self.longest)
        if self.slot is None:
            return x.unflatten(0, shape)
        padded = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
        return padded.index_copy_(0, self.slot, x).unflatten(0, shape)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`pad`."""
        x = x.flatten(0, 1)
        return x if self.slot is None else x[self.slot]


class Span(NamedTuple):
    """A block of positions before anything is computed."""

    start: int
    stop: int
    buckets: list[int] | slice
    """Which buckets, or which parts of them where shapes are static."""
    groups: list[Group]


class Block(NamedTuple):
    """One block of positions and its raw logits."""

    at: torch.Tensor | slice
    """``[n]`` which positions; N where static shapes leave a place empty. What is found there is
    written behind all positions."""
    read: torch.Tensor | slice
    """``[n]`` positions to read from: any where a place is empty."""
    is_empty: torch.Tensor | None
    """``[n]`` bool, or None: no place is."""
    h: torch.Tensor
    y: torch.Tensor
    bucket: torch.Tensor
    buckets: torch.Tensor | list[int] | slice
    """``[b]`` those of ``items``; some repeat where shapes are static."""
    groups: list[Group]
    items: torch.Tensor
    """``[b, K_b]`` lists of the block's buckets."""
    item_rows: torch.Tensor
    """``[b, K_b, d]``"""
    label_rows: torch.Tensor
    """``[n, d]`` rows of W at the labels."""
    label_raw: torch.Tensor
    """``[n]`` raw logits of the labels."""
    x: torch.Tensor
    """``[n, S + m + K_b]`` raw logits of the lists."""
    label_columns: list[torch.Tensor]
    """``[n]`` each: columns of ``x`` at which the candidate is the label, -1 where it is none."""
    is_here: torch.Tensor
    """``[n]`` bool: the label's row is one of these."""
    outside: torch.Tensor
    """``[n]`` 1 where the label lies in R."""
    label_weight: torch.Tensor
    """``[n]`` w of the label where it was drawn and is not in the bucket's own list, else 0."""

    def share_of(self, weight: torch.Tensor) -> torch.Tensor:
        """0-dim or ``[n]``: what these positions' losses weigh."""
        share = weight if weight.dim() == 0 else weight[self.read]
        if self.is_empty is None:
            return share
        return share.expand(len(self.is_empty)).masked_fill(self.is_empty, 0.0)

    def without_labels(self, e: torch.Tensor) -> None:
        """Write 0 where a column of ``e [n, S + m + K_b]`` is the position's label."""
        for column in self.label_columns:
            if needs_static_shapes(e.device):
                at = column.clamp_min(0).unsqueeze(1)
                e.scatter_(1, at, e.gather(1, at).masked_fill_(column.unsqueeze(1) >= 0, 0.0))
            else:
                row = (column >= 0).nonzero().squeeze(1)
                e[row, column[row]] = 0.0


class Lists:
    """What a call's blocks of positions share: the lists, their rows and weights, and where the
    labels stand in them. Without buckets there is one, and it is empty."""

    def __init__(
        self,
        head: Head,
        positions: Positions,
        candidates: Candidates,
        *,
        is_static: bool = False,
    ) -> None:
        """Args: is_static: no shape depends on data, and blocks have empty places."""
        self.head, self.positions = head, positions
        self.dtype = dtype = compute_dtype(positions.hidden, head.weight)
        labels = positions.labels
        shared, tail, log_weights = (
            candidates.shared,
            candidates.tail,
            candidates.tail_log_weights,
        )
        self.is_static = is_static
        is_there = log_weights > -torch.inf
        if self.is_static:
            is_there = torch.cat([shared >= 0, is_there])
        elif not is_there.all():
            tail, log_weights = tail[is_there], log_weights[is_there]
        self.num_shared, self.num_tail = len(shared), len(tail)
        self.tail = slice(self.num_shared, self.num_shared + self.num_tail)
        self.num_dense = self.num_shared + self.num_tail
        dense = torch.cat([shared, tail])
        self.dense = dense.clamp_min(0) if self.is_static else dense
        self.dense_rows = head.rows(self.dense, dtype)
        self.dense_weight = self.dense_rows.new_ones(self.num_dense)
        self.dense_weight[self.tail] = log_weights.to(dtype).exp()
        self.num_certain: int | torch.Tensor = self.num_shared
        """Shared candidates, empty places aside."""
        self.dense_offset = None
        """``[S + m]`` on the dense logits: -inf in an empty place, 0 elsewhere."""
        if self.is_static:
            self.dense_weight[: self.num_shared] = is_there[: self.num_shared].to(dtype)
            self.num_certain = is_there[: self.num_shared].sum()
            nothing = torch.zeros_like(self.dense_weight)
            self.dense_offset = nothing.masked_fill_(~is_there, -torch.inf)
            dense = dense.masked_fill(~is_there, head.vocab_size)

        # The column of each label among the dense candidates, -1 where it is not there.
        ordered, order = torch.sort(dense)
        slot, found = find(labels, ordered)
        self.label_column = torch.where(found, order[slot] if self.num_dense else slot, -1)

        self.order = self.own_tail = self.item_weight = None
        self.bucket_of_part: torch.Tensor | None = None
        """``[P]`` int64: with static shapes, the bucket of each part."""
        if candidates.bucket_items is None or candidates.bucket_of is None:
            self.items = self.dense.new_empty(1, 0)
            self.bucket_of = torch.zeros_like(labels)
            self.own_column = torch.full_like(labels, -1)
        else:
            self.items, self.bucket_of = candidates.bucket_items, candidates.bucket_of
            if candidates.bucket_log_weights is not None:
                self.item_weight = candidates.bucket_log_weights.to(dtype).exp()
            # The column of each label in its own bucket's list, -1 where it is not there: buckets
            # one after the other make one ascending list.
            buckets = torch.arange(len(self.items), device=labels.device).unsqueeze(1)
            ascending = (self.items + buckets * head.vocab_size).flatten()
            slot, found = find(labels + self.bucket_of * head.vocab_size, ascending)
            first = self.bucket_of * self.items.shape[1]
            self.own_column = torch.where(found & (labels >= 0), slot - first, -1)
            # Tail items that a bucket's own list holds with certainty.
            tails = tail.expand(len(self.items), -1).contiguous()
            self.own_tail = find(tails, self.items)[1]
        self.bucket_size = self.items.shape[1]
        self.num_columns = self.num_dense + self.bucket_size
        ones = self.dense_weight.new_ones(self.bucket_size)
        self.column_weight = torch.cat([self.dense_weight, ones])

        row_elements = max(1, self.bucket_size * self.dense_rows.shape[1])
        self.most_buckets = max(1, BLOCK_ELEMENTS // row_elements)
        """Buckets whose rows are held at a time."""

    @property
    def tail_rows(self) -> torch.Tensor:
        """``[m, D]`` rows of the tail."""
        return self.dense_rows[self.tail]

    def sum_seen(self, e: torch.Tensor) -> torch.Tensor:
        """``[n]`` sums of ``e [n, S + m + K_b]`` as if nothing had a weight; empty places aside."""
        return e @ (self.column_weight > 0).to(self.dtype) if self.is_static else e.sum(dim=1)

    def unweighted(self) -> torch.Tensor:
        """``[m]`` what takes the weights of the tail away again."""
        inverse = 1.0 / self.dense_weight[self.tail]
        return inverse.masked_fill_(inverse == torch.inf, 0.0) if self.is_static else inverse

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """``[n, D]`` rows of the head."""
        return self.head.rows(ids, self.dtype)

    def bucket_rows(self, items: torch.Tensor) -> torch.Tensor:
        """``[b, K_b, d]`` rows of ``items [b, K_b]``."""
        return self.rows(items.reshape(-1)).unflatten(0, items.shape)

    def takes_part(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of these classes are not masked, bool in their shape."""
        if self.head.masked is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return ~find(ids, self.head.masked)[1]

    def spans(self) -> list[Span]:
        """Blocks of positions within the memory budget; fixes the working order.

        With buckets: parts of at most a block each, in descending order of size.
        """
        limit = max(1, BLOCK_ELEMENTS // max(self.num_columns, 1))
        if self.bucket_size == 0:
            edges = _equal_parts(0, len(self.positions), limit)
            return [Span(a, b, [], []) for a, b in pairwise(edges)]
        if self.is_static:
            return self._static_spans(limit)
        sizes = torch.bincount(self.bucket_of, minlength=len(self.items))
        bounds = [0, *sizes.cumsum(0).tolist()]
        parts = [
            (low, high, bucket)
            for bucket, (start, stop) in enumerate(pairwise(bounds))
            for low, high in pairwise(_equal_parts(start, stop, limit))
        ]
        parts.sort(key=lambda part: part[0] - part[1])
        by_bucket = torch.argsort(self.bucket_of, stable=True)
        self.order = torch.cat([by_bucket[low:high] for low, high, _ in parts])

        spans, start, taken = [], 0, []
        for low, high, bucket in [*parts, (0, limit, -1)]:
            full = (
                sum(size for size, _ in taken) + high - low > limit
                or len(taken) == self.most_buckets
            )
            if taken and full:
                lengths, buckets = zip(*taken)
                stop = start + sum(lengths)
                groups = _groups(lengths, self.bucket_of.device)
                spans.append(Span(start, stop, list(buckets), groups))
                start, taken = stop, []
            taken.append((high - low, bucket))
        return spans

    def _static_spans(self, limit: int) -> list[Span]:
        """The same, with as many parts of one size, and no group's padding, as hold any buckets:
        places that are not needed stay empty."""
        num_positions, num_buckets = len(self.positions), len(self.items)
        size = max(1, min(-(-num_positions // num_buckets), limit))
        parts = tiles_of_groups(self.bucket_of, num_buckets, size)
        self.bucket_of_part, count = parts.group, len(parts.group)
        self.order = torch.where(parts.is_there, parts.members, num_positions).flatten()

        spans, several = [], max(1, min(self.most_buckets, limit // size))
        for low in range(0, count, several):
            num_parts = min(several, count - low)
            group = Group(slice(0, num_parts * size), slice(0, num_parts), size, None)
            parts_of_span = slice(low, low + num_parts)
            spans.append(Span(low * size, (low + num_parts) * size, parts_of_span, [group]))
        return spans

    def block(self, span: Span, x: torch.Tensor) -> Block:
        """The block's raw logits, written to ``x``."""
        at = slice(span.start, span.stop)
        if self.order is not None:
            at = self.order[at]
        read, is_empty = at, None
        if self.bucket_of_part is not None and isinstance(at, torch.Tensor):
            last = len(self.positions) - 1
            read, is_empty = at.clamp_max(last), at > last
        h = self.head.extend(self.positions.hidden[read], self.dtype)
        y, bucket = self.positions.labels[read], self.bucket_of[read]
        column, own_column = self.label_column[read], self.own_column[read]
        dense = x[:, : self.num_dense]
        if self.dense_offset is None:
            torch.mm(h, self.dense_rows.T, out=dense)
        else:
            torch.addmm(self.dense_offset, h, self.dense_rows.T, out=dense)
        buckets = span.buckets
        if self.bucket_of_part is not None:
            buckets = self.bucket_of_part[buckets]
        items = self.items[buckets]
        item_rows = self.bucket_rows(items)
        for group in span.groups:
            own = torch.bmm(group.pad(h[group.rows]), item_rows[group.buckets].mT)
            x[group.rows, self.num_dense :] = group.unpad(own)

        is_own = own_column >= 0
        label_columns = [column] if self.num_dense else []
        if self.bucket_size:
            label_columns.append(torch.where(is_own, self.num_dense + own_column, -1))
        is_here = y >= 0
        is_shared = (column >= 0) & (column < self.num_shared)
        outside = (is_here & ~is_shared & ~is_own & self.takes_part(y)).to(self.dtype)
        drawn = (column >= self.num_shared) & ~is_own
        label_weight = 0.0 * outside
        if self.num_dense:
            label_weight = self.column_weight[column.clamp_min(0)] * drawn
        label_rows = self.rows(y.clamp_min(0))  # any row does where the label is elsewhere
        label_raw = torch.linalg.vecdot(h, label_rows)
        return Block(
            at, read, is_empty, h, y, bucket, buckets, span.groups, items, item_rows,
            label_rows, label_raw, x, label_columns, is_here, outside, label_weight,
        )  # fmt: skip


def _equal_parts(start: int, stop: int, limit: int) -> list[int]:
    """Edges of parts of at most ``limit``, as equal as they can be; ``[start]`` if it is empty."""
    count = -(-(stop - start) // limit)
    return [start, *(start + (stop - start) * (i + 1) // count for i in range(count))]


def _groups(lengths: tuple[int, ...], device: torch.device) -> list[Group]:
    """Runs of buckets, in descending order of length, whose padding stays within ``PADDING``."""
    groups, first, row = [], 0, 0
    while first < len(lengths):
        longest, total, last = lengths[first], 0, first
        while last < len(lengths) and (
            (last + 1 - first) * longest <= PADDING * (total + lengths[last])
        ):
            total += lengths[last]
            last += 1
        slot = None
        if total < longest * (last - first):
            length = torch.tensor(lengths[first:last]).unsqueeze(1)
            slot = (torch.arange(longest) < length).flatten().nonzero().squeeze(1).to(device)
        groups.append(Group(slice(row, row + total), slice(first, last), longest, slot))
        first, row = last, row + total
    return groups
