"""Exact cross-entropy of a linear head, streamed over positions.

    loss_t = log sum_j exp(s_tj) - s_{t,y_t},      s = g(h W' + b)

The logits exist for one block of positions at a time. With a scalar reduction the gradients are
taken in the forward pass from that same block, ``(softmax - onehot) · g'``, so nothing of size
``[N, V]`` outlives a block and no product is done twice; with a loss per position the backward
pass computes the block again. The gradient of W is summed in fp32 and cast once. A weight in half
precision is widened a tile of classes at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from sce_lm.ops.logits import LogitTransform

BLOCK_ELEMENTS = 2**24
"""Logits held at a time (64 MiB in fp32)."""
TILE_ELEMENTS = 2**22
"""Elements of a half-precision weight widened at a time (16 MiB in fp32)."""


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """fp64 if any input is, else fp32: the dtype in which every loss here is computed."""
    is_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if is_double else torch.float32


class ExactLoss(NamedTuple):
    """What :func:`exact_cross_entropy` returns."""

    loss: torch.Tensor
    """Scalar ``sum_t position_weight · loss_t``, or ``[N]`` if no weight was given."""
    correct: torch.Tensor
    """``[N]`` bool: the label has the largest logit (first one, if several tie)."""


def exact_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    post: LogitTransform = LogitTransform(),
    position_weight: torch.Tensor | None = None,
) -> ExactLoss:
    """Cross-entropy over all V classes.

    Args:
        hidden: ``[N, d]``, fp16, bf16, fp32 or fp64; N >= 1.
        weight: ``[V, d]``.
        labels: ``[N]`` int64 in ``[0, V)`` (checked by the caller; there is no ignored label here).
        bias: ``[V]`` or None.
        post: the map from raw logits to softmax logits.
        position_weight: 0-dim tensor. Given: ``loss`` is the sum over positions times this and the
            gradients are taken in the forward pass. None: ``loss`` is ``[N]``.
    """
    loss, correct = _ExactCrossEntropy.apply(
        hidden, weight, bias, labels, post, position_weight, torch.is_grad_enabled()
    )
    return ExactLoss(loss, correct)


def _stream(hidden, weight, bias, labels, post, position_weight, needs, dtype):
    """One pass over blocks of positions: losses, hits and, where ``needs`` says so, gradients."""
    num_positions, vocab_size = hidden.shape[0], weight.shape[0]
    needs_hidden, needs_weight, needs_bias = needs
    losses = hidden.new_empty(num_positions, dtype=dtype)
    correct = hidden.new_empty(num_positions, dtype=torch.bool)
    grad_hidden = torch.zeros_like(hidden, dtype=dtype) if needs_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
    grad_bias = hidden.new_zeros(vocab_size, dtype=dtype) if needs_bias else None

    block = max(1, min(num_positions, BLOCK_ELEMENTS // vocab_size))
    for start in range(0, num_positions, block):
        rows = slice(start, min(start + block, num_positions))
        h, y = hidden[rows].to(dtype), labels[rows, None]
        s = h.new_empty(len(h), vocab_size)
        for classes, w in _tiles(weight, dtype):
            torch.mm(h, w.T, out=s[:, classes])
        if bias is not None:
            s += bias.to(dtype)
        if post != LogitTransform():
            s = post(s)
        slope = post.slope(s)
        top, argmax = s.max(dim=1, keepdim=True)
        label_logit = s.gather(1, y)
        correct[rows] = (argmax == y).squeeze(1)
        p = s.sub_(top).exp_()
        total = p.sum(dim=1, keepdim=True)
        losses[rows] = (total.log() + top - label_logit).squeeze(1)
        if not any(needs):
            continue
        per_row = position_weight if position_weight.dim() == 0 else position_weight[rows, None]
        p.div_(total).scatter_add_(1, y, -torch.ones_like(total))
        p.mul_(slope).mul_(per_row)
        if grad_hidden is not None:
            for classes, w in _tiles(weight, dtype):
                grad_hidden[rows].addmm_(p[:, classes], w)
        if grad_weight is not None:
            grad_weight.addmm_(p.T, h)
        if grad_bias is not None:
            grad_bias += p.sum(dim=0)
    return losses, correct, (grad_hidden, grad_weight, grad_bias)


def _tiles(weight: torch.Tensor, dtype: torch.dtype):
    """(slice of classes, their rows in ``dtype``); the whole weight where it has that dtype."""
    vocab_size, width = weight.shape
    tile = vocab_size if weight.dtype == dtype else max(1, TILE_ELEMENTS // width)
    for start in range(0, vocab_size, tile):
        classes = slice(start, start + tile)
        yield classes, weight[classes].to(dtype)


class _ExactCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, post, position_weight, grad_enabled):
        dtype = compute_dtype(hidden, weight)
        ctx.needs = tuple(grad_enabled and n for n in ctx.needs_input_grad[:3])
        ctx.post, ctx.dtype, ctx.scalar = post, dtype, position_weight is not None
        ctx.input_dtypes = tuple(t.dtype if t is not None else None for t in (hidden, weight, bias))
        needs_now = ctx.needs if ctx.scalar else (False, False, False)
        losses, correct, gradients = _stream(
            hidden, weight, bias, labels, post, position_weight, needs_now, dtype
        )
        ctx.mark_non_differentiable(correct)
        if ctx.scalar:
            ctx.save_for_backward(*gradients)
            return losses.sum() * position_weight, correct
        ctx.save_for_backward(hidden, weight, bias, labels)
        return losses, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        grad_loss = grad_outputs[0].to(ctx.dtype)
        if ctx.scalar:
            gradients = [g * grad_loss if g is not None else None for g in ctx.saved_tensors]
        else:
            hidden, weight, bias, labels = ctx.saved_tensors
            gradients = _stream(
                hidden, weight, bias, labels, ctx.post, grad_loss, ctx.needs, ctx.dtype
            )[2]
        cast = [g if g is None else g.to(t) for g, t in zip(gradients, ctx.input_dtypes)]
        return *cast, None, None, None, None
