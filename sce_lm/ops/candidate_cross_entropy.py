r"""Candidate cross-entropy: the one numeric core behind every approximate loss.

A position t sums over three disjoint lists and its label:

    Zhat_t = exp s_ty + sum_{j in S + B(t)} exp s_tj + sum_{j in T \ B(t)} w_j exp s_tj,   j != y
    loss_t = log Zhat_t - s_ty

S is shared and certain, B(t) belongs to the position's bucket and is certain, T is a sample with
weights w = exp c. With the control variate (module :mod:`sce_lm.objectives.sce` has its source) let
R = everything outside S and B(t), and m_t the mean raw logit over R, known from the row sum of W.
The tangent of exp(g(x)) at m sums to ``|R| exp g(m)`` over R, so only its error is sampled:

    Zhat_t += e0·(|R| - A0 - g'(m)·(A1 - m·A0)),     e0 = exp g(m)
    A0 = sum_{T \ B, != y} w_j     + [y in R]
    A1 = sum_{T \ B, != y} w_j x_j + [y in R] x_y

which makes R's part ``e0·(|R| + sum w·phi + [y in R]·phi_y)``, ``phi = exp(g(x) - g(m)) - 1
- g'(m)(x - m)``, written in sums that a shift by the row's largest logit keeps in range: no
exponential here exceeds 1, so a delta of 95 is harmless, and the cancellation in a small phi stays
at rounding size beside ``|R|·e0``. That is why no ``log phi`` is taken. A0 and A1 are linear in h,
so they cost one product a position: ``sum w_j x_j = h·(sum w_j W_j)``, one row a bucket. R may be
cut into strata, each with a mean, a size and sums of its own; their parts add up. Where the sampled
part would push Zhat below the terms that were actually seen (possible with a soft cap,
whose phi may be negative), those terms alone are used and the position is counted as clamped.

Gradients, for a weight p_t on each position's loss (p/Zhat times):

    lists, x_j:  w_j·exp(s_j)·g'(x_j)       - [control, j in T] e0·g'(m)·w_j
    label, x_y:  (exp(s_y) - Zhat)·g'(x_y)  - [control, y in R] e0·g'(m)
    mean,  m:    e0·( g'(m)·|R| - (g'(m)² + g''(m))·(A1 - m·A0) )

They are taken in the forward pass for a scalar loss, block of positions by block, and recomputed
for a loss per position or for a second backward pass: no ``[N, K]`` logits are kept. Only exp(s)
itself is held for a block, and passed over four times: largest, shift, exp, and the weighted sum.
Weights of classes scale the candidates' rows, and weights of positions scale h, before and after
the products instead; the control's second term has rank one a bucket and is added there too. The
gradient of W is summed in fp32 over the rows that were touched, and cast once. A low-rank operand
and a bias are further columns of W (module :mod:`sce_lm.ops.rows`).

Classes that are left out, because a bias keeps them out of every sum, are in none of the lists and
no part of R. A label among them has its own term, exp(s_ty) = 0, and nothing else.

Of a head that is cut by rows over several ranks, each rank has candidates among its own rows, and
the sums of the ranks add up: Zhat = sum_r Zhat_r, with the label's term where its row is. A label
that is elsewhere is -1 here. :class:`CandidatePasses` gives log Zhat_r first and the gradients once
log Zhat is known: above, Zhat is then that of all ranks.

Positions are sorted by bucket; each block's buckets are multiplied together, in groups of sizes
so alike that padding them to the largest adds at most a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import one_hot

from sce_lm.ops.dispatch import Backend, kernels
from sce_lm.ops.exact_cross_entropy import compute_dtype
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.rows import HeadColumns, Needs

BLOCK_ELEMENTS = 2**22
"""Logits of a block of positions (16 MiB in fp32), and elements of the rows of W that its buckets
hold."""
PADDING = 1.1
"""Rows of a group of buckets, padding included, over its positions: at most this."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The classes that stand in for the catalogue; chosen without gradient.

    ``shared``, ``tail`` and each row of ``bucket_items`` hold distinct ids; ``shared`` meets
    neither of the others. ``tail`` may meet ``bucket_items``: such items count for positions of
    other buckets only.
    """

    shared: torch.Tensor
    """``[S]`` int64: in every position's sum, with certainty."""
    tail: torch.Tensor
    """``[m]`` int64: in every position's sum with weight ``exp(c)``."""
    tail_log_weights: torch.Tensor
    """``[m]`` c; -inf marks an empty place, whose id may be any."""
    bucket_items: torch.Tensor | None = None
    """``[n_b, K_b]`` int64, ascending in each row."""
    bucket_of: torch.Tensor | None = None
    """``[N]`` int64: the bucket of each position."""
    bucket_log_weights: torch.Tensor | None = None
    """``[n_b, K_b]`` log-weights of ``bucket_items``; None: all 0. -inf marks an empty slot, whose
    id repeats that of the slot before it. Not with ``control_variate``."""
    row_sum: torch.Tensor | None = None
    """``[D]`` sum of the head's rows that are not left out, where the caller keeps it up to date;
    None: they are all read for it. Used by the control variate with one stratum only."""
    left_out: torch.Tensor | None = None
    """``[M]`` int64, ascending: classes outside every list and outside R; their logits are so low
    that they are in nobody's sum, and there is no soft cap. None: there are none."""
    control_variate: bool = False
    """Take the known part of the tail out of the sample."""
    stratum_of: torch.Tensor | None = None
    """``[V]`` int64 stratum of each class, whose part of the rest has a mean of its own; None: one
    stratum."""
    num_strata: int = 1
    """Strata that ``stratum_of`` counts."""
    sparse_grad: bool = False
    """Gradient of the weight as a sparse tensor, without the part through the mean."""


