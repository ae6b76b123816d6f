"""A control variate of the head's own gradient: what k-means centres expect of every row.

Of a class j outside the certain lists exact cross-entropy takes the gradient

    X_j = sum_t a_t share_tj h_t

with a_t the weight of position t's loss and share the softmax, less what the tail's control variate
knows already (:class:`~sce_lm.candidates.center_softmax.CenterSoftmax`). A tail with inclusion
probabilities pi gives the row ``X_j / pi_j`` where it is drawn and nothing elsewhere. That is
unbiased, but Adam divides by the root of the mean square: such a row moves about sqrt(pi_j) times
as far as under exact gradients, and one that is never drawn not at all, whereas exact cross-entropy
pushes all of a large vocabulary down at every step. The batch's k-means centres c_k know each row's
gradient roughly,

    ghat_j = sum_k a_k share_kj c_k,     a_k = sum_{t at centre k} a_t

and ``ghat_j + [j drawn]·(X_j - ghat_j) / pi_j`` has the mean X_j whatever ghat is. Where there are
buckets they are the centres, without their own candidates if those are certain; where each bucket
draws for itself, so does its term of ghat. Only gradients of the head change: loss and dL/dh are as
without.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from sce_lm.candidates.center_softmax import CenterSoftmax
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.gradient_memory import TILE_ELEMENTS, gradient_memory, tile_rows
from sce_lm.ops.head import Head, Needs
from sce_lm.ops.positions import Positions


def with_expected_rows(
    loss: torch.Tensor,
    head: Head,
    positions: Positions,
    candidates: Candidates,
    expected: CenterSoftmax,
) -> torch.Tensor:
    """The same loss, whose gradient adds ``(1 - [j drawn] / pi_j)·ghat_j`` to each row.

    Args:
        loss: of :func:`~sce_lm.ops.candidate_cross_entropy.candidate_cross_entropy`.
        head, positions, candidates: that it was taken on.
        expected: softmax at the centres; at those of the buckets, if there are any.
    """
    centers, center_of, share = expected
    drawn = candidates.tail_log_weights.exp().to(share.dtype)
    left = share.new_ones(share.shape[1] + 1)  # the last place is for empty ones of the shared list
    left.index_add_(0, candidates.tail, drawn, alpha=-1.0)
    left[candidates.shared] = 0.0
    share = share * left[:-1]
    if candidates.bucket_items is not None:
        known = share.gather(1, candidates.bucket_items)
        if candidates.bucket_log_weights is not None:
            known *= candidates.bucket_log_weights.exp()
        share.scatter_add_(1, candidates.bucket_items, known.neg_())
    a = positions.weight
    return _ExpectedRows.apply(loss, *head.tensors, share, centers, center_of, a)


class _ExpectedRows(torch.autograd.Function):
    """Identity on the loss; the head's gradient is ``share.T @ (a·centers)``."""

    @staticmethod
    def forward(ctx, loss, weight, low_rank, bias, share, centers, center_of, position_weight):
        ctx.needs = Needs.of(ctx).head
        ctx.save_for_backward(weight, low_rank, bias, share, centers, center_of, position_weight)
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        *tensors, share, centers, center_of, position_weight = ctx.saved_tensors
        head = Head(*tensors)
        a = grad_outputs[0] if position_weight is None else grad_outputs[0] * position_weight
        a_of = share.new_zeros(len(centers))
        a_of.index_add_(0, center_of, a.to(share.dtype).expand(len(center_of)))
        rows = head.extend(centers, centers.dtype) * a_of.unsqueeze(1)
        parts = head.split(ctx.needs, rows[:, head.num_frozen(ctx.needs) :])
        of_head = [
            None if part is None or like is None else _product(share, part, like)
            for part, like in zip(parts, head.tensors)
        ]
        return grad_outputs[0], *of_head, None, None, None, None


def _product(share: torch.Tensor, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``share.T @ rows`` in the dtype and memory of a gradient of ``like``."""
    out = gradient_memory(like, like.dtype)
    step = tile_rows(TILE_ELEMENTS, rows[:1].numel(), rows.device)
    for start in range(0, len(out), step):
        out[start : start + step] = share[:, start : start + step].T @ rows
    return out
