"""Exact cross-entropy of a linear head, streamed.

    loss_t = log sum_j exp(s_tj) - s_{t,y_t},      s = g(h W' + b)

Gradients: G = (softmax - onehot)·g';  dL/dh = G W,  dL/dW = G' h, times each position's weight.

By tiles of classes: the running maximum and sum of every position make its ``log Z``. A frozen
head's dL/dh is summed in the same pass, rescaled whenever the maximum moves; for a trained one a
second pass, in backward, computes the logits again, and each row of dL/dW is finished within its
tile, in fp32, and written once: 8·N·V·d operations, and no memory but a tile.

By blocks of positions: where a block of logits over all classes holds enough positions to keep
the products busy, and dL/dW may be summed in place, gradients come from those very logits: 6·N·V·d
operations. It serves fp32 and fp64 weights, a scalar loss and no soft cap.

A low-rank operand B is further columns of W (module :mod:`sce_lm.ops.head`); of a frozen W only
dL/dB is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sce_lm.ops.dispatch import Backend, kernels
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.gradient_memory import gradient_memory
from sce_lm.ops.head import Head, Needs
from sce_lm.ops.head_loss import Found, Gradients, OfInputs, Pass, head_loss
from sce_lm.ops.positions import Positions
from sce_lm.ops.static_shapes import needs_static_shapes

BLOCK_ELEMENTS = 5 * 2**22
"""Logits held at a time by blocks of positions (80 MiB in fp32)."""
MIN_BLOCK = 64
"""Positions below which a block is not worth it."""
TILE_CLASSES = 2048
"""Classes of a tile."""
TILE_POSITIONS = 1024
"""Positions multiplied with a tile at a time (8 MiB of logits in fp32)."""


class ExactLoss(NamedTuple):
    """What :func:`exact_cross_entropy` returns."""

    loss: torch.Tensor
    """The positions' weighted sum of losses, or ``[N]`` if they have no weight."""
    correct: torch.Tensor
    """``[N]`` bool: the label has the largest logit (first one, if several tie)."""
    confidence: torch.Tensor
    """``[N]``: the largest probability of all classes."""


def exact_cross_entropy(
    head: Head, positions: Positions, *, backend: Backend = "auto"
) -> ExactLoss:
    """Cross-entropy over all V classes.

    Args:
        head: the output head.
        positions: N >= 1 of them, labels in ``[0, V)`` (checked by the caller).
        backend: :data:`~sce_lm.ops.dispatch.Backend`.

    Raises:
        ValueError: backend "triton", and it cannot run.
    """
    run = kernels("exact_cross_entropy", backend, positions.hidden.device, head, positions)
    if run is not None:
        return run(head, positions)
    loss, (correct, confidence) = head_loss(ExactPass(), head, positions)
    return ExactLoss(loss, correct, confidence)


class ExactScores(NamedTuple):
    """What :func:`exact_scores` returns."""

    log_probability: torch.Tensor
    """``[N]`` of the labels."""
    correct: torch.Tensor
    """``[N]`` bool: the label has the largest logit (first one, if several tie)."""
    top: torch.Tensor
    """``[N, k]`` int64: the classes with the largest logits, in descending order."""


@torch.no_grad()
def exact_scores(head: Head, positions: Positions, *, top_k: int) -> ExactScores:
    """Log-probabilities of the labels and the ``top_k >= 1`` best classes, in one pass and without
    gradient."""
    scan = ExactScan(head, positions).scan(top_k=top_k)
    return ExactScores(
        scan.label_logit - scan.log_partition,
        scan.best_class == positions.labels,
        scan.top.indices,
    )


class Top(NamedTuple):
    """The largest logits of each position, in descending order."""

    values: torch.Tensor
    """``[N, k]``."""
    indices: torch.Tensor
    """``[N, k]`` int64: their classes."""


