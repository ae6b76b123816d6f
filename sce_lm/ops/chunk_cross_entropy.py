"""Cross-entropy over the union of the chunks of classes that a position meets in several rounds.

Each round cuts positions and classes into chunks; a position meets the classes of its own chunk and
of ``reach`` chunks on either side:

    j in C_r(t)  if  |chunk_r(j) - chunk_r(t)| <= reach
    loss_t = log(exp s_ty + sum_{j in union of C_r(t), j != y} exp s_tj) - s_ty

A class that was met in an earlier round is left out of the later ones, which both chunk numbers
tell without a search. Products are dense, chunk by chunk, and no ``[N, K]`` logits are kept: a
first pass gives log Zhat, a second computes the logits again for the gradients. Every class is in
some chunk, so that the gradient of W is dense; it is summed in fp32 and cast once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from sce_lm.ops.dispatch import Backend, kernels
from sce_lm.ops.exact_cross_entropy import compute_dtype
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.rows import HeadColumns, Needs

BLOCK_ELEMENTS = 2**22
"""Logits held at a time (16 MiB in fp32; about three such buffers are live)."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Which positions meet which classes; chosen without gradient."""

    of_position: torch.Tensor
    """``[R, N]`` int64: the chunk of each position in each round."""
    of_class: torch.Tensor
    """``[R, V]`` int64: the chunk of each class; ``count + reach``: no position meets it."""
    count: int
    """Chunks of a round."""
    reach: int
    """Chunks on either side that a position also meets."""


