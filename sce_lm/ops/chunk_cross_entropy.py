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
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from sce_lm.ops.dispatch import Backend, kernels
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head, Needs
from sce_lm.ops.head_loss import Found, OfInputs, Pass, head_loss
from sce_lm.ops.positions import Positions

BLOCK_ELEMENTS = 2**22
"""Logits held at a time (16 MiB in fp32; about three such buffers are live)."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Which positions meet which classes; chosen without gradient."""

    of_position: torch.Tensor
    """``[R, N]`` int64: the chunk of each position in each round. The k-th of n in the order of
    chunks, those without a label aside, is in chunk ``k·count // n``."""
    of_class: torch.Tensor
    """``[R, V]`` int64: the chunk of each class, cut alike; ``count + reach``: a masked class,
    which no position meets."""
    count: int
    """Chunks of a round."""
    reach: int
    """Chunks on either side that a position also meets."""


def chunk_cross_entropy(
    head: Head, positions: Positions, chunks: Chunks, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Cross-entropy over the union of each position's chunks.

    Args:
        head: the output head.
        positions: N >= 1 of them.
        chunks: the rounds.
        backend: :data:`~sce_lm.ops.dispatch.Backend`.

    Returns:
        The positions' weighted sum of losses, or ``[N]`` if they have no weight.

    Raises:
        ValueError: backend "triton", and it cannot run.
    """
    run = kernels("chunk_cross_entropy", backend, positions.hidden.device, head, positions, chunks)
    if run is not None:
        return run(head, positions, chunks)
    return head_loss(ChunkPass(chunks), head, positions)[0]


class _Piece(NamedTuple):
    """A chunk of positions with the classes that it meets for the first time in this round."""

    positions: torch.Tensor
    classes: torch.Tensor
    s: torch.Tensor
    """``[n, k]`` logits, -inf where a class is the label or was met before."""
    slope: torch.Tensor | float


class _Rounds:
    """A call's tensors, hidden states with a 1 that meets the bias."""

    def __init__(self, head: Head, positions: Positions, chunks: Chunks) -> None:
        self.dtype = compute_dtype(positions.hidden, head.weight)
        self.hidden = head.extend(positions.hidden, self.dtype)
        self.head, self.labels, self.chunks = head, positions.labels, chunks
        self.is_valid, self.of_position = positions.is_valid, chunks.of_position
        if positions.is_valid is not None:  # one more for empty places
            self.hidden = pad(self.hidden, (0, 0, 0, 1))
            self.labels, self.of_position = pad(self.labels, (0, 1)), pad(self.of_position, (0, 1))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head.rows(ids, self.dtype)

    def pieces(self) -> Iterator[tuple[_Piece, torch.Tensor]]:
        """Every chunk of every round, and the rows of its classes."""
        c = self.chunks
        for r, (of_position, of_class) in enumerate(zip(c.of_position, c.of_class)):
            if self.is_valid is None:
                position_parts = _members(of_position, c.count, len(of_position))
            else:
                position_parts = _valid_members(of_position, c.count, self.is_valid)
            class_parts = _members(of_class, c.count, self.head.num_classes)
            for i, members in enumerate(position_parts):
                classes = torch.cat(class_parts[max(0, i - c.reach) : i + c.reach + 1])
                rows = self.rows(classes)
                for positions in members.split(max(1, BLOCK_ELEMENTS // max(len(classes), 1))):
                    yield self._piece(r, positions, classes, rows), rows

    def _piece(self, r: int, positions, classes, rows) -> _Piece:
        c = self.chunks
        s = self.head.post(self.hidden[positions] @ rows.T)
        known = classes == self.labels[positions, None]
        for earlier in range(r):
            distance = c.of_class[earlier, classes] - self.of_position[earlier, positions, None]
            known |= distance.abs() <= c.reach
        return _Piece(positions, classes, s.masked_fill(known, -torch.inf), self.head.post.slope(s))


def _members(chunk: torch.Tensor, count: int, num_cut: int) -> list[torch.Tensor]:
    """The indices in each chunk, of ``num_cut`` that are in one."""
    edges = [-(-i * num_cut // count) for i in range(count + 1)]
    order = torch.argsort(chunk, stable=True)
    return [order[start:stop] for start, stop in pairwise(edges)]


def _valid_members(
    chunk: torch.Tensor, count: int, is_valid: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The same for the valid ones of N, whose number the host does not know: as many as a chunk can
    hold, N in empty places."""
    total = len(chunk)
    order = torch.argsort(chunk.masked_fill(~is_valid, count), stable=True)
    edges = torch.arange(count + 1, device=chunk.device) * is_valid.sum()
    edges = (edges + (count - 1)) // count
    place = edges[:-1, None] + torch.arange(-(-total // count), device=chunk.device)
    members = order[place.clamp_max(total - 1)]
    return members.masked_fill_(place >= edges[1:, None], total).unbind()


class _Gradients(NamedTuple):
    """``[N, D]``, and ``[V, D]`` without the columns that are frozen; empty where not asked for."""

    head: Head
    needs: Needs
    hidden: torch.Tensor
    rows: torch.Tensor

    def of_inputs(self, factor: torch.Tensor | None = None) -> OfInputs:
        if factor is not None:
            self.hidden.mul_(factor)
            self.rows.mul_(factor)
        of_head = self.head.split(self.needs.head, self.rows)
        return self.hidden if self.needs.hidden else None, *of_head


class ChunkPass(Pass):
    """Over every chunk of every round, twice where gradients are wanted."""

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks

    def forward(self, head: Head, positions: Positions, needs: Needs) -> Found:
        p, post = _Rounds(head, positions, self.chunks), head.post
        needs_hidden, needs_rows = needs.hidden, any(needs.head)
        label_rows = p.rows(p.labels)
        label_s = post(torch.linalg.vecdot(p.hidden, label_rows))
        log_z = label_s.clone()
        for piece, _ in p.pieces():
            met = torch.logsumexp(piece.s, dim=1)
            log_z[piece.positions] = torch.logaddexp(log_z[piece.positions], met)

        trained = p.hidden[:, head.num_frozen(needs.head) :]
        count = len(positions)
        grad_hidden = p.hidden.new_zeros(len(p.labels) if needs_hidden else 0, p.hidden.shape[1])
        num_rows = head.vocab_size if needs_rows else 0
        grad_rows = p.hidden.new_zeros(num_rows, trained.shape[1])
        if needs:
            assert positions.weight is not None
            share = pad(positions.weight.expand(count), (0, len(log_z) - count))
            per_row = positions.terms.of_partition(share, log_z)
            g = torch.exp(label_s - log_z) * per_row - positions.terms.of_label(share)
            g = g * post.slope(label_s)
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
        gradients = _Gradients(head, needs, grad_hidden[:count], grad_rows)
        losses = positions.terms.losses(log_z, label_s)
        return Found(losses[:count], gradients=gradients)