class Scan(NamedTuple):
    """What one pass over the classes finds, ``[N]`` each."""

    log_partition: torch.Tensor
    label_logit: torch.Tensor
    """s_ty, 0 where the label is -1."""
    best: torch.Tensor
    """The largest logit."""
    best_class: torch.Tensor
    """int64: its class, the first one if several tie."""
    top: Top
    """k = 0 if it was not asked for."""
    grad_hidden: torch.Tensor | None
    """``[N, D]`` sum_j softmax_j g'_j W_j, if asked for."""


class ExactScan:
    """The two passes over tiles of classes.

    Of a head that is cut by rows over several ranks, each makes them over its own rows, with labels
    of -1 where the label's row is elsewhere.
    """

    def __init__(self, head: Head, positions: Positions) -> None:
        self.head, self.labels = head, positions.labels
        self.post, self.vocab_size = head.post, head.vocab_size
        self.dtype = compute_dtype(positions.hidden, head.weight)
        self.hidden = head.extend(positions.hidden, self.dtype)
        self.blocks = [
            slice(start, min(start + TILE_POSITIONS, len(positions)))
            for start in range(0, len(positions), TILE_POSITIONS)
        ]

    def tiles(self):
        """(slice of classes, their rows)."""
        for start in range(0, self.vocab_size, TILE_CLASSES):
            classes = slice(start, min(start + TILE_CLASSES, self.vocab_size))
            yield classes, self.head.rows(classes, self.dtype)

    def logits(self, h, w, buffer):
        """``[n, tile]`` s, in a corner of ``buffer``."""
        return self.post.apply_(torch.mm(h, w.T, out=buffer[: len(h), : len(w)]))

    def new_buffer(self) -> torch.Tensor:
        return self.hidden.new_empty(self.blocks[0].stop, min(TILE_CLASSES, self.vocab_size))

    def scan(self, with_grad_hidden: bool = False, top_k: int = 0) -> Scan:
        """The pass that gives ``log Z`` of these rows."""
        count, hidden, buffer = len(self.hidden), self.hidden, self.new_buffer()
        best = hidden.new_full((count,), -torch.inf)
        best_class = torch.zeros_like(self.labels)
        total, label_logit = torch.zeros_like(best), torch.zeros_like(best)
        grad = torch.zeros_like(hidden) if with_grad_hidden else None
        top_values = hidden.new_empty(count, 0)
        top_classes = self.labels.new_empty(count, 0)
        for classes, w in self.tiles():
            found = []
            for rows in self.blocks:
                s = self.logits(hidden[rows], w, buffer)
                if top_k:
                    found.append(torch.topk(s, min(top_k, s.shape[1]), dim=1))
                column, is_here = _column(self.labels[rows], classes)
                label = s.gather(1, column.unsqueeze(1)).squeeze(1)
                label_logit[rows] = torch.where(is_here, label, label_logit[rows])
                value, index = s.max(dim=1)
                before = best[rows]
                best_class[rows] = torch.where(
                    value > before, index + classes.start, best_class[rows]
                )
                # All classes so far may be masked by -inf, from which nothing can be taken off.
                now = torch.maximum(before, value).clamp_min_(torch.finfo(value.dtype).min)
                shrink = (before - now).exp()
                slope = self.post.slope(s) if grad is not None else 1.0
                e = s.sub_(now.unsqueeze(1)).exp_()
                total[rows] = total[rows] * shrink + e.sum(dim=1)
                best[rows] = now
                if grad is not None:
                    e = e * slope if torch.is_tensor(slope) else e
                    grad[rows] *= shrink.unsqueeze(1)
                    grad[rows].addmm_(e, w)
            if top_k:
                values = torch.cat([top_values, torch.cat([f.values for f in found])], dim=1)
                indices = torch.cat([f.indices for f in found]) + classes.start
                indices = torch.cat([top_classes, indices], dim=1)
                top_values, kept = torch.topk(values, min(top_k, values.shape[1]), dim=1)
                top_classes = indices.gather(1, kept)
        if grad is not None:
            slope = 1.0 if self.post.soft_cap is not None else self.post.slope(total)
            grad.mul_((slope / total).unsqueeze(1))
        top = Top(top_values, top_classes)
        return Scan(best + total.log(), label_logit, best, best_class, top, grad)

    def gradients(
        self, log_partition: torch.Tensor, position_weight: torch.Tensor, needs: Needs
    ) -> OfInputs:
        """dL/dh ``[N, D]`` (of these rows alone), and those of weight, low_rank and bias, for the
        loss ``sum_t position_weight_t · loss_t``.

        Args:
            log_partition: ``[N]`` log Z over all rows there are.
            position_weight: ``[N]``.
            needs: which of them are wanted.
        """
        hidden, buffer = self.hidden, self.new_buffer()
        grad_hidden = torch.zeros_like(hidden) if needs.hidden else None
        of_head = [
            gradient_memory(part, part.dtype) if need and part is not None else None
            for part, need in zip(self.head.tensors, needs.head)
        ]
        weighted = hidden[:, self.head.num_frozen(needs.head) :] * position_weight.unsqueeze(1)
        rows_gradient = hidden.new_empty(TILE_CLASSES, weighted.shape[1])
        for classes, w in self.tiles():
            of_rows = rows_gradient[: len(w)]
            for rows in self.blocks:
                s = self.logits(hidden[rows], w, buffer)
                slope = self.post.slope(s)
                g = s.sub_(log_partition[rows].unsqueeze(1)).exp_()
                column, is_here = _column(self.labels[rows], classes)
                g.scatter_add_(1, column.unsqueeze(1), -is_here.to(g.dtype).unsqueeze(1))
                g *= slope
                if grad_hidden is not None:
                    grad_hidden[rows].addmm_(g, w)
                keep = 0.0 if rows.start == 0 else 1.0
                torch.addmm(of_rows, g.T, weighted[rows], beta=keep, out=of_rows)
            for grad, mine in zip(of_head, self.head.split(needs.head, of_rows)):
                if grad is not None and mine is not None:
                    grad[classes] = mine
        if grad_hidden is not None:
            grad_hidden *= position_weight.unsqueeze(1)
        return grad_hidden, *of_head