class CandidateLoss(NamedTuple):
    """What :func:`candidate_cross_entropy` returns."""

    loss: torch.Tensor
    """Scalar ``sum_t position_weight · loss_t``, or ``[N]`` if no weight was given."""
    log_partition: torch.Tensor
    """``[N]`` log Zhat_t, without gradient."""
    num_clamped: torch.Tensor
    """0-dim int64: positions whose control variate was dropped."""


def candidate_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    candidates: Candidates,
    *,
    bias: torch.Tensor | None = None,
    low_rank: torch.Tensor | None = None,
    post: LogitTransform = LogitTransform(),
    position_weight: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> CandidateLoss:
    """Cross-entropy over candidates, as in the module's equations.

    Args:
        hidden: ``[N, d]``, fp16, bf16, fp32 or fp64; N >= 1. ``[N, d + r]`` with ``low_rank``.
        weight: ``[V, d]``.
        labels: ``[N]`` int64 in ``[0, V)``.
        candidates: the lists and their log-weights.
        bias: ``[V]`` or None.
        low_rank: ``[V, r]`` or None: further columns of the weight, in a tensor of their own.
        post: the map from raw logits to softmax logits.
        position_weight: 0-dim or ``[N]`` tensor. Given: ``loss`` is the sum of losses times this
            and the gradients are taken in the forward pass. None: ``loss`` is ``[N]``.
        backend: :data:`~sce_lm.ops.dispatch.Backend`.

    Raises:
        ValueError: a control variate with weighted buckets; backend "triton", and it cannot run.
    """
    if candidates.control_variate and candidates.bucket_log_weights is not None:
        raise ValueError(
            "the control variate knows what certain buckets leave over, and these have "
            "bucket_log_weights; use control_variate=False."
        )
    run = kernels("candidate_cross_entropy", backend, hidden, weight, bias, low_rank, candidates)
    if run is not None:
        options = {"bias": bias, "post": post, "position_weight": position_weight}
        return run(hidden, weight, labels, candidates, **options)
    return CandidateLoss(
        *_CandidateCrossEntropy.apply(
            hidden,
            weight,
            low_rank,
            bias,
            labels,
            candidates,
            post,
            position_weight,
            torch.is_grad_enabled(),
        )
    )


class Sums(NamedTuple):
    """What one pass over the candidates finds."""

    log_partition: torch.Tensor
    """``[N]`` log Zhat of the rows that are here, -inf where there is nothing to sum."""
    label_logit: torch.Tensor
    """``[N]`` s_ty, 0 where the label is elsewhere."""
    num_clamped: torch.Tensor
    """0-dim int64: positions whose control variate was dropped."""


