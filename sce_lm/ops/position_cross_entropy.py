"""Losses over candidates that each position has for itself, or weighs for itself.

    softmax:  log(exp s_ty + sum_k exp(c_tk + s_tk)) - s_ty
    binary:   (beta·softplus(-s_ty) + sum_k exp(c_tk)·softplus(s_tk)) / (1 + K),     s = g(h·w + b)

The candidates of position t are a row of ids ``[N, K]``, or one list ``[1, K]`` that all positions
share and may weigh differently. Drawn again means counted again: an id that stands k times in a row
has k terms. A candidate that is the position's label is left out unless it is asked for.

The label is one more column of a position's own ids, with weight 1. With G the gradient with
respect to the raw logits, ``[N, 1 + K]``,

    dH = G · rows,       dW[j] = sum over (t, k) with id j of G_tk · h_t

and both are weighted bags of rows, so that rows are gathered as ``[n, K, d]`` for one block of
positions and for the logits alone. For a scalar loss the gradients are taken in the forward pass;
for a loss per position they are computed again. Only the distinct rows of W are widened to fp32,
and their gradient is summed in fp32 and cast once. A low-rank operand and a bias are further
columns of W (module :mod:`sce_lm.ops.head`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import embedding_bag, pad, softplus

from sce_lm.ops.dispatch import Backend, kernels
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head, Needs
from sce_lm.ops.head_loss import Found, OfInputs, Pass, head_loss
from sce_lm.ops.positions import LossTerms, Positions
from sce_lm.ops.static_shapes import needs_static_shapes

BLOCK_ELEMENTS = 2**22
"""Elements of the gathered rows, or logits, of a block of positions (16 MiB in fp32)."""

Terms = Callable[
    [torch.Tensor, torch.Tensor, LossTerms], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]
"""``s [n, 1 + K]`` (label first), log-weights of the same shape and the terms of a softmax's loss
-> loss ``[n]``, log Zhat ``[n]`` (or the loss again) and the loss's gradient with respect to s."""


@dataclass(frozen=True, slots=True)
class PositionCandidates:
    """The classes that stand in for the catalogue at each position; chosen without gradient."""

    ids: torch.Tensor
    """``[N, K]`` int64, or ``[1, K]``: the same list for every position."""
    log_weights: torch.Tensor
    """``[N, K]`` or ``[1, K]`` c; -inf is an empty slot, whose id may be any."""
    keep_label: bool = False
    """Count candidates that are the position's own label, beside the label itself."""
    sparse_grad: bool = False
    """Gradient of the weight as a sparse tensor of the rows that were touched."""


class PositionLoss(NamedTuple):
    """What :func:`position_cross_entropy` returns."""

    loss: torch.Tensor
    """The positions' weighted sum of losses, or ``[N]`` if they have no weight."""
    log_partition: torch.Tensor
    """``[N]`` log Zhat_t, without gradient."""


def position_cross_entropy(
    head: Head,
    positions: Positions,
    candidates: PositionCandidates,
    *,
    backend: Backend = "auto",
) -> PositionLoss:
    """Cross-entropy over each position's own candidates.

    Args:
        head: the output head.
        positions: N >= 1 of them; where they have a weight the gradients are taken in the forward
            pass.
        candidates: ids and log-weights.
        backend: :data:`~sce_lm.ops.dispatch.Backend`; there are no kernels yet.

    Raises:
        ValueError: backend "triton".
    """
    kernels("position_cross_entropy", backend, positions.hidden.device)
    loss, (log_partition,) = head_loss(PositionPass(candidates, _softmax), head, positions)
    return PositionLoss(loss, log_partition)