def _column(labels: torch.Tensor, classes: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each label in a tile, and whether it lies there (column 0 where it does not)."""
    is_here = (labels >= classes.start) & (labels < classes.stop)
    return (labels - classes.start).masked_fill(~is_here, 0), is_here


def _by_blocks(
    head: Head, positions: Positions, needs: Needs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, OfInputs]:
    """Losses, hits, confidence, ``[N]`` each, and gradients: a block of positions over all classes
    at a time.

    The factors of positions scale h and the products, never the block.
    """
    (weight, low_rank, bias), post = head.tensors, head.post
    hidden, labels, position_weight = positions.hidden, positions.labels, positions.weight
    assert position_weight is not None
    count, (vocab_size, width) = len(hidden), weight.shape
    dtype = compute_dtype(hidden, weight)
    losses = hidden.new_empty(count, dtype=dtype)
    confidence = torch.empty_like(losses)
    correct = torch.empty_like(labels, dtype=torch.bool)
    grad_hidden = torch.empty_like(hidden, dtype=dtype) if needs.hidden else None
    grad_weight, grad_low_rank = (
        gradient_memory(part, dtype) if need and part is not None else None
        for part, need in zip(head.tensors, needs.head[:2])
    )
    grad_bias = hidden.new_zeros(vocab_size, dtype=dtype) if needs.head[2] else None
    factors = [(weight, slice(width), grad_weight)]
    if low_rank is not None:
        factors.append((low_rank.to(dtype), slice(width, None), grad_low_rank))
    block = min(count, BLOCK_ELEMENTS // vocab_size)
    buffer = losses.new_empty(block, vocab_size)
    for start in range(0, count, block):
        rows = slice(start, min(start + block, count))
        h, y, s = hidden[rows].to(dtype), labels[rows, None], buffer[: rows.stop - start]
        for i, (factor, at, _) in enumerate(factors):
            torch.addmm(s, h[:, at], factor.T, beta=float(i > 0), out=s)
        if bias is not None:
            s += bias
        best = post.apply_(s).amax(dim=1, keepdim=True)
        label_logit = s.gather(1, y)
        correct[rows] = _has_largest(s, y, label_logit == best)
        e = s.sub_(best).exp_()  # total · softmax; the position's scale divides by total
        total = e.sum(dim=1, keepdim=True)
        log_z = best + total.log()
        losses[rows] = (log_z - label_logit).squeeze(1)
        confidence[rows] = total.reciprocal().squeeze(1)

        share = position_weight if position_weight.dim() == 0 else position_weight[rows, None]
        scale = share * post.slope(log_z) / total
        e.scatter_add_(1, y, -total)
        scaled = h * scale
        for factor, at, grad in factors:
            if grad_hidden is not None:
                torch.mm(e, factor, out=grad_hidden[rows, at]).mul_(scale)
            if grad is not None:
                torch.addmm(grad, e.T, scaled[:, at], beta=float(start > 0), out=grad)
        if grad_bias is not None:
            grad_bias += e.T @ scale.expand(len(h), 1).squeeze(1)
    return losses, correct, confidence, (grad_hidden, grad_weight, grad_low_rank, grad_bias)


def _has_largest(s, y, ties_with_best):
    """Whether the label's logit is the largest and no class before it has the same, ``[n]`` bool.

    On a CPU only positions whose label ties with the best are looked at for classes before it: a
    search for the largest logit and its place takes four times as long as one for its value.
    """
    hits = ties_with_best.squeeze(1)
    if needs_static_shapes(s.device):
        return hits & (s.argmax(dim=1) == y[:, 0])
    where = hits.nonzero().squeeze(1)
    hits[where] = s[where].argmax(dim=1) == y[where, 0]
    return hits


class Taken(NamedTuple):
    """Gradients that are there as tensors."""

    gradients: OfInputs

    def of_inputs(self, factor: torch.Tensor | None = None) -> OfInputs:
        if factor is None:
            return self.gradients
        return tuple(None if g is None else g.mul_(factor) for g in self.gradients)


class ExactPass(Pass):
    """By blocks of positions where that is faster, else by tiles of classes."""

    def forward(self, head: Head, positions: Positions, needs: Needs) -> Found:
        dtype, post = compute_dtype(positions.hidden, head.weight), head.post
        fits = min(len(positions), MIN_BLOCK) * head.vocab_size <= BLOCK_ELEMENTS
        in_place = any(needs.head[:2]) and head.weight.dtype == dtype and post.soft_cap is None
        if positions.weight is not None and in_place and fits:
            losses, correct, confidence, gradients = _by_blocks(head, positions, needs)
            return Found(losses, (correct, confidence), Taken(gradients))
        only_hidden = positions.weight is not None and needs == Needs(hidden=True)
        scan = ExactScan(head, positions).scan(with_grad_hidden=only_hidden)
        log_z, correct = scan.log_partition, scan.best_class == positions.labels
        losses = log_z - scan.label_logit
        taken = None
        if scan.grad_hidden is not None and positions.weight is not None:
            pull = post.slope(scan.label_logit)
            pull = pull if torch.is_tensor(pull) else torch.full_like(losses, pull)
            grad = scan.grad_hidden.addcmul_(
                pull.unsqueeze(1), head.rows(positions.labels, dtype), value=-1.0
            )
            grad *= positions.weight.expand(len(losses)).unsqueeze(1)
            taken = Taken((grad, None, None, None))
        return Found(losses, (correct, (scan.best - log_z).exp()), taken, log_z)

    def backward(
        self, head: Head, positions: Positions, needs: Needs, kept: torch.Tensor | None
    ) -> Gradients:
        passes = ExactScan(head, positions)
        log_z = passes.scan().log_partition if kept is None else kept
        assert positions.weight is not None
        return Taken(passes.gradients(log_z, positions.weight.expand(len(positions)), needs))