class CandidatePasses:
    """The two passes over the candidates of some rows of a head, with a collective in between.

    Args:
        hidden: ``[N, d]`` (``[N, d + r]``).
        columns: of the rows that are here.
        labels: ``[N]`` int64 row numbers, -1 where the label's row is elsewhere.
        post: the map from raw logits to softmax logits.
        candidates: among these rows.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        columns: HeadColumns,
        labels: torch.Tensor,
        post: LogitTransform,
        candidates: Candidates,
    ) -> None:
        self.inputs = (hidden, columns, labels, candidates, post)
        self.dtype = compute_dtype(hidden, columns.weight)

    def scan(self) -> Sums:
        """The pass that gives log Zhat_r."""
        return _pass(*self.inputs, None, Needs(), self.dtype)[0]

    def gradients(
        self, log_partition: torch.Tensor, position_weight: torch.Tensor, needs: Needs
    ) -> tuple[torch.Tensor | None, ...]:
        """dL/dh ``[N, D]`` (of these rows alone), and those of weight, low_rank and bias, for the
        loss ``sum_t position_weight_t · loss_t``.

        Args:
            log_partition: ``[N]`` log Zhat over all ranks.
            position_weight: ``[N]``.
            needs: which of them are wanted.
        """
        _, columns, _, candidates, _ = self.inputs
        found = _pass(*self.inputs, position_weight, needs, self.dtype, log_partition)[1]
        return found.of_inputs(columns, candidates)


def candidate_variance(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    candidates: Candidates,
    log_partition: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    low_rank: torch.Tensor | None = None,
    post: LogitTransform = LogitTransform(),
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Estimated relative variance of Zhat at some positions, without and with control variate.

        Vhat = sum_{j in T \ B, != y} (1 - pi_j) f_j² / pi_j²,     pi = exp(-c)

    with ``f = exp s``, or ``exp s - e0·(1 + g'(m)(x - m))`` under the control variate, over Zhat².
    Only drawn items are seen, so mass that no sample has met is not in it.

    Args:
        log_partition: ``[N]``, from :func:`candidate_cross_entropy`.
        positions: ``[P]`` which positions to look at; None: all.

    Returns:
        Two ``[P]`` tensors.
    """
    columns = HeadColumns(weight, low_rank, bias)
    p = _Problem(hidden, columns, labels, candidates, compute_dtype(hidden, weight), True)
    everyone = torch.arange(len(hidden), device=hidden.device)
    chosen = everyone if positions is None else positions
    plain = hidden.new_zeros(len(chosen), dtype=p.dtype)
    control = torch.zeros_like(plain)
    if p.num_tail == 0:
        return plain, control
    for start in range(0, len(p.items), p.most_buckets):
        buckets = slice(start, start + p.most_buckets)
        p.set_means(buckets, p.bucket_rows(p.items[buckets]))
    w = p.dense_weight[p.tail]
    factor = (w * (w - 1.0)).clamp_min_(0.0)
    step = max(1, BLOCK_ELEMENTS // p.num_tail)
    for start in range(0, len(chosen), step):
        at = chosen[start : start + step]
        h, bucket = p.extend(hidden[at]), p.bucket_of[at]
        x = h @ p.dense_rows[p.tail].T
        column = p.label_column[at].unsqueeze(1) - p.num_shared
        left_out = torch.arange(p.num_tail, device=x.device) == column
        if p.own_tail is not None:
            left_out |= p.own_tail[bucket]
        shift = log_partition[at].unsqueeze(1)
        means = [torch.linalg.vecdot(h, p.of(p.mean_rows, k, bucket)) for k in p.strata]
        mean = torch.stack(means, dim=1)
        if p.tail_stratum is not None:
            mean = mean[:, p.tail_stratum]
        g_mean = post(mean)
        tangent = (g_mean - shift).exp() * (1.0 + post.slope(g_mean) * (x - mean))
        f = (post(x) - shift).exp().masked_fill_(left_out, 0.0)
        tangent.masked_fill_(left_out, 0.0)
        plain[start : start + step] = f.square() @ factor
        control[start : start + step] = (f - tangent).square() @ factor
    return plain, control


class _Group(NamedTuple):
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


class _Span(NamedTuple):
    """A block of positions before anything is computed."""

    start: int
    stop: int
    buckets: list[int]
    groups: list[_Group]


class _Problem:
    """What a call's blocks of positions share. Without buckets there is one, and it is empty."""

    def __init__(self, hidden, columns, labels, candidates, dtype, with_mean):
        self.columns, self.dtype = columns, dtype
        vocab_size = len(columns.weight)
        self.num_positions = len(labels)
        tail, log_weights = candidates.tail, candidates.tail_log_weights
        is_drawn = log_weights > -torch.inf
        if not is_drawn.all():
            tail, log_weights = tail[is_drawn], log_weights[is_drawn]
        self.num_shared, self.num_tail = len(candidates.shared), len(tail)
        self.tail = slice(self.num_shared, self.num_shared + self.num_tail)
        self.num_dense = self.num_shared + self.num_tail
        self.dense = torch.cat([candidates.shared, tail])
        self.dense_rows = self.rows(self.dense)
        self.dense_weight = self.dense_rows.new_ones(self.num_dense)
        self.dense_weight[self.tail] = log_weights.to(dtype).exp()

        # The column of each label among the dense candidates, -1 where it is not there.
        ordered, order = torch.sort(self.dense)
        slot, found = _find(labels, ordered)
        self.label_column = torch.where(found, order[slot] if self.num_dense else slot, -1)

        self.left_out = candidates.left_out
        self.order = self.own_tail = self.item_weight = None
        tail_weight = self.dense_weight[self.tail].unsqueeze(0)
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
            ascending = (self.items + buckets * vocab_size).flatten()
            slot, found = _find(labels + self.bucket_of * vocab_size, ascending)
            first = self.bucket_of * self.items.shape[1]
            self.own_column = torch.where(found & (labels >= 0), slot - first, -1)
            # Tail items that a bucket's own list holds with certainty.
            tails = tail.expand(len(self.items), -1).contiguous()
            self.own_tail = _find(tails, self.items)[1]
            tail_weight = tail_weight.masked_fill(self.own_tail, 0.0)
        self.bucket_size = self.items.shape[1]
        self.num_columns = self.num_dense + self.bucket_size
        ones = self.dense_weight.new_ones(self.bucket_size)
        self.column_weight = torch.cat([self.dense_weight, ones])

        row_elements = max(1, self.bucket_size * self.dense_rows.shape[1])
        self.most_buckets = max(1, BLOCK_ELEMENTS // row_elements)
        """Buckets whose rows are held at a time."""
        self.strata = range(candidates.num_strata if with_mean else 0)
        if with_mean:
            self._set_rest(candidates, tail_weight)

    def _set_rest(self, candidates: Candidates, tail_weight: torch.Tensor) -> None:
        """What is known of R. Tables have a row for each stratum and bucket, strata first."""
        strata, num_buckets = candidates.num_strata, len(self.items)
        self.stratum_of = candidates.stratum_of
        self.tail_stratum = self.item_stratum = None
        shared, left_out = self.dense[: self.num_shared], candidates.left_out
        if self.stratum_of is None:
            total = candidates.row_sum
            total = self.columns.row_sum(left_out=left_out) if total is None else total
            self.rest_total = (total - self.dense_rows[: self.num_shared].sum(dim=0)).unsqueeze(0)
            rest = len(self.columns.weight) - self.num_shared - self.bucket_size
            rest -= 0 if left_out is None else len(left_out)
            size = total.new_full((num_buckets,), rest)
        else:
            total = self.columns.row_sums(self.stratum_of, strata, left_out=left_out)
            shared_stratum = self.stratum_of[shared]
            self.tail_stratum = self.stratum_of[candidates.tail]
            self.item_stratum = self.stratum_of[self.items]
            shared_rows = self.dense_rows[: self.num_shared].to(total.dtype)
            self.rest_total = total.index_add(0, shared_stratum, shared_rows, alpha=-1.0)
            size = torch.bincount(self.stratum_of, minlength=strata)
            if left_out is not None:
                size = size - torch.bincount(self.stratum_of[left_out], minlength=strata)
            size = size - torch.bincount(shared_stratum, minlength=strata)
            own = one_hot(self.item_stratum, strata).sum(dim=1)  # [n_b, S]
            size = (size - own).T.reshape(-1)
            members = one_hot(self.tail_stratum, strata).T.unsqueeze(1)  # [S, 1, m]
            tail_weight = (tail_weight * members).flatten(0, 1)
        width = self.dense_rows.shape[1]
        self.rest_size = size.to(self.dtype)
        """``[S · n_b]`` |R|."""
        self.mean_rows = self.dense_rows.new_empty(strata * num_buckets, width)
        """``[S · n_b, d]`` mean of the rows of R; blocks fill in those of their buckets."""
        self.tail_weight = tail_weight
        """``[S · n_b, m]`` w, 0 where the item is in the bucket's own list or another stratum."""
        self.tail_total = tail_weight.sum(dim=1)
        self.tail_rows = tail_weight @ self.dense_rows[self.tail]
        if self.bucket_size == 0:
            self.set_means(slice(0, 1), self.dense_rows.new_zeros(1, 0, width))

    def set_means(self, buckets: list[int] | slice, item_rows: torch.Tensor) -> None:
        """Fill in the mean rows of some buckets from the rows ``[b, K_b, d]`` of their lists."""
        if self.item_stratum is None:
            gone = item_rows.sum(dim=1).unsqueeze(0)  # [S, b, d]
        else:
            members = one_hot(self.item_stratum[buckets], len(self.strata)).to(self.dtype)
            gone = (members.mT @ item_rows).transpose(0, 1)
        rest = self.rest_total.unsqueeze(1) - gone
        size = self.by_stratum(self.rest_size)[:, buckets].clamp_min(1.0)
        self.by_stratum(self.mean_rows)[:, buckets] = (rest / size.unsqueeze(2)).to(self.dtype)

    def by_stratum(self, table: torch.Tensor) -> torch.Tensor:
        """A view with strata and buckets as the first two dimensions."""
        return table.unflatten(0, (len(self.strata), -1))

    def of(self, table: torch.Tensor, stratum: int, bucket: torch.Tensor) -> torch.Tensor:
        """Each position's row of a table, for one stratum; a single row broadcasts."""
        part = self.by_stratum(table)[stratum]
        return part if len(part) == 1 else part[bucket]

    def dot(self, h: torch.Tensor, table: torch.Tensor, stratum: int, bucket) -> torch.Tensor:
        """``[n]`` inner products of positions with their rows of a table."""
        rows = self.of(table, stratum, bucket)
        return h @ rows[0] if len(rows) == 1 else torch.linalg.vecdot(h, rows)

    def cells(self) -> torch.Tensor:
        """``[n_b, K_b]`` row of the tables that each item of a bucket's list belongs to."""
        bucket = torch.arange(len(self.items), device=self.items.device).unsqueeze(1)
        if self.item_stratum is None:
            return bucket.expand_as(self.items)
        return self.item_stratum * len(self.items) + bucket

    def takes_part(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of these classes are not left out, bool in their shape."""
        if self.left_out is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return ~_find(ids, self.left_out)[1]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """``[n, D]`` rows of the head."""
        return self.columns.rows(ids, self.dtype)

    def bucket_rows(self, items: torch.Tensor) -> torch.Tensor:
        """``[b, K_b, d]`` rows of ``items [b, K_b]``."""
        return self.rows(items.reshape(-1)).unflatten(0, items.shape)

    def extend(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states, with a 1 that meets the bias."""
        return self.columns.extend(hidden, self.dtype)

    def spans(self) -> list[_Span]:
        """Blocks of positions within the memory budget; fixes the working order.

        With buckets: parts of at most a block each, in descending order of size.
        """
        limit = max(1, BLOCK_ELEMENTS // max(self.num_columns, 1))
        if self.bucket_size == 0:
            edges = _equal_parts(0, self.num_positions, limit)
            return [_Span(a, b, [], []) for a, b in pairwise(edges)]
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
                spans.append(_Span(start, stop, list(buckets), groups))
                start, taken = stop, []
            taken.append((high - low, bucket))
        return spans


def _equal_parts(start: int, stop: int, limit: int) -> list[int]:
    """Edges of parts of at most ``limit``, as equal as they can be; ``[start]`` if it is empty."""
    count = -(-(stop - start) // limit)
    return [start, *(start + (stop - start) * (i + 1) // count for i in range(count))]


def _groups(lengths: tuple[int, ...], device: torch.device) -> list[_Group]:
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
        groups.append(_Group(slice(row, row + total), slice(first, last), longest, slot))
        first, row = last, row + total
    return groups


class _Block(NamedTuple):
    """One block of positions and its raw logits."""

    at: torch.Tensor | slice
    """``[n]`` which positions."""
    h: torch.Tensor
    y: torch.Tensor
    bucket: torch.Tensor
    groups: list[_Group]
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
    is_label: tuple[torch.Tensor, torch.Tensor]
    """(rows, columns) of ``x`` at which the candidate is the label."""
    is_here: torch.Tensor
    """``[n]`` bool: the label's row is one of these."""
    outside: torch.Tensor
    """``[n]`` 1 where the label lies in R."""
    label_weight: torch.Tensor
    """``[n]`` w of the label where it was drawn and is not in the bucket's own list, else 0."""


def _block(p: _Problem, hidden, labels, span: _Span, x: torch.Tensor, with_mean: bool) -> _Block:
    at = slice(span.start, span.stop)
    if p.order is not None:
        at = p.order[at]
    h, y, bucket = p.extend(hidden[at]), labels[at], p.bucket_of[at]
    column, own_column = p.label_column[at], p.own_column[at]
    torch.mm(h, p.dense_rows.T, out=x[:, : p.num_dense])
    items = p.items[span.buckets]
    item_rows = p.bucket_rows(items)
    if with_mean and span.buckets:
        p.set_means(span.buckets, item_rows)
    for group in span.groups:
        own = torch.bmm(group.pad(h[group.rows]), item_rows[group.buckets].mT)
        x[group.rows, p.num_dense :] = group.unpad(own)

    is_own = own_column >= 0
    in_dense, in_bucket = (column >= 0).nonzero().squeeze(1), is_own.nonzero().squeeze(1)
    is_label = (
        torch.cat([in_dense, in_bucket]),
        torch.cat([column[in_dense], p.num_dense + own_column[in_bucket]]),
    )
    is_here = y >= 0
    is_shared = (column >= 0) & (column < p.num_shared)
    outside = (is_here & ~is_shared & ~is_own & p.takes_part(y)).to(p.dtype)
    drawn = (column >= p.num_shared) & ~is_own
    label_weight = p.column_weight[column.clamp_min(0)] * drawn if p.num_dense else 0.0 * outside
    label_rows = p.rows(y.clamp_min(0))  # any row does where the label is elsewhere
    label_raw = torch.linalg.vecdot(h, label_rows)
    return _Block(
        at, h, y, bucket, span.groups, items, item_rows,
        label_rows, label_raw, x, is_label, is_here, outside, label_weight,
    )  # fmt: skip


class _Control:
    """The control variate of one block and stratum: the mean logit over its part of R and the
    tangent's sampled sums."""

    def __init__(self, p: _Problem, b: _Block, post: LogitTransform, stratum: int) -> None:
        self.stratum = stratum
        self.rest_size = p.of(p.rest_size, stratum, b.bucket)
        mean = p.dot(b.h, p.mean_rows, stratum, b.bucket)
        self.g_mean = post(mean)
        self.slope, self.curvature = post.slope(self.g_mean), post.curvature(self.g_mean)
        self.label_share = b.outside - b.label_weight
        if p.stratum_of is not None:
            self.label_share = self.label_share * (p.stratum_of[b.y] == stratum)
        self.a0 = p.of(p.tail_total, stratum, b.bucket) + self.label_share
        a1 = p.dot(b.h, p.tail_rows, stratum, b.bucket)
        label_raw = b.label_raw.masked_fill(self.label_share == 0, 0.0)  # it may be infinite
        self.spread = a1 + self.label_share * label_raw - mean * self.a0
        self.e0 = torch.zeros_like(mean)

    def least_shift(self) -> torch.Tensor:
        """g(m), -inf where the stratum is empty."""
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


class _Gradients:
    """Sums of one call's gradients: hidden states, touched rows of W, and the mean row.

    Columns of the head that are frozen, and lie before those that are not, take no part.
    """

    def __init__(self, p: _Problem, labels, needs: Needs):
        self.p, self.needs = p, needs
        self.with_hidden, self.with_head = needs.hidden, any(needs.head)
        width = p.dense_rows.shape[1]
        if self.with_hidden:
            self.hidden = p.dense_rows.new_empty(len(labels), width)
            # Products with the candidates' rows meet their weights here.
            self.weighted_rows = p.dense_rows * p.dense_weight.unsqueeze(1)
        if self.with_head:
            # Labels that are elsewhere make a row -1, which stays 0 until it is dropped.
            self.ids = torch.unique(torch.cat([p.dense, labels, p.items.reshape(-1)]))
            self.num_frozen = p.columns.num_frozen(needs.head)
            width -= self.num_frozen
            self.rows = p.dense_rows.new_zeros(len(self.ids), width)
            self.dense = p.dense_rows.new_zeros(p.num_dense, width)
            self.pull = p.dense_rows.new_zeros(max(1, len(p.strata)) * len(p.items), width)
            self.mean = torch.zeros_like(self.pull)
            self.everywhere = p.dense_rows.new_zeros(max(1, len(p.strata)), width)

    def slots(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self.ids, ids)

    def add(self, block: _Block, e, list_factor, label_grad, of_strata) -> None:
        """Take in a block. All but ``e [n, S + m + K_b]`` are ``[n]`` and hold the weights of
        positions; the weights of dense candidates are still to be applied. ``of_strata`` lists the
        pull and the mean's gradient of each stratum."""
        p, h = self.p, block.h
        dense, own = e[:, : p.num_dense], e[:, p.num_dense :]
        own_by_group = [group.pad(own[group.rows]) for group in block.groups]
        if self.with_hidden:
            in_place = isinstance(block.at, slice)
            out = self.hidden[block.at] if in_place else torch.empty_like(h)
            torch.mm(dense, self.weighted_rows, out=out)
            for group, padded in zip(block.groups, own_by_group):
                back = torch.bmm(padded, block.item_rows[group.buckets])
                out[group.rows] += group.unpad(back)
            out *= list_factor.unsqueeze(1)
            out.addcmul_(label_grad.unsqueeze(1), block.label_rows)
            for k, (pull, mean_grad) in enumerate(of_strata):
                tail_rows, mean_rows = (
                    p.of(t, k, block.bucket) for t in (p.tail_rows, p.mean_rows)
                )
                out.addcmul_(pull.unsqueeze(1), tail_rows, value=-1.0)
                out.addcmul_(mean_grad.unsqueeze(1), mean_rows)
            if not in_place:
                self.hidden[block.at] = out
        if self.with_head:
            h = h[:, self.num_frozen :]
            scaled = h * list_factor.unsqueeze(1)
            self.dense.addmm_(dense.T, scaled)
            for group, padded in zip(block.groups, own_by_group):
                rows = torch.bmm(padded.mT, group.pad(scaled[group.rows]))
                slots = self.slots(block.items[group.buckets].reshape(-1))
                self.rows.index_add_(0, slots, rows.flatten(0, 1))
            torch.mul(h, label_grad.unsqueeze(1), out=scaled)
            self.rows.index_add_(0, self.slots(block.y), scaled)
            for k, (pull, mean_grad) in enumerate(of_strata):
                _add_by_bucket(p.by_stratum(self.pull)[k], block.bucket, pull, h)
                _add_by_bucket(p.by_stratum(self.mean)[k], block.bucket, mean_grad, h)

    def finish(self, with_control: bool, through_mean: bool) -> None:
        """Bring the dense lists and the mean's gradient to the rows.

        Every row of W has its share ``mean_k / |R|`` in the mean of each bucket k, except the
        shared ones, and except a bucket's own items in that bucket's mean.
        """
        if not self.with_head:
            return
        p = self.p
        self.dense *= p.dense_weight.unsqueeze(1)
        if with_control:
            self.dense[p.tail].addmm_(p.tail_weight.T, self.pull, alpha=-1.0)
        self.rows.index_add_(0, self.slots(p.dense), self.dense)
        if through_mean:
            share = self.mean / p.rest_size.clamp_min(1.0).unsqueeze(1)
            self.everywhere = p.by_stratum(share).sum(dim=1)
            shared = p.dense[: p.num_shared]
            of_ids, of_shared = self.everywhere, self.everywhere
            if p.stratum_of is not None:
                of_ids, of_shared = (of_ids[p.stratum_of[at]] for at in (self.ids, shared))
            if p.left_out is not None:
                of_ids = of_ids * p.takes_part(self.ids).unsqueeze(1)
            self.rows += of_ids
            self.rows[self.slots(shared)] -= of_shared
            if p.bucket_size:
                holds = share.new_zeros(len(self.ids), len(share))
                holds[self.slots(p.items), p.cells()] = 1.0
                self.rows.addmm_(holds, share, alpha=-1.0)
        elsewhere = int(torch.count_nonzero(self.ids[:1] < 0))
        self.ids, self.rows = self.ids[elsewhere:], self.rows[elsewhere:]

    def of_inputs(
        self, columns: HeadColumns, candidates: Candidates, factor: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden states (``[N, D]``, in the dtype of the computation), weight,
        low_rank and bias, times ``factor`` (None: 1), which is worked into the sums."""
        grad_hidden, of_head = None, [None] * 3
        if self.with_hidden:
            grad_hidden = self.hidden if factor is None else self.hidden.mul_(factor)
        if self.with_head:
            rows, everywhere = self.rows, self.everywhere
            if factor is not None:
                rows, everywhere = rows.mul_(factor), everywhere * factor
            of_head = columns.gradients(
                self.needs.head,
                self.ids,
                rows,
                everywhere,
                sparse=candidates.sparse_grad,
                stratum_of=candidates.stratum_of if candidates.control_variate else None,
                left_out=candidates.left_out,
            )
        return grad_hidden, *of_head


def _pass(
    hidden, columns, labels, candidates, post, position_weight, needs: Needs, dtype, whole=None
) -> tuple[Sums, _Gradients]:
    """Sums, and the gradients that are needed. ``whole``: ``[N]`` log Zhat of all ranks, if these
    rows are not all there are."""
    with_control = candidates.control_variate
    p = _Problem(hidden, columns, labels, candidates, dtype, with_control)
    spans = p.spans()
    gradients = _Gradients(p, labels, needs)
    log_partition = hidden.new_empty(len(hidden), dtype=dtype)
    label_logit = torch.empty_like(log_partition)
    num_clamped = torch.zeros((), dtype=torch.int64, device=hidden.device)
    buffer = log_partition.new_empty(max(span.stop - span.start for span in spans), p.num_columns)

    for span in spans:
        x = buffer[: span.stop - span.start]
        b = _block(p, hidden, labels, span, x, with_control)
        controls = [_Control(p, b, post, k) for k in p.strata]
        label_s = post(b.label_raw)
        label_logit[b.at] = label_s.masked_fill(~b.is_here, 0.0)
        present_s = label_s.masked_fill(~b.is_here, torch.finfo(dtype).min)
        s = post.apply_(b.x)
        slope = post.slope(s)
        shift = torch.maximum(present_s, s.amax(dim=1)) if s.shape[1] else present_s
        for control in controls:
            shift = torch.maximum(shift, control.least_shift())
        e = s.sub_(shift.unsqueeze(1)).exp_()
        e[b.is_label] = 0.0
        if p.own_tail is not None:
            e[:, p.tail].masked_fill_(p.own_tail[b.bucket], 0.0)
        if p.item_weight is not None:
            e[:, p.num_dense :] *= p.item_weight[b.bucket]
        e_label = (present_s - shift).exp().masked_fill_(~b.is_here, 0.0)

        z = e @ p.column_weight + e_label
        if controls:
            known = torch.stack([control.known_part(shift) for control in controls]).sum(dim=0)
            if post.soft_cap is not None:
                seen = e.sum(dim=1) + e_label
                clamped = z + known < seen
                num_clamped += clamped.sum()
                z, known = torch.where(clamped, seen, z), known.masked_fill(clamped, 0.0)
                for control in controls:
                    control.e0 = control.e0.masked_fill(clamped, 0.0)
                unweighted = torch.where(clamped.unsqueeze(1), 1.0 / p.dense_weight[p.tail], 1.0)
                e[:, p.tail] *= unweighted
            z = z + known
        log_z = z.log() + shift
        log_partition[b.at] = log_z
        if not needs:
            continue

        share = position_weight if position_weight.dim() == 0 else position_weight[b.at]
        if whole is not None:
            z = (whole[b.at] - shift).exp()
        per_row = share / z
        list_factor = per_row
        if torch.is_tensor(slope):
            e *= slope
        else:
            list_factor = per_row * slope
        label_grad = (e_label * per_row - share) * post.slope(label_s)
        label_grad = label_grad.masked_fill_(~b.is_here, 0.0)
        of_strata = []
        for control in controls:
            pull = control.pull() * per_row
            label_grad = label_grad - pull * control.label_share
            of_strata.append((pull, control.mean_gradient() * per_row))
        gradients.add(b, e, list_factor, label_grad, of_strata)

    gradients.finish(with_control, through_mean=with_control and not candidates.sparse_grad)
    return Sums(log_partition, label_logit, num_clamped), gradients


class _CandidateCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        low_rank,
        bias,
        labels,
        candidates,
        post,
        position_weight,
        grad_enabled,
    ):
        columns = HeadColumns(weight, low_rank, bias)
        ctx.needs = Needs.of(ctx, grad_enabled)
        ctx.candidates, ctx.post = candidates, post
        ctx.dtype = compute_dtype(hidden, weight)
        ctx.position_weight = position_weight
        now = ctx.needs if position_weight is not None else Needs()
        (log_partition, label_logit, num_clamped), gradients = _pass(
            hidden, columns, labels, candidates, post, position_weight, now, ctx.dtype
        )
        losses = log_partition - label_logit
        ctx.mark_non_differentiable(log_partition, num_clamped)
        ctx.save_for_backward(hidden, *columns, labels)
        ctx.gradients = gradients if now else None
        if position_weight is None:
            return losses, log_partition, num_clamped
        return (losses * position_weight).sum(), log_partition, num_clamped

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        hidden, *head, labels = ctx.saved_tensors
        columns = HeadColumns(*head)
        factor = grad_outputs[0].to(ctx.dtype)
        # Gradients of the forward pass are scaled in place, so they serve once.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            if ctx.position_weight is not None:
                factor = factor * ctx.position_weight
            gradients = _pass(
                hidden, columns, labels, ctx.candidates, ctx.post, factor, ctx.needs, ctx.dtype
            )[1]
            factor = None
        grad_hidden, *of_head = gradients.of_inputs(columns, ctx.candidates, factor)
        if grad_hidden is not None:
            grad_hidden = grad_hidden[:, : hidden.shape[1]].to(hidden.dtype)
        return grad_hidden, *of_head, None, None, None, None, None


def _add_by_bucket(table, bucket, coefficient, h) -> None:
    """Add ``coefficient · h`` of each position to its bucket's row."""
    if len(table) == 1:
        table[0] += coefficient @ h
    else:
        table.index_add_(0, bucket, coefficient.unsqueeze(1) * h)


def _find(ids: torch.Tensor, ascending: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot of each id in an ascending list (last dimension), and whether it is there."""
    if ascending.shape[-1] == 0:
        return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    slot = torch.searchsorted(ascending, ids).clamp_max_(ascending.shape[-1] - 1)
    return slot, ascending.expand(*ids.shape[:-1], -1).gather(-1, slot) == ids
