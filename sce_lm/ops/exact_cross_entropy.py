"""Exact cross-entropy of a linear head, streamed.

    loss_t = log sum_j exp(s_tj) - s_{t,y_t},      s = g(h W' + b)

Gradients: G = (softmax - onehot)·g';  dL/dh = G W,  dL/dW = G' h, times each position's weight.

By tiles of classes (:mod:`sce_lm.ops.logit_stream`): one pass finds log Z, and of a frozen head
dL/dh with it; for a trained one a second pass, in backward, computes the logits again:
8·N·V·d operations, and no memory but a tile.

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
from sce_lm.ops.logit_stream import LogitGradient, LogitStream
from sce_lm.ops.positions import Positions
from sce_lm.ops.static_shapes import needs_static_shapes

BLOCK_ELEMENTS = 5 * 2**22
"""Logits held at a time by blocks of positions (80 MiB in fp32)."""
MIN_BLOCK = 64
"""Positions below which a block is not worth it."""


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
    scan = LogitStream(head, positions.hidden).scan(ids=positions.labels[:, None], top_k=top_k)
    return ExactScores(
        scan.logits_at.squeeze(1) - scan.log_partition,
        scan.top.indices[:, 0] == positions.labels,
        scan.top.indices,
    )


def exact_gradients(
    head: Head, positions: Positions, log_partition: torch.Tensor, needs: Needs
) -> OfInputs:
    """dL/dh ``[N, D]`` (of these rows alone), and those of weight, low_rank and bias, by tiles.

    Args:
        head: the output head, or a rank's rows of one.
        positions: with a weight; labels of -1 where the label's row is elsewhere.
        log_partition: ``[N]`` log Z over all rows there are.
        needs: which gradients are wanted.
    """
    assert positions.weight is not None
    each = positions.weight.expand(len(positions))
    loss = LogitGradient(each, ids=positions.labels[:, None], at_ids=-each[:, None])
    return LogitStream(head, positions.hidden).gradients(loss, log_partition, needs)


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
        dtype = compute_dtype(positions.hidden, head.weight)
        fits = min(len(positions), MIN_BLOCK) * head.vocab_size <= BLOCK_ELEMENTS
        in_place = any(needs.head[:2]) and head.weight.dtype == dtype and head.post.soft_cap is None
        if positions.weight is not None and in_place and fits:
            losses, correct, confidence, gradients = _by_blocks(head, positions, needs)
            return Found(losses, (correct, confidence), Taken(gradients))
        only_hidden = positions.weight is not None and needs == Needs(hidden=True)
        stream, ids = LogitStream(head, positions.hidden), positions.labels.unsqueeze(1)
        scan = stream.scan(ids=ids, top_k=1, grad_hidden=only_hidden)
        log_z, best = scan.log_partition, scan.top
        taken = None
        if scan.grad_hidden is not None and positions.weight is not None:
            grad = scan.grad_hidden
            stream.add_rows(grad, ids, scan.logits_at, torch.full_like(scan.logits_at, -1.0))
            grad *= positions.weight.expand(len(positions)).unsqueeze(1)
            taken = Taken((grad, None, None, None))
        others = best.indices.squeeze(1) == positions.labels, (best.values.squeeze(1) - log_z).exp()
        return Found(log_z - scan.logits_at.squeeze(1), others, taken, log_z)

    def backward(
        self, head: Head, positions: Positions, needs: Needs, kept: torch.Tensor | None
    ) -> Gradients:
        if kept is None:
            kept = LogitStream(head, positions.hidden).scan().log_partition
        return Taken(exact_gradients(head, positions, kept, needs))
