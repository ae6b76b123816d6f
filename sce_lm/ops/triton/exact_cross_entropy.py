r"""Exact cross-entropy by kernels: candidate cross-entropy whose one list is the whole catalogue.

The classes are streamed in tiles through the same kernels. The label stays among the columns, so
its gradient ``(softmax - 1)·g'`` is an entry of the logit gradient like the others, and each row of
dW is summed over all positions in fp32 and written once, in its own dtype, with no atomics and no
fp32 copy of W. The largest logit's class comes with the sums, for the accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sce_lm.ops.exact_cross_entropy import ExactLoss
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import Positions
from sce_lm.ops.triton.backward_pass import backward_pass, normalised
from sce_lm.ops.triton.candidate_forward import list_sums
from sce_lm.ops.triton.candidate_lists import whole_catalogue
from sce_lm.ops.triton.logit_gradient import LossGradient
from sce_lm.ops.triton.row_dot import row_dot
from sce_lm.ops.triton.row_gradient import RowTarget
from sce_lm.ops.triton.supported import contiguous, losses_supported

exact_cross_entropy_supported = losses_supported


def exact_cross_entropy(head: Head, positions: Positions) -> ExactLoss:
    """As :func:`sce_lm.ops.exact_cross_entropy.exact_cross_entropy`, for inputs that
    :func:`exact_cross_entropy_supported` accepts."""
    hidden = positions.hidden.to(head.weight.dtype)
    labels, bias = contiguous(positions.labels, head.bias)
    losses, correct, confidence, _ = _forward(
        hidden, head.weight, bias, labels, head.post.scale, head.post.soft_cap
    )
    return ExactLoss(positions.reduce(losses), correct, confidence)


@torch.library.custom_op("sce_lm::exact_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``[N]`` losses, hits, confidence and log Z."""
    post = LogitTransform(scale, soft_cap)
    classes = whole_catalogue(len(hidden), len(weight), hidden.device)
    sums = list_sums(hidden, weight, bias, labels, classes, post, best=True)
    assert sums.best is not None
    assert sums.best_item is not None
    shift = sums.top.amax(dim=0)
    log_z = (sums.total * (sums.top - shift).exp()).sum(dim=0).log() + shift
    # The splits are ascending ranges of classes: of several largest logits the first one counts.
    best, split = sums.best.max(dim=0, keepdim=True)
    winner = sums.best_item.gather(0, split).squeeze(0)
    confidence = (best.squeeze(0) - log_z).exp()
    loss = log_z - post(row_dot(hidden, weight, labels, bias))
    return loss, winner == labels, confidence, log_z


@_forward.register_fake
def _(hidden, weight, bias, labels, scale, soft_cap):
    loss = hidden.new_empty(len(hidden), dtype=torch.float32)
    correct = torch.empty_like(labels, dtype=torch.bool)
    return loss, correct, torch.empty_like(loss), torch.empty_like(loss)


@torch.library.custom_op("sce_lm::exact_backward", mutates_args=())
def _backward(
    grad_loss: Tensor,
    log_partition: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    soft_cap: float | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias, empty where they are not needed."""
    classes = whole_catalogue(len(hidden), len(weight), hidden.device)
    ratio, factor = normalised(grad_loss)
    none = hidden.new_empty(0)
    grad_weight, grad_bias, target = none, none.clone(), None
    if needs_weight:
        grad_weight = weight.new_empty(weight.shape)
        grad_bias = grad_bias if bias is None else torch.empty_like(bias)
        target = RowTarget(grad_weight, None if bias is None else grad_bias, factor=factor)
    grad_hidden = backward_pass(
        hidden,
        weight,
        bias,
        labels,
        LogitTransform(scale, soft_cap),
        [(classes, target)],
        LossGradient(log_partition, ratio, keep_label=True),
        factor,
        needs_hidden=needs_hidden,
    )
    return none.clone() if grad_hidden is None else grad_hidden, grad_weight, grad_bias


@_backward.register_fake
def _(grad_loss, log_partition, hidden, weight, bias, labels, scale, soft_cap, *needs):
    needs_hidden, needs_weight = needs
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        hidden.new_empty(0) if bias is None or not needs_weight else torch.empty_like(bias),
    )


def _save(ctx, inputs, output):
    ctx.options = inputs[4:]
    ctx.save_for_backward(output[3], *inputs[:4])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad_loss, *_):
    saved = ctx.saved_tensors  # may be read only once under gradient checkpointing
    has_bias = saved[3] is not None
    needs_hidden, needs_row, needs_bias = ctx.needs_input_grad[:3]
    grad_hidden, grad_weight, grad_bias = _backward(
        grad_loss, *saved, *ctx.options, needs_hidden, needs_row or needs_bias
    )
    return (
        grad_hidden if needs_hidden else None,
        grad_weight if needs_row else None,
        grad_bias if has_bias and needs_bias else None,
        None,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)
