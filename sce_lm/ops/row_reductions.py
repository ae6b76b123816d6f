r"""What people read off logits, without the logits: per position, exactly, with gradients.

For logits ``s = g(h W' + b)`` of a position, ``Z = sum_j exp s_j`` and ``p = exp(s) / Z``:

    log Z                              d log Z  =  sum_j p_j ds_j
    s_i at given ids i                 (log p_i = s_i - log Z)
    H = log Z - E_p[s]                 dH       = -sum_j p_j (log p_j + H) ds_j
    E_p[s] = sum_j p_j s_j             dE_p[s]  =  sum_j p_j (1 + log p_j + H) ds_j
    sum_j s_j                          (label smoothing)
    the k largest s_j, and their j     (argmax: k = 1)

All that is asked for together costs one stream over the classes, ``2·N·V·d`` operations, and its
backward pass a second one, ``2·N·V·d`` and the two products that any gradient of a head takes: the
gradients above are one number per logit (:class:`~sce_lm.ops.logit_stream.LogitGradient`). Where
only log Z and single logits are asked of a frozen head, dL/dh is the mean row under p, which the
first stream finds, and there is no second one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sce_lm.ops.dispatch import Backend, kernels
from sce_lm.ops.head import Head, Needs
from sce_lm.ops.logit_stream import LogitGradient, LogitStream, Top

GATHER_COST = 40
"""A gathered row costs as much as this many in a product."""


class RowReductions(NamedTuple):
    """What :func:`row_reductions` returns, fp32 or, of fp64 inputs, fp64; None where it was not
    asked for."""

    log_partition: Tensor
    """``[N]`` log Z = log sum_j exp s_j."""
    logits_at: Tensor | None
    """``[N]`` or ``[N, K]`` as the ids: s_i."""
    entropy: Tensor | None
    """``[N]`` H = log Z - E_p[s]; a class with logit -inf adds 0."""
    expected_logit: Tensor | None
    """``[N]`` E_p[s]."""
    logit_sum: Tensor | None
    """``[N]`` sum_j s_j."""
    top: Top | None
    """Values ``[N, k]`` with gradient and indices ``[N, k]``, in descending order; of equal logits
    the first class comes first, so that the first index is the argmax."""


class Asked(NamedTuple):
    """What is asked for, beside log Z and logits at ids."""

    entropy: bool
    expected_logit: bool
    logit_sum: bool
    top_k: int


def row_reductions(
    head: Head,
    hidden: Tensor,
    *,
    ids: Tensor | None = None,
    entropy: bool = False,
    expected_logit: bool = False,
    logit_sum: bool = False,
    top_k: int = 0,
    backend: Backend = "auto",
) -> RowReductions:
    """log Z of each position, and what else is asked for, in one stream over all V classes.

    Gradients reach hidden states, weight, low-rank operand and bias; there are no second ones. No
    more than a tile of logits is held at a time.

    Args:
        head: the output head, whole; a temperature T is a transform with scale and soft cap over T.
        hidden: ``[N, d]``, fp16, bf16, fp32 or fp64; ``[N, d + r]`` for a head with a low-rank
            operand (:mod:`sce_lm.ops.head`).
        ids: int64 ``[N]`` or ``[N, K]`` in ``[0, V)``, perhaps repeated.
        entropy, expected_logit, logit_sum: ask for them.
        top_k: how many of the largest logits to find, at most V.
        backend: :data:`~sce_lm.ops.dispatch.Backend`.

    Raises:
        ValueError: shapes do not fit, ids or top_k lie outside the classes, the head is cut over
            several processes; backend "triton", and it cannot run.
    """
    _check(head, hidden, ids, top_k)
    asked = Asked(entropy, expected_logit, logit_sum, top_k)
    run = kernels("row_reductions", backend, hidden.device, head, hidden, ids, asked)
    if run is not None:
        return run(head, hidden, ids, asked)
    columns = ids.unsqueeze(1) if ids is not None and ids.dim() == 1 else ids
    log_z, at_ids, h, expected, total, values, indices = _RowReductions.apply(
        hidden, *head.tensors, columns, head[3:], asked, torch.is_grad_enabled()
    )
    at_ids = at_ids if columns is ids else at_ids.squeeze(1)
    top = None if values is None else Top(values, indices)
    return RowReductions(log_z, at_ids, h, expected, total, top)


class _RowReductions(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, low_rank, bias, ids, rest_of_head, asked, grad_enabled):
        head = Head(weight, low_rank, bias, *rest_of_head)
        ctx.needs, ctx.rest_of_head = Needs.of(ctx, grad_enabled), rest_of_head
        expectation = asked.entropy or asked.expected_logit
        num_single = asked.top_k + (0 if ids is None else ids.shape[1])
        scan = LogitStream(head, hidden).scan(
            ids=ids,
            expectation=expectation,
            logit_sum=asked.logit_sum,
            top_k=asked.top_k,
            grad_hidden=ctx.needs == Needs(hidden=True)
            and not (expectation or asked.logit_sum)
            and num_single * GATHER_COST <= head.vocab_size,
        )
        values, indices = scan.top if asked.top_k else (None, None)
        if indices is not None:
            ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        if ctx.needs:
            inputs = (hidden, weight, low_rank, bias, ids)
            ctx.save_for_backward(*inputs, indices, values, *scan[:3], scan.grad_hidden)
        return (
            scan.log_partition,
            None if ids is None else scan.logits_at,
            scan.entropy if asked.entropy else None,
            scan.expected_logit if asked.expected_logit else None,
            scan.logit_sum,
            values,
            indices,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, of_log_z, of_at, of_entropy, of_expected, of_sum, of_values, _):
        hidden, *tensors, ids, indices, values, log_z, at_ids, entropy, mean = ctx.saved_tensors
        stream = LogitStream(Head(*tensors, *ctx.rest_of_head), hidden)
        a, b = of_softmax(of_log_z, entropy, of_entropy, of_expected)
        single = [(of_at, ids, at_ids), (of_values, indices, values)]
        single = [parts for parts in single if parts[0] is not None]
        e = wanted = s = None
        if single:
            e, wanted, s = (torch.cat(parts, dim=1) for parts in zip(*single))
        if mean is None:
            loss = LogitGradient(a, b, of_sum, wanted, e)
            grad_hidden, *of_head = stream.gradients(loss, log_z, ctx.needs)
        else:
            grad_hidden = torch.zeros_like(mean) if a is None else mean * a.unsqueeze(1)
            if e is not None and wanted is not None and s is not None:
                stream.add_rows(grad_hidden, wanted, s, e)
            of_head = [None] * 3
        if grad_hidden is not None:
            grad_hidden = grad_hidden[:, : hidden.shape[1]].to(hidden.dtype)
        return grad_hidden, *of_head, *[None] * 4


def of_softmax(
    of_log_z: Tensor | None,
    entropy: Tensor | None,
    of_entropy: Tensor | None,
    of_expected: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """``[N]`` factors of p and of p log p in the gradient of the logits (None: 0), from those of a
    loss with respect to log Z, entropy and expected logit."""
    a, b = of_log_z, None
    if of_entropy is not None and entropy is not None:
        a, b = _sum(a, -of_entropy * entropy), -of_entropy
    if of_expected is not None and entropy is not None:
        a, b = _sum(a, of_expected * (1.0 + entropy)), _sum(b, of_expected)
    return a, b


def _sum(x: Tensor | None, y: Tensor) -> Tensor:
    return y if x is None else x + y


def _check(head: Head, hidden: Tensor, ids: Tensor | None, top_k: int) -> None:
    if hasattr(head.weight, "placements"):
        raise ValueError(
            "row_reductions got a head whose rows are spread over processes (a DTensor), and it "
            "sums over whole heads alone; pass weight.full_tensor()."
        )
    width = sum(t.shape[1] for t in (head.weight, head.low_rank) if t is not None)
    if hidden.dim() != 2 or hidden.shape[1] != width:
        raise ValueError(
            f"row_reductions got hidden of shape {tuple(hidden.shape)}; this head needs "
            f"[N, {width}]."
        )
    if not 0 <= top_k <= head.vocab_size:
        raise ValueError(
            f"row_reductions got top_k={top_k}; 0 to {head.vocab_size}, the number of classes, "
            "can be found."
        )
    if ids is None:
        return
    if ids.dtype != torch.int64 or ids.dim() not in (1, 2) or len(ids) != len(hidden):
        raise ValueError(
            f"row_reductions got ids of shape {tuple(ids.shape)} and {ids.dtype}; int64 "
            f"[{len(hidden)}] or [{len(hidden)}, K] is needed."
        )
    is_class = ((ids >= 0) & (ids < head.vocab_size)).all()
    if ids.device.type != "cpu":
        message = f"row_reductions got ids that do not lie in [0, {head.vocab_size})."
        torch._assert_async(is_class, message)  # pyright: ignore[reportPrivateImportUsage]
    elif not is_class:
        raise ValueError(
            f"row_reductions got ids from {int(ids.min())} to {int(ids.max())}; they must lie in "
            f"[0, {head.vocab_size}), masked positions too."
        )