def chunk_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    chunks: Chunks,
    *,
    bias: torch.Tensor | None = None,
    low_rank: torch.Tensor | None = None,
    post: LogitTransform = LogitTransform(),
    position_weight: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Cross-entropy over the union of each position's chunks.

    Args:
        hidden: ``[N, d]``, fp16, bf16, fp32 or fp64; N >= 1. ``[N, d + r]`` with ``low_rank``.
        weight: ``[V, d]``.
        labels: ``[N]`` int64 in ``[0, V)``.
        chunks: the rounds.
        bias: ``[V]`` or None.
        low_rank: ``[V, r]`` or None: further columns of the weight, in a tensor of their own.
        post: the map from raw logits to softmax logits.
        position_weight: 0-dim tensor. Given: the result is the sum of losses times this and the
            gradients are taken in the forward pass. None: the result is ``[N]``.
        backend: :data:`~sce_lm.ops.dispatch.Backend`.

    Raises:
        ValueError: backend "triton", and it cannot run.
    """
    run = kernels("chunk_cross_entropy", backend, hidden, weight, bias, low_rank, chunks)
    if run is not None:
        options = {"bias": bias, "post": post, "position_weight": position_weight}
        return run(hidden, weight, labels, chunks, **options)
    return _ChunkCrossEntropy.apply(
        hidden,
        weight,
        low_rank,
        bias,
        labels,
        chunks,
        post,
        position_weight,
        torch.is_grad_enabled(),
    )


class _Piece(NamedTuple):
    """A chunk of positions with the classes that it meets for the first time in this round."""

    positions: torch.Tensor
    classes: torch.Tensor
    s: torch.Tensor
    """``[n, k]`` logits, -inf where a class is the label or was met before."""
    slope: torch.Tensor | float


class _Problem:
    """A call's tensors, hidden states with a 1 that meets the bias."""

    def __init__(self, hidden, columns, labels, chunks, post, dtype):
        self.hidden = columns.extend(hidden, dtype)
        self.columns, self.labels = columns, labels
        self.chunks, self.post, self.dtype = chunks, post, dtype

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.columns.rows(ids, self.dtype)

    def pieces(self) -> Iterator[tuple[_Piece, torch.Tensor]]:
        """Every chunk of every round, and the rows of its classes."""
        c = self.chunks
        for r, (of_position, of_class) in enumerate(zip(c.of_position, c.of_class)):
            position_parts = _members(of_position, c.count)
            class_parts = _members(of_class, c.count)
            for i, members in enumerate(position_parts):
                if len(members) == 0:
                    continue
                classes = torch.cat(class_parts[max(0, i - c.reach) : i + c.reach + 1])
                rows = self.rows(classes)
                for positions in members.split(max(1, BLOCK_ELEMENTS // max(len(classes), 1))):
                    yield self._piece(r, positions, classes, rows), rows

    def _piece(self, r: int, positions, classes, rows) -> _Piece:
        c = self.chunks
        s = self.post(self.hidden[positions] @ rows.T)
        known = classes == self.labels[positions, None]
        for earlier in range(r):
            distance = c.of_class[earlier, classes] - c.of_position[earlier, positions, None]
            known |= distance.abs() <= c.reach
        return _Piece(positions, classes, s.masked_fill(known, -torch.inf), self.post.slope(s))


def _members(chunk: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The indices in each chunk."""
    sizes = torch.bincount(chunk, minlength=count).tolist()
    return list(torch.argsort(chunk, stable=True).split(sizes))


class _Gradients(NamedTuple):
    """``[N, D]``, and ``[V, D]`` without the columns that are frozen; empty where not asked for."""

    hidden: torch.Tensor
    rows: torch.Tensor


def _pass(p: _Problem, position_weight, needs: Needs) -> tuple[torch.Tensor, _Gradients]:
    """Losses, and the gradients that are needed."""
    needs_hidden, needs_rows = needs.hidden, any(needs.head)
    label_rows = p.rows(p.labels)
    label_s = p.post(torch.linalg.vecdot(p.hidden, label_rows))
    log_z = label_s.clone()
    for piece, _ in p.pieces():
        met = torch.logsumexp(piece.s, dim=1)
        log_z[piece.positions] = torch.logaddexp(log_z[piece.positions], met)

    trained = p.hidden[:, p.columns.num_frozen(needs.head) :]
    grad_hidden = p.hidden.new_zeros(len(p.labels) if needs_hidden else 0, p.hidden.shape[1])
    vocab_size = len(p.columns.weight)
    grad_rows = p.hidden.new_zeros(vocab_size if needs_rows else 0, trained.shape[1])
    if needs:
        per_row = position_weight.expand_as(log_z)
        g = (torch.exp(label_s - log_z) - 1.0) * p.post.slope(label_s) * per_row
        if needs_hidden:
            grad_hidden.addcmul_(g.unsqueeze(1), label_rows)
        if needs_rows:
            grad_rows.index_add_(0, p.labels, g.unsqueeze(1) * trained)
        for piece, rows in p.pieces():
            at = piece.positions
            g = (piece.s - log_z[at, None]).exp() * piece.slope * per_row[at, None]
            if needs_hidden:
                grad_hidden[at] += g @ rows
            if needs_rows:
                grad_rows.index_add_(0, piece.classes, g.T @ trained[at])
    return log_z - label_s, _Gradients(grad_hidden, grad_rows)


class _ChunkCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, low_rank, bias, labels, chunks, post, position_weight, grad_enabled
    ):
        columns = HeadColumns(weight, low_rank, bias)
        ctx.needs = Needs.of(ctx, grad_enabled)
        ctx.chunks, ctx.post, ctx.dtype = chunks, post, compute_dtype(hidden, weight)
        ctx.scalar = position_weight is not None
        problem = _Problem(hidden, columns, labels, chunks, post, ctx.dtype)
        losses, gradients = _pass(problem, position_weight, ctx.needs if ctx.scalar else Needs())
        ctx.save_for_backward(hidden, *columns, labels)
        if not ctx.scalar:
            return losses
        ctx.gradients = gradients
        return losses.sum() * position_weight

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        hidden, *head, labels = ctx.saved_tensors
        columns = HeadColumns(*head)
        factor = grad_outputs[0].to(ctx.dtype)
        if ctx.scalar:
            gradients = ctx.gradients
        else:
            problem = _Problem(hidden, columns, labels, ctx.chunks, ctx.post, ctx.dtype)
            gradients = _pass(problem, factor, ctx.needs)[1]
            factor = torch.ones_like(factor[0])
        grad_hidden = None
        if ctx.needs.hidden:
            grad_hidden = (gradients.hidden[:, : hidden.shape[1]] * factor).to(hidden.dtype)
        of_head = [
            None if part is None or rows is None else (rows * factor).to(part.dtype)
            for part, rows in zip(columns, columns.split(ctx.needs.head, gradients.rows))
        ]
        return grad_hidden, *of_head, None, None, None, None, None
