"""Single logits of each position, without the others: ``s_tk = g(h_t·w_i + b_i)``, i = ids[t, k].

Rows are gathered for a block of positions at a time, and again in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head, Needs

BLOCK_ELEMENTS = 2**22
"""Elements of the gathered rows of a block of positions (16 MiB in fp32)."""


def logits_at(head: Head, hidden: Tensor, ids: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """``[N, K]`` logits, fp32 or, of fp64 inputs, fp64.

    Args:
        head: the output head.
        hidden: ``[N, d]``, or ``[N, d + r]`` for a head with a low-rank operand.
        ids: ``[N, K]`` int64 in ``[0, V)``.
        sparse_grad: give the gradient of the weight as a sparse tensor, for code that adds a dense
            one to it.
    """
    return _LogitsAt.apply(
        hidden, *head.tensors, ids, head[3:], sparse_grad, torch.is_grad_enabled()
    )


def _blocks(ids: Tensor, width: int) -> list[slice]:
    step = max(1, BLOCK_ELEMENTS // (ids.shape[1] * width))
    return [slice(start, start + step) for start in range(0, len(ids), step)]


class _LogitsAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, low_rank, bias, ids, rest_of_head, sparse_grad, grad_enabled):
        head = Head(weight, low_rank, bias, *rest_of_head)
        h = head.extend(hidden, compute_dtype(hidden, weight))
        s = h.new_empty(ids.shape)
        for block in _blocks(ids, h.shape[1]):
            s[block] = torch.bmm(_rows(head, ids[block], h), h[block].unsqueeze(2)).squeeze(2)
        head.post.apply_(s)
        ctx.needs = Needs.of(ctx, grad_enabled)
        ctx.rest_of_head, ctx.sparse_grad = rest_of_head, sparse_grad
        if ctx.needs:
            ctx.save_for_backward(hidden, weight, low_rank, bias, ids, s)
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, *tensors, ids, s = ctx.saved_tensors
        head, needs = Head(*tensors, *ctx.rest_of_head), ctx.needs
        h = head.extend(hidden, s.dtype)
        g = grad * head.post.slope(s)
        grad_hidden = torch.empty_like(h) if needs.hidden else None
        if grad_hidden is not None:
            for block in _blocks(ids, h.shape[1]):
                rows = _rows(head, ids[block], h)
                grad_hidden[block] = torch.bmm(g[block].unsqueeze(1), rows).squeeze(1)
            grad_hidden = grad_hidden[:, : hidden.shape[1]].to(hidden.dtype)
        of_head: list[Tensor | None] = [None] * 3
        if any(needs.head):
            distinct, at = torch.unique(ids, return_inverse=True)
            trained = h[:, head.num_frozen(needs.head) :]
            columns = h.new_zeros(len(distinct), trained.shape[1])
            for k in range(ids.shape[1]):
                columns.index_add_(0, at[:, k], trained * g[:, k, None])
            of_head = head.gradients(needs.head, distinct, columns, sparse=ctx.sparse_grad)
        return grad_hidden, *of_head, *[None] * 4


def _rows(head: Head, ids: Tensor, like: Tensor) -> Tensor:
    """``[n, K, D]``."""
    return head.rows(ids.reshape(-1), like.dtype).view(*ids.shape, -1)
