"""Exact divergence of a head's softmax from a teacher's, streamed.

The equations are those of :mod:`sce_lm.ops.divergence` and :mod:`sce_lm.ops.teachers`.

By blocks of positions, where a block of logits over all classes holds enough of them to keep the
products busy: logits of student and teacher are held once, and the gradients come from those very
logits. By tiles of classes otherwise, and for a trained weight of less than fp32, whose gradient
must be summed in fp32: one pass finds both normalisers, one the divergence and its pull K, and a
third, in backward, the gradients, each row of which is finished within its tile and written once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sce_lm.ops.divergence import Divergence
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.gradient_memory import gradient_memory
from sce_lm.ops.head import Head, Needs
from sce_lm.ops.head_loss import Found, Gradients, OfInputs, Pass, head_loss
from sce_lm.ops.positions import Positions
from sce_lm.ops.teachers import Teacher, class_tiles, logits_of

BLOCK_ELEMENTS = 2**24
"""Logits of a block of positions (64 MiB in fp32; about five such buffers are live)."""
MIN_BLOCK = 32
"""Positions below which a block is not worth it."""
TILE_POSITIONS = 1024
"""Positions multiplied with a tile of classes at a time."""


def exact_divergence(
    head: Head, positions: Positions, teacher: Teacher, divergence: Divergence
) -> torch.Tensor:
    """The positions' weighted sum of divergences, or ``[N]`` if they have no weight.

    Args:
        head: the student's output head.
        positions: N >= 1 of them, the student's hidden states; labels take no part.
        teacher: of the same N positions and V classes.
        divergence: which one.
    """
    return head_loss(DivergencePass(teacher, divergence), head, positions)[0]


class _Gradients:
    """Sums of the gradients with respect to hidden states, weight, low_rank and bias."""

    def __init__(self, head: Head, hidden: torch.Tensor, share: torch.Tensor, needs: Needs) -> None:
        self.head, self.needs = head, needs
        self.share = share.expand(len(hidden)).unsqueeze(1)
        self.hidden = torch.zeros_like(hidden) if needs.hidden else None
        self.of_head = [
            gradient_memory(part, part.dtype) if need and part is not None else None
            for part, need in zip(head.tensors, needs.head)
        ]
        self.weighted = hidden[:, head.num_frozen(needs.head) :] * self.share
        self.of_tile = hidden.new_empty(0)

    def add(self, rows: slice, w: torch.Tensor, g: torch.Tensor, *, anew: bool) -> None:
        """Take in G ``[n, k]`` of some positions at the rows ``w [k, D]`` of a tile.

        Args:
            anew: these are the first positions of that tile.
        """
        if self.hidden is not None:
            self.hidden[rows].addmm_(g, w)
        if any(self.needs.head):
            if anew:
                self.of_tile = torch.mm(g.T, self.weighted[rows])
            else:
                self.of_tile.addmm_(g.T, self.weighted[rows])

    def write(self, classes: slice, *, anew: bool) -> None:
        """Bring the tile's sums to the head's gradients, or add them to what is there."""
        if not any(self.needs.head):
            return
        for grad, mine in zip(self.of_head, self.head.split(self.needs.head, self.of_tile)):
            if grad is not None and mine is not None:
                if anew:
                    grad[classes] = mine
                else:
                    grad[classes] += mine

    def of_inputs(self, factor: torch.Tensor | None = None) -> OfInputs:
        of_hidden = None if self.hidden is None else self.hidden.mul_(self.share)
        found = (of_hidden, *self.of_head)
        if factor is None:
            return found
        return tuple(None if g is None else g.mul_(factor) for g in found)


class _Normalisers(NamedTuple):
    """What a pass over tiles needs to know of each position, ``[N, 1]``."""

    student: torch.Tensor
    """log Z."""
    teacher: torch.Tensor
    """B."""


class DivergencePass(Pass):
    """By blocks of positions where they fit, else by tiles of classes."""

    def __init__(self, teacher: Teacher, divergence: Divergence) -> None:
        self.teacher, self.divergence = teacher, divergence

    def forward(self, head: Head, positions: Positions, needs: Needs) -> Found:
        if _fits(head, positions, needs):
            return self._by_blocks(head, positions, needs)
        tiles = _Tiles(head, positions, self.teacher, self.divergence)
        normalisers = tiles.normalisers()
        losses, pull = tiles.sums(normalisers)
        return Found(losses, kept=torch.cat([*normalisers, pull.unsqueeze(1)], dim=1))

    def backward(
        self, head: Head, positions: Positions, needs: Needs, kept: torch.Tensor | None
    ) -> Gradients:
        if _fits(head, positions, needs):
            return super().backward(head, positions, needs, None)
        tiles = _Tiles(head, positions, self.teacher, self.divergence)
        if kept is None:
            normalisers = tiles.normalisers()
            pull = tiles.sums(normalisers)[1]
        else:
            student, teacher, pull = kept.split(1, dim=1)
            normalisers, pull = _Normalisers(student, teacher), pull.squeeze(1)
        return tiles.gradients(normalisers, pull, needs)

    def _by_blocks(self, head: Head, positions: Positions, needs: Needs) -> Found:
        hidden = head.extend(positions.hidden, compute_dtype(positions.hidden, head.weight))
        count, everything = len(hidden), slice(0, head.vocab_size)
        losses = hidden.new_empty(count)
        gradients = None
        if needs:
            assert positions.weight is not None
            gradients = _Gradients(head, hidden, positions.weight, needs)
        block = min(count, max(1, BLOCK_ELEMENTS // head.vocab_size))
        buffer = hidden.new_empty(block, head.vocab_size)
        other = hidden.new_empty(block, head.vocab_size + 1)
        for start in range(0, count, block):
            rows = slice(start, min(start + block, count))
            s = logits_of(head, hidden[rows], everything, buffer)
            slope = head.post.slope(s) if needs else 1.0
            x = self.teacher.terms(rows, everything, s, other)
            log_p = s.sub_(torch.logsumexp(s, dim=1, keepdim=True))
            x = x.sub_(torch.logsumexp(x, dim=1, keepdim=True))
            terms = self.divergence(log_p, self.teacher.log_probs(rows, everything, x))
            losses[rows] = terms.losses
            if gradients is None:
                continue
            g = terms.gradient_(terms.pull)
            g.mul_(slope)
            for classes in class_tiles(everything):
                w = head.rows(classes, hidden.dtype)
                gradients.add(rows, w, g[:, classes], anew=True)
                gradients.write(classes, anew=start == 0)
        return Found(losses, gradients=gradients)


def _fits(head: Head, positions: Positions, needs: Needs) -> bool:
    """Whether blocks of positions are large enough, and gradients can be summed in place."""
    dtype = compute_dtype(positions.hidden, head.weight)
    in_place = all(
        part is None or part.dtype == dtype for part, need in zip(head.tensors, needs.head) if need
    )
    return in_place and min(len(positions), MIN_BLOCK) * head.vocab_size <= BLOCK_ELEMENTS


class _Tiles:
    """The passes over tiles of classes."""

    def __init__(
        self, head: Head, positions: Positions, teacher: Teacher, divergence: Divergence
    ) -> None:
        self.head, self.positions = head, positions
        self.teacher, self.divergence = teacher, divergence
        self.hidden = head.extend(positions.hidden, compute_dtype(positions.hidden, head.weight))
        count = len(self.hidden)
        self.blocks = [
            slice(start, min(start + TILE_POSITIONS, count))
            for start in range(0, count, TILE_POSITIONS)
        ]
        self.tiles = class_tiles(slice(0, head.vocab_size))
        shape = (self.blocks[0].stop, self.tiles[0].stop)
        self.buffer = self.hidden.new_empty(shape)
        self.other = self.hidden.new_empty(shape[0], shape[1] + 1)

    def _terms(self, rows: slice, classes: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """``[n, k]`` the student's logits and the teacher's x."""
        s = logits_of(self.head, self.hidden[rows], classes, self.buffer)
        return s, self.teacher.terms(rows, classes, s, self.other)

    def normalisers(self) -> _Normalisers:
        """The first pass."""
        found = self.hidden.new_full((2, len(self.hidden)), -torch.inf)
        for classes in self.tiles:
            for rows in self.blocks:
                for total, x in zip(found, self._terms(rows, classes)):
                    total[rows] = torch.logaddexp(total[rows], torch.logsumexp(x, dim=1))
        return _Normalisers(*found.unsqueeze(2))

    def _log_probs(
        self, rows: slice, classes: slice, normalisers: _Normalisers
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """``[n, k]`` those of student and teacher, and the slope g' at the student's logits."""
        s, x = self._terms(rows, classes)
        slope = self.head.post.slope(s)
        log_p = s.sub_(normalisers.student[rows])
        log_q = self.teacher.log_probs(rows, classes, x.sub_(normalisers.teacher[rows]))
        return log_p, log_q, slope

    def sums(self, normalisers: _Normalisers) -> tuple[torch.Tensor, torch.Tensor]:
        """The second pass: divergence and pull, ``[N]`` each."""
        losses, pull = self.hidden.new_zeros(2, len(self.hidden))
        for classes in self.tiles:
            for rows in self.blocks:
                log_p, log_q, _ = self._log_probs(rows, classes, normalisers)
                terms = self.divergence(log_p, log_q)
                losses[rows] += terms.losses
                pull[rows] += terms.pull
        return losses, pull

    def gradients(self, normalisers: _Normalisers, pull: torch.Tensor, needs: Needs) -> Gradients:
        """The third pass."""
        assert self.positions.weight is not None
        found = _Gradients(self.head, self.hidden, self.positions.weight, needs)
        for classes in self.tiles:
            w = self.head.rows(classes, self.hidden.dtype)
            for rows in self.blocks:
                log_p, log_q, slope = self._log_probs(rows, classes, normalisers)
                g = self.divergence(log_p, log_q).gradient_(pull[rows]).mul_(slope)
                found.add(rows, w, g, anew=rows.start == 0)
            found.write(classes, anew=True)
        return found
