r"""Candidate cross-entropy: the one numeric core behind every approximate loss.

A position t sums over three disjoint lists and its label:

    Zhat_t = exp s_ty + sum_{j in S + B(t)} exp s_tj + sum_{j in T \ B(t)} exp(c_j + s_tj),   j != y
    loss_t = log Zhat_t - s_ty

S is shared and certain, B(t) belongs to the position's bucket and is certain, T is a sample with
log-weights c. With the control variate (module :mod:`sce_lm.objectives.sce` has its source) let
R = everything outside S and B(t), and m_t the mean raw logit over R, known from the row sum of W.
The tangent of exp(g(x)) at m sums to ``|R| exp g(m)`` over R, so only its error is sampled:

    Zhat_t += e0·|R| - e0·( A0 + g'(m)·(A1 - m·A0) ),     e0 = exp g(m)
    A0 = sum_{T \ B, != y} exp(c_j)     + [y in R]
    A1 = sum_{T \ B, != y} exp(c_j) x_j + [y in R] x_y

which makes R's part ``e0·(|R| + sum exp(c)·phi + [y in R]·phi_y)``, ``phi = exp(g(x) - g(m)) - 1
- g'(m)(x - m)``, written in sums that a shift by the row's largest logit keeps in range: no
exponential here exceeds 1, so a delta of 95 is harmless, and the cancellation in a small phi stays
at rounding size beside ``|R|·e0``. That is why no ``log phi`` is taken. Where the sampled part
would push Zhat below the terms that were actually seen (possible with a soft cap, whose phi may be
negative), those terms alone are used and the position is counted as clamped.

Gradients, for a weight p_t on each position's loss (p/Zhat times):

    lists, x_j:  exp(c_j)·exp(s_j)·g'(x_j)  - [control, j in T] e0·g'(m)·exp(c_j)
    label, x_y:  (exp(s_y) - Zhat)·g'(x_y)  - [control, y in R] e0·g'(m)
    mean,  m:    e0·( g'(m)·|R| - (g'(m)² + g''(m))·(A1 - m·A0) )

They are taken in the forward pass for a scalar loss, block of positions by block, and recomputed
for a loss per position: no ``[N, K]`` logits are kept. The gradient of W is summed in fp32 over
the rows that were touched, and cast once. A bias is one more column of W, met by a 1 in h.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from sce_lm.ops.exact_cross_entropy import compute_dtype
from sce_lm.ops.logits import LogitTransform

BLOCK_ELEMENTS = 2**21
"""Logits of a block of positions (8 MiB in fp32; about three such buffers are live)."""


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
    """``[m]`` c."""
    bucket_items: torch.Tensor | None = None
    """``[n_b, K_b]`` int64, ascending in each row."""
    bucket_of: torch.Tensor | None = None
    """``[N]`` int64: the bucket of each position."""
    control_variate: bool = False
    """Take the known part of the tail out of the sample."""
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
    post: LogitTransform = LogitTransform(),
    position_weight: torch.Tensor | None = None,
) -> CandidateLoss:
    """Cross-entropy over candidates, as in the module's equations.

    Args:
        hidden: ``[N, d]``, fp16, bf16, fp32 or fp64; N >= 1.
        weight: ``[V, d]``.
        labels: ``[N]`` int64 in ``[0, V)``.
        candidates: the lists and their log-weights.
        bias: ``[V]`` or None.
        post: the map from raw logits to softmax logits.
        position_weight: 0-dim or ``[N]`` tensor. Given: ``loss`` is the sum of losses times this
            and the gradients are taken in the forward pass. None: ``loss`` is ``[N]``.
    """
    return CandidateLoss(
        *_CandidateCrossEntropy.apply(
            hidden, weight, bias, labels, candidates, post, position_weight, torch.is_grad_enabled()
        )
    )


def candidate_variance(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    candidates: Candidates,
    log_partition: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
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
    p = _Problem(hidden, weight, bias, labels, candidates, compute_dtype(hidden, weight), True)
    everyone = torch.arange(len(hidden), device=hidden.device)
    chosen = everyone if positions is None else positions
    plain = hidden.new_zeros(len(chosen), dtype=p.dtype)
    control = torch.zeros_like(plain)
    if p.num_tail == 0:
        return plain, control
    step = max(1, BLOCK_ELEMENTS // p.num_tail)
    for start in range(0, len(chosen), step):
        at = chosen[start : start + step]
        h, bucket = p.extend(hidden[at]), p.bucket_of[at]
        x = h @ p.dense_rows[p.tail].T
        w = _of(p.tail_weight, bucket)
        column = p.label_column[at].unsqueeze(1) - p.num_shared
        is_label = torch.arange(p.num_tail, device=x.device) == column
        factor = (w * (w - 1.0)).clamp_min(0.0).masked_fill(is_label, 0.0)
        shift = log_partition[at].unsqueeze(1)
        f = (post(x) - shift).exp()
        mean = torch.linalg.vecdot(h, _of(p.mean_rows, bucket)).unsqueeze(1)
        g_mean = post(mean)
        tangent = (g_mean - shift).exp() * (1.0 + post.slope(g_mean) * (x - mean))
        plain[start : start + step] = (factor * f.square()).sum(dim=1)
        control[start : start + step] = (factor * (f - tangent).square()).sum(dim=1)
    return plain, control


class _Problem:
    """What a call's blocks of positions share. Without buckets there is one, and it is empty."""

    def __init__(self, hidden, weight, bias, labels, candidates, dtype, with_mean):
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self.num_shared, self.num_tail = len(candidates.shared), len(candidates.tail)
        self.tail = slice(self.num_shared, self.num_shared + self.num_tail)
        self.num_dense = self.num_shared + self.num_tail
        self.dense = torch.cat([candidates.shared, candidates.tail])
        self.dense_rows = self.rows(self.dense)
        self.tail_weight = candidates.tail_log_weights.to(dtype).exp().unsqueeze(0)

        # The column of each label among the dense candidates, -1 where it is not there.
        ordered, order = torch.sort(self.dense)
        slot, found = _find(labels, ordered)
        self.label_column = torch.where(found, order[slot] if self.num_dense else slot, -1)

        if candidates.bucket_items is None or candidates.bucket_of is None:
            self.items = self.dense.new_empty(1, 0)
            self.bucket_of = torch.zeros_like(labels)
            self.order = torch.arange(len(labels), device=labels.device)
        else:
            self.items, self.bucket_of = candidates.bucket_items, candidates.bucket_of
            self.order = torch.argsort(self.bucket_of, stable=True)
            # One row of tail weights a bucket, 0 where the item is in the bucket's own list.
            tails = candidates.tail.expand(len(self.items), -1).contiguous()
            self.tail_weight = self.tail_weight.masked_fill(_find(tails, self.items)[1], 0.0)
        self.bucket_size = self.items.shape[1]
        sizes = torch.bincount(self.bucket_of, minlength=len(self.items))
        self.bounds = [0, *sizes.cumsum(0).tolist()]

        self.rest_size = len(weight) - self.num_shared - self.bucket_size
        if with_mean:
            total = weight.sum(dim=0, dtype=dtype)
            if bias is not None:
                total = torch.cat([total, bias.sum(dtype=dtype).unsqueeze(0)])
            known = self.dense_rows[: self.num_shared].sum(dim=0)
            own = torch.stack([self.rows(row).sum(dim=0) for row in self.items])
            self.mean_rows = (total - known - own) / max(self.rest_size, 1)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W, with the bias as one more column."""
        rows = self.weight[ids].to(self.dtype)
        if self.bias is None:
            return rows
        return torch.cat([rows, self.bias[ids, None].to(self.dtype)], dim=1)

    def extend(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states, with a 1 that meets the bias."""
        h = hidden.to(self.dtype)
        return h if self.bias is None else torch.nn.functional.pad(h, (0, 1), value=1.0)

    def blocks(self):
        """(start, stop, buffer for raw logits) of positions in the working order, sorted by bucket.

        Blocks are as equal as the budget allows, and all use one piece of memory.
        """
        total, columns = len(self.order), self.num_dense + self.bucket_size
        count = -(-total // max(1, BLOCK_ELEMENTS // max(columns, 1)))
        edges = [total * i // count for i in range(count + 1)]
        buffer = self.dense_rows.new_empty(max(b - a for a, b in pairwise(edges)), columns)
        return [(a, b, buffer[: b - a]) for a, b in pairwise(edges)]

    def fragments(self, start: int, stop: int):
        """(bucket, first row, end row) of the buckets in a block, rows counted from its start."""
        if self.bucket_size == 0:
            return
        for bucket, (low, high) in enumerate(pairwise(self.bounds)):
            low, high = max(low, start), min(high, stop)
            if low < high:
                yield bucket, low - start, high - start


class _Gradients:
    """Sums of one call's gradients: hidden states, touched rows of W, and the mean row."""

    def __init__(self, p: _Problem, labels, with_hidden, with_weight):
        self.p = p
        width = p.dense_rows.shape[1]
        self.with_hidden, self.with_weight = with_hidden, with_weight
        self.hidden = p.dense_rows.new_empty(len(labels) if with_hidden else 0, width)
        touched = torch.cat([p.dense, labels, p.items.reshape(-1)]) if with_weight else labels[:0]
        self.ids = torch.unique(touched)
        self.rows = p.dense_rows.new_zeros(len(self.ids), width)
        self.dense = p.dense_rows.new_zeros(p.num_dense if with_weight else 0, width)
        self.mean = p.dense_rows.new_zeros(len(p.items), width)
        self.everywhere = p.dense_rows.new_zeros(width)

    def slots(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self.ids, ids)

    def add(self, block: _Block, grad, grad_label, grad_mean) -> None:
        """Take in a block's gradients with respect to raw logits, weights of positions included."""
        p, h = self.p, block.h
        dense, own = grad[:, : p.num_dense], grad[:, p.num_dense :]
        fragments = list(p.fragments(block.start, block.stop))
        if self.with_hidden:
            out = torch.mm(dense, p.dense_rows)
            for k, low, high in fragments:
                out[low:high].addmm_(own[low:high], p.rows(p.items[k]))
            out.addcmul_(grad_label.unsqueeze(1), block.label_rows)
            if grad_mean is not None:
                out.addcmul_(grad_mean.unsqueeze(1), _of(p.mean_rows, block.bucket))
            self.hidden[block.at] = out
        if self.with_weight:
            self.dense.addmm_(dense.T, h)
            for k, low, high in fragments:
                self.rows.index_add_(0, self.slots(p.items[k]), own[low:high].T @ h[low:high])
            self.rows.index_add_(0, self.slots(block.y), grad_label.unsqueeze(1) * h)
            if grad_mean is not None:
                self.mean.index_add_(0, block.bucket, grad_mean.unsqueeze(1) * h)

    def finish(self, through_mean: bool) -> None:
        """Bring the dense lists and the mean's gradient to the rows.

        Every row of W has its share ``mean_k / |R|`` in the mean of each bucket k, except the
        shared ones, and except a bucket's own items in that bucket's mean.
        """
        if not self.with_weight:
            return
        p = self.p
        self.rows.index_add_(0, self.slots(p.dense), self.dense)
        if through_mean:
            share = self.mean / max(p.rest_size, 1)
            self.everywhere = share.sum(dim=0)
            self.rows += self.everywhere
            self.rows[self.slots(p.dense[: p.num_shared])] -= self.everywhere
            for k, items in enumerate(p.items):
                self.rows[self.slots(items)] -= share[k]


class _Block(NamedTuple):
    """One block of positions and its raw logits."""

    start: int
    stop: int
    at: torch.Tensor
    """``[n]`` which positions."""
    h: torch.Tensor
    y: torch.Tensor
    bucket: torch.Tensor
    label_rows: torch.Tensor
    """``[n, d]`` rows of W at the labels."""
    label_raw: torch.Tensor
    """``[n]`` raw logits of the labels."""
    x: torch.Tensor
    """``[n, S + m + K_b]`` raw logits of the lists."""
    is_label: tuple[torch.Tensor, torch.Tensor]
    """(rows, columns) of ``x`` at which the candidate is the label."""
    outside: torch.Tensor
    """``[n]`` 1 where the label lies in R."""


def _block(p: _Problem, hidden, labels, start: int, stop: int, x: torch.Tensor) -> _Block:
    at = p.order[start:stop]
    h, y, bucket = p.extend(hidden[at]), labels[at], p.bucket_of[at]
    label_rows = p.rows(y)
    torch.mm(h, p.dense_rows.T, out=x[:, : p.num_dense])
    for k, low, high in p.fragments(start, stop):
        torch.mm(h[low:high], p.rows(p.items[k]).T, out=x[low:high, p.num_dense :])
    column = p.label_column[at]
    slot, is_own = _find(y.unsqueeze(1), p.items[bucket])
    slot, is_own = slot.squeeze(1), is_own.squeeze(1)
    in_dense, in_bucket = (column >= 0).nonzero().squeeze(1), is_own.nonzero().squeeze(1)
    is_label = (
        torch.cat([in_dense, in_bucket]),
        torch.cat([column[in_dense], p.num_dense + slot[in_bucket]]),
    )
    is_shared = (column >= 0) & (column < p.num_shared)
    outside = (~is_shared & ~is_own).to(p.dtype)
    label_raw = torch.linalg.vecdot(h, label_rows)
    return _Block(start, stop, at, h, y, bucket, label_rows, label_raw, x, is_label, outside)


class _Control:
    """The control variate of one block: the mean logit over R and the tangent's sampled sums."""

    def __init__(self, p: _Problem, b: _Block, w: torch.Tensor, post: LogitTransform) -> None:
        self.rest_size = p.rest_size
        mean = torch.linalg.vecdot(b.h, _of(p.mean_rows, b.bucket))
        self.g_mean = post(mean)
        self.slope, self.curvature = post.slope(self.g_mean), post.curvature(self.g_mean)
        x_label, w_label = _at_label(b.x[:, p.tail], w, b, p)
        self.a0 = w.sum(dim=1) + b.outside - w_label
        a1 = _weighted(b.x[:, p.tail], w) + b.outside * b.label_raw - w_label * x_label
        self.spread = a1 - mean * self.a0
        self.e0 = torch.zeros_like(mean)

    def known_part(self, shift: torch.Tensor) -> torch.Tensor:
        """``e0·(|R| - A0 - g'(m)·(A1 - m·A0))`` with e0 = exp(g(m) - shift)."""
        if self.rest_size:
            self.e0 = (self.g_mean - shift).exp()
        return self.e0 * (self.rest_size - self.a0 - self.slope * self.spread)

    def mean_gradient(self) -> torch.Tensor:
        """d Zhat / dm."""
        bend = self.slope * self.slope + self.curvature
        return self.e0 * (self.slope * self.rest_size - bend * self.spread)


def _pass(hidden, weight, bias, labels, candidates, post, position_weight, needs, dtype):
    """Losses, log Zhat and clamped positions; with ``needs`` = (hidden, weight), gradients."""
    with_control = candidates.control_variate
    p = _Problem(hidden, weight, bias, labels, candidates, dtype, with_control)
    gradients = _Gradients(p, labels, *needs)
    losses = hidden.new_empty(len(hidden), dtype=dtype)
    log_partition = torch.empty_like(losses)
    num_clamped = torch.zeros((), dtype=torch.int64, device=hidden.device)

    for start, stop, buffer in p.blocks():
        b = _block(p, hidden, labels, start, stop, buffer)
        x, w = b.x, _of(p.tail_weight, b.bucket)
        control = _Control(p, b, w, post) if with_control else None  # before x is overwritten

        label_s = post(b.label_raw)
        s = post(x) if post.soft_cap is not None else x.mul_(post.scale)
        slope = post.slope(s)
        shift = torch.maximum(label_s, s.amax(dim=1)) if s.shape[1] else label_s
        if control is not None and p.rest_size:
            shift = torch.maximum(shift, control.g_mean)
        e = s.sub_(shift.unsqueeze(1)).exp_()
        e[b.is_label] = 0.0
        e_label = (label_s - shift).exp()
        e_tail = e[:, p.tail]

        z = e.sum(dim=1) + e_label + _weighted(e_tail, w - 1.0)
        if control is not None:
            known = control.known_part(shift)
            if post.soft_cap is not None:
                present = (w > 0).to(dtype)
                seen = e.sum(dim=1) + e_label + _weighted(e_tail, present - 1.0)
                clamped = z + known < seen
                num_clamped += clamped.sum()
                z, known = torch.where(clamped, seen, z), known.masked_fill(clamped, 0.0)
                control.e0 = control.e0.masked_fill(clamped, 0.0)
                w = torch.where(clamped.unsqueeze(1), present, w)
            z = z + known
        log_z = z.log() + shift
        losses[b.at], log_partition[b.at] = log_z - label_s, log_z
        if not any(needs):
            continue

        per_row = position_weight if position_weight.dim() == 0 else position_weight[b.at]
        per_row = per_row / z
        e_tail *= w
        grad = e.mul_(slope)
        grad_label = (e_label - z) * post.slope(label_s)
        grad_mean = None
        if control is not None:
            pull = control.e0 * control.slope
            grad[:, p.tail].addcmul_(pull.unsqueeze(1), w, value=-1.0)
            grad[b.is_label] = 0.0
            grad_label = grad_label - pull * b.outside
            grad_mean = control.mean_gradient() * per_row
        grad *= per_row.unsqueeze(1)
        gradients.add(b, grad, grad_label * per_row, grad_mean)

    gradients.finish(through_mean=with_control and not candidates.sparse_grad)
    return losses, log_partition, num_clamped, gradients


class _CandidateCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, candidates, post, position_weight, grad_enabled):
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:3]]
        ctx.needs = (needs[0], needs[1] or needs[2])
        ctx.candidates, ctx.post = candidates, post
        ctx.dtype = compute_dtype(hidden, weight)
        ctx.scalar = position_weight is not None
        now = ctx.needs if ctx.scalar else (False, False)
        losses, log_partition, num_clamped, gradients = _pass(
            hidden, weight, bias, labels, candidates, post, position_weight, now, ctx.dtype
        )
        ctx.mark_non_differentiable(log_partition, num_clamped)
        ctx.save_for_backward(hidden, weight, bias, labels)
        if not ctx.scalar:
            return losses, log_partition, num_clamped
        ctx.gradients = gradients if any(now) else None
        return (losses * position_weight).sum(), log_partition, num_clamped

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        hidden, weight, bias, labels = ctx.saved_tensors
        factor = grad_outputs[0].to(ctx.dtype)
        gradients = ctx.gradients if ctx.scalar else None
        if gradients is None:
            gradients = _pass(
                hidden, weight, bias, labels, ctx.candidates, ctx.post, factor, ctx.needs, ctx.dtype
            )[3]
            factor = torch.ones_like(factor[0])
        width = weight.shape[1]
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (gradients.hidden[:, :width] * factor).to(hidden.dtype)
        if ctx.needs[1]:
            rows, everywhere = gradients.rows * factor, gradients.everywhere * factor
            if ctx.needs_input_grad[1]:
                grad_weight = _at_rows(
                    weight,
                    gradients.ids,
                    rows[:, :width],
                    everywhere[:width],
                    sparse=ctx.candidates.sparse_grad,
                )
            if bias is not None and ctx.needs_input_grad[2]:
                grad_bias = _at_rows(bias, gradients.ids, rows[:, width], everywhere[width])
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _at_rows(like, ids, rows, everywhere, *, sparse: bool = False) -> torch.Tensor:
    """``rows`` at ``ids`` and ``everywhere`` at all others, in the dtype and shape of ``like``."""
    rows = rows.to(like.dtype)
    if sparse:
        return torch.sparse_coo_tensor(
            ids.unsqueeze(0), rows, like.shape, is_coalesced=True, check_invariants=False
        )
    full = everywhere.to(like.dtype).expand_as(like).clone(memory_format=torch.contiguous_format)
    return full.index_copy_(0, ids, rows)


def _of(table: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
    """Each position's row of a table with one row a bucket; a single row broadcasts."""
    return table if len(table) == 1 else table[bucket]


def _weighted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Sum over columns of x·w, for w ``[n, m]`` or ``[1, m]``."""
    return x @ w[0] if len(w) == 1 else torch.linalg.vecdot(x, w)


def _at_label(x_tail, w, b: _Block, p: _Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw logit and weight of the label's own tail column, ``[n]``; 0 where it was not drawn."""
    column = p.label_column[b.at] - p.num_shared
    drawn = column >= 0
    if p.num_tail == 0:
        return torch.zeros_like(b.label_raw), torch.zeros_like(b.label_raw)
    column = column.clamp_min(0).unsqueeze(1)
    weight = w.expand(len(x_tail), -1).gather(1, column).squeeze(1) * drawn
    return x_tail.gather(1, column).squeeze(1) * drawn, weight


def _find(ids: torch.Tensor, ascending: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot of each id in an ascending list (last dimension), and whether it is there."""
    if ascending.shape[-1] == 0:
        return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    slot = torch.searchsorted(ascending, ids).clamp_max_(ascending.shape[-1] - 1)
    return slot, ascending.expand(*ids.shape[:-1], -1).gather(-1, slot) == ids