def position_binary_cross_entropy(
    head: Head,
    positions: Positions,
    candidates: PositionCandidates,
    *,
    positive_weight: float = 1.0,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Mean binary cross-entropy over label and candidates; arguments as above.

    Args:
        positive_weight: beta on the label's term. ``beta·softplus(-s) = -log(sigmoid(s)^beta)``.

    Returns:
        The positions' weighted sum of losses, or ``[N]`` if they have no weight.
    """
    kernels("position_binary_cross_entropy", backend, positions.hidden.device)
    run = PositionPass(candidates, _Binary(positive_weight))
    return head_loss(run, head, positions)[0]


def _softmax(s, log_weights, terms):
    z = s + log_weights
    log_partition = torch.logsumexp(z, dim=1)
    one = torch.ones_like(log_partition)
    gradient = (z - log_partition.unsqueeze(1)).exp()
    if terms:
        gradient *= terms.of_partition(one, log_partition).unsqueeze(1)
    gradient[:, 0] -= terms.of_label(one)
    return terms.losses(log_partition, s[:, 0]), log_partition, gradient


class _Binary(NamedTuple):
    positive_weight: float

    def __call__(self, s, log_weights, _):
        share = log_weights.exp() / s.shape[1]
        share[:, 0] *= self.positive_weight
        sign = torch.ones_like(s)
        sign[:, 0] = -1.0
        loss = (share * softplus(sign * s)).sum(dim=1)
        return loss, loss, share * sign * torch.sigmoid(sign * s)


class _Touched:
    """A call's distinct rows of W (with static shapes all of them, or some repeated), and where
    each position's label and candidates lie in them."""

    def __init__(self, head: Head, positions: Positions, candidates: PositionCandidates) -> None:
        self.head, self.hidden, labels = head, positions.hidden, positions.labels
        self.labels, self.candidates = labels, candidates
        self.dtype = compute_dtype(positions.hidden, head.weight)
        self.is_shared = len(candidates.ids) == 1 and len(labels) > 1
        flat = torch.cat([labels, candidates.ids.reshape(-1)])
        self.is_repeated = needs_static_shapes(flat.device) and len(flat) < head.vocab_size
        if self.is_repeated:
            self.touched = flat.sort().values
            slots = self.slots(flat)
        elif needs_static_shapes(flat.device):
            self.touched, slots = torch.arange(head.vocab_size, device=flat.device), flat
        else:
            self.touched, slots = torch.unique(flat, return_inverse=True)
        label, listed = slots[: len(labels), None], slots[len(labels) :].view_as(candidates.ids)
        self.own = label if self.is_shared else torch.cat([label, listed], dim=1)
        """``[N, P]`` slots of what a position alone has: its label first."""
        self.common = listed[0] if self.is_shared else listed.new_empty(0)
        """``[K]`` slots of the shared list."""
        self.rows = head.rows(self.touched, self.dtype)
        self.common_rows = self.rows[self.common]

    def slots(self, ids: torch.Tensor) -> torch.Tensor:
        """The first place of each id among the touched rows."""
        return torch.searchsorted(self.touched, ids)

    def extend(self, positions: slice) -> torch.Tensor:
        """Hidden states, with a 1 that meets the bias."""
        return self.head.extend(self.hidden[positions], self.dtype)

    def blocks(self) -> list[slice]:
        columns = self.own.shape[1] * self.rows.shape[1] + len(self.common)
        step = max(1, BLOCK_ELEMENTS // columns)
        return [slice(at, at + step) for at in range(0, len(self.labels), step)]

    def raw_logits(self, h: torch.Tensor, positions: slice) -> torch.Tensor:
        """``[n, 1 + K]``, label first."""
        own = torch.bmm(self.rows[self.own[positions]], h.unsqueeze(2)).squeeze(2)
        return torch.cat([own, h @ self.common_rows.T], dim=1)

    def log_weights(self, positions: slice) -> torch.Tensor:
        """``[n, 1 + K]``: 0 for the label, -inf for a candidate that is the label."""
        c, y = self.candidates, self.labels[positions, None]
        ids = c.ids if self.is_shared else c.ids[positions]
        weights = c.log_weights if len(c.log_weights) == 1 else c.log_weights[positions]
        weights = weights.to(self.dtype).expand(len(y), -1)
        if not c.keep_label:
            weights = weights.masked_fill(ids == y, -torch.inf)
        return pad(weights, (1, 0))

    def hidden_gradient(self, g: torch.Tensor, positions: slice) -> torch.Tensor:
        """``G · rows`` of a block."""
        own = self.own[positions]
        bags = embedding_bag(
            own, self.rows, mode="sum", per_sample_weights=g[:, : own.shape[1]].contiguous()
        )
        return bags.addmm_(g[:, own.shape[1] :], self.common_rows)

    def row_gradient(self, g_own: torch.Tensor, num_frozen: int) -> torch.Tensor:
        """``dW`` at the touched rows, from column ``num_frozen`` on, by G of the positions' own
        candidates."""
        slots, order = torch.sort(self.own.reshape(-1), stable=True)
        starts = torch.searchsorted(slots, torch.arange(len(self.rows), device=slots.device))
        return embedding_bag(
            order // self.own.shape[1],
            self.extend(slice(None))[:, num_frozen:],
            starts,
            mode="sum",
            per_sample_weights=g_own.reshape(-1)[order],
        )


class _Gradients(NamedTuple):
    """Gradients with respect to ``[N, D]`` hidden states and the ``[U, D]`` touched rows, these
    without the columns that are frozen; without rows where they were not asked for."""

    head: Head
    needs: Needs
    touched: torch.Tensor
    """``[U]`` their ids, ascending, and distinct unless shapes are static."""
    sparse: bool
    hidden: torch.Tensor
    rows: torch.Tensor

    def of_inputs(self, factor: torch.Tensor | None = None) -> OfInputs:
        if factor is not None:
            self.hidden.mul_(factor)
            self.rows.mul_(factor)
        of_head = [None] * 3
        if any(self.needs.head):
            of_head = self.head.gradients(
                self.needs.head, self.touched, self.rows, sparse=self.sparse
            )
        return self.hidden if self.needs.hidden else None, *of_head


@dataclass(frozen=True)
class PositionPass(Pass):
    """Over blocks of positions, each with its own candidates."""

    candidates: PositionCandidates
    terms: Terms

    def forward(self, head: Head, positions: Positions, needs: Needs) -> Found:
        p = _Touched(head, positions, self.candidates)
        needs_hidden, needs_rows = needs.hidden, any(needs.head)
        num_frozen = head.num_frozen(needs.head)
        num_positions, num_own = p.own.shape
        losses = p.rows.new_empty(num_positions)
        log_partition = torch.empty_like(losses)
        grad_hidden = p.rows.new_empty(num_positions if needs_hidden else 0, p.rows.shape[1])
        g_own = p.rows.new_empty(num_positions if needs_rows else 0, num_own)
        grad_common = torch.zeros_like(p.common_rows[:, num_frozen:])
        for block in p.blocks():
            h = p.extend(block)
            s = head.post(p.raw_logits(h, block))
            losses[block], log_partition[block], g = self.terms(
                s, p.log_weights(block), positions.terms
            )
            if not needs:
                continue
            assert positions.weight is not None
            per_row = positions.weight
            per_row = per_row[block, None] if per_row.dim() else per_row
            g = g * head.post.slope(s) * per_row
            if needs_hidden:
                grad_hidden[block] = p.hidden_gradient(g, block)
            if needs_rows:
                g_own[block] = g[:, :num_own]
                grad_common.addmm_(g[:, num_own:].T, h[:, num_frozen:])
        grad_rows = p.rows.new_empty(0, p.rows.shape[1])
        if needs_rows:
            grad_rows = p.row_gradient(g_own, num_frozen).index_add_(0, p.common, grad_common)
            if p.is_repeated:
                grad_rows = grad_rows[p.slots(p.touched)]
        sparse = self.candidates.sparse_grad
        gradients = _Gradients(head, needs, p.touched, sparse, grad_hidden, grad_rows)
        return Found(losses, (log_partition,), gradients)
