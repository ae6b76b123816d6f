r"""What is read off logits, by the kernels of candidate cross-entropy over the whole catalogue.

The classes are streamed in tiles through the same kernels, with no label left out. The logits at
ids are products of their own. In the backward pass the gradient at them is an entry of the logit
gradient like the others, and each row of dW is summed over all positions in fp32 and written once,
in its own dtype, with no atomics and no fp32 copy of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sce_lm.ops.head import Head
from sce_lm.ops.logit_stream import Top
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.row_reductions import Asked, RowReductions, of_softmax
from sce_lm.ops.triton.backward_pass import backward_pass
from sce_lm.ops.triton.candidate_forward import list_sums
from sce_lm.ops.triton.candidate_lists import whole_catalogue
from sce_lm.ops.triton.logit_gradient import LossGradient
from sce_lm.ops.triton.merge_splits import merge_splits
from sce_lm.ops.triton.row_dot import row_dot
from sce_lm.ops.triton.row_gradient import RowTarget
from sce_lm.ops.triton.supported import contiguous, products_supported

MAX_IDS = 32
"""Most single logits of a position: each is looked for in every tile of the backward pass."""


def row_reductions_supported(
    head: Head, hidden: Tensor, ids: Tensor | None, asked: Asked
) -> str | None:
    """Why the kernels cannot take these inputs; None if they can."""
    if asked.top_k > 1:
        return f"they find the best class of a position, and top_k is {asked.top_k}"
    if hidden.numel() == 0:
        return "there is no position"
    num_ids = 0 if ids is None else ids[:1].numel()
    if num_ids > MAX_IDS:
        return f"{num_ids} ids a position are more than {MAX_IDS}"
    return products_supported(head, hidden)


def row_reductions(head: Head, hidden: Tensor, ids: Tensor | None, asked: Asked) -> RowReductions:
    """As :func:`sce_lm.ops.row_reductions.row_reductions`, for inputs that
    :func:`row_reductions_supported` accepts."""
    ids, bias = contiguous(ids, head.bias)
    columns = None if ids is None or ids.numel() == 0 else ids.view(len(ids), -1)
    log_z, at_ids, entropy, expected, total, best, best_class = _forward(
        hidden.to(head.weight.dtype),
        head.weight,
        bias,
        columns,
        head.post.scale,
        head.post.soft_cap,
        asked.entropy or asked.expected_logit,
        asked.logit_sum,
        asked.top_k == 1,
    )
    return RowReductions(
        log_z,
        None if ids is None else at_ids.view(ids.shape),
        entropy if asked.entropy else None,
        expected if asked.expected_logit else None,
        total if asked.logit_sum else None,
        Top(best, best_class) if asked.top_k else None,
    )


@torch.library.custom_op("sce_lm::row_reductions_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    scale: float,
    soft_cap: float | None,
    expectation: bool,
    logit_sum: bool,
    best: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log Z, logits at ids, entropy, expected logit, sum, best logit and its class; empty where
    they are not asked for."""
    post = LogitTransform(scale, soft_cap)
    classes = whole_catalogue(len(hidden), len(weight))
    wanted = {"best": best, "moment": expectation, "logit_sum": logit_sum}
    sums = list_sums(hidden, weight, bias, None, classes, post, **wanted)
    merged = merge_splits(sums)
    return (
        merged.log_partition,
        hidden.new_empty(0, dtype=torch.float32)
        if ids is None
        else post(row_dot(hidden, weight, ids, bias)),
        merged.entropy,
        merged.expected,
        merged.logit_sum,
        merged.best.view(-1, 1),
        merged.best_item.view(-1, 1),
    )


@_forward.register_fake
def _(hidden, weight, bias, ids, scale, soft_cap, expectation, logit_sum, best):
    def new(*shape, dtype=torch.float32):
        return hidden.new_empty(shape, dtype=dtype)

    count, means, bests = (len(hidden) * there for there in (1, expectation, best))
    return (
        new(count),
        new(0) if ids is None else new(*ids.shape),
        new(means),
        new(means),
        new(count * logit_sum),
        new(bests, 1),
        new(bests, 1, dtype=torch.int64),
    )


@torch.library.custom_op("sce_lm::row_reductions_backward", mutates_args=())
def _backward(
    probability: Tensor,
    log_probability: Tensor | None,
    constant: Tensor | None,
    ids: Tensor | None,
    at_ids: Tensor | None,
    log_partition: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    soft_cap: float | None,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias, empty where they are not needed, from that of
    the logits (:class:`~sce_lm.ops.logit_stream.LogitGradient`)."""
    classes = whole_catalogue(len(hidden), len(weight))
    parts = (probability, log_probability, constant, at_ids)
    # The kernels work on ratios in [-1, 1], as backward_pass.normalised says.
    factor = torch.stack([p.abs().amax() for p in parts if p is not None]).amax()
    unit = factor.clamp_min(torch.finfo(torch.float32).tiny)
    a, b, c, e = (p if p is None else (p / unit).contiguous() for p in parts)
    assert a is not None
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
        None,
        LogitTransform(scale, soft_cap),
        [(classes, target)],
        LossGradient(log_partition, a, log_ratio=b, constant=c, ids=ids, at_ids=e),
        factor,
        needs_hidden=needs_hidden,
    )
    return none.clone() if grad_hidden is None else grad_hidden, grad_weight, grad_bias


@_backward.register_fake
def _(a, b, c, ids, at_ids, log_partition, hidden, weight, bias, scale, soft_cap, *needs):
    needs_hidden, needs_weight = needs
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        hidden.new_empty(0) if bias is None or not needs_weight else torch.empty_like(bias),
    )


def _save(ctx, inputs, output):
    ctx.options = inputs[4:]
    log_z, _, entropy, *_, best_class = output
    ctx.save_for_backward(log_z, entropy, best_class, *inputs[:4])
    ctx.mark_non_differentiable(best_class)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, of_log_z, of_at, of_entropy, of_expected, of_sum, of_best, _):
    log_z, entropy, best_class, hidden, weight, bias, ids = ctx.saved_tensors
    scale, soft_cap, expectation, logit_sum, best = ctx.options
    of_entropy, of_expected = (g if expectation else None for g in (of_entropy, of_expected))
    a, b = of_softmax(of_log_z, entropy, of_entropy, of_expected)
    single = [
        (g, at)
        for g, at in ((of_at, ids), (of_best if best else None, best_class))
        if g is not None and at is not None
    ]
    at_ids, wanted = (torch.cat(t, dim=1) for t in zip(*single)) if single else (None, None)
    needs_hidden, needs_row, needs_bias = ctx.needs_input_grad[:3]
    grad_hidden, grad_weight, grad_bias = _backward(
        torch.zeros_like(log_z) if a is None else a,
        b,
        of_sum if logit_sum else None,
        wanted,
        at_ids,
        log_z,
        hidden,
        weight,
        bias,
        scale,
        soft_cap,
        needs_hidden,
        needs_row or needs_bias,
    )
    return (
        grad_hidden if needs_hidden else None,
        grad_weight if needs_row else None,
        grad_bias if bias is not None and needs_bias else None,
        *[None] * 6,
    )


_forward.register_autograd(_differentiate, setup_context=_save)
