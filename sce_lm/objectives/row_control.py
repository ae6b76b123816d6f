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
without. It is written into the memory of the gradient that the candidates leave.
"""

from __future__ import annotations

from sce_lm.candidates.center_softmax import CenterSoftmax
from sce_lm.ops.candidates import Candidates, ExpectedRows


def expected_rows(candidates: Candidates, softmax: CenterSoftmax) -> ExpectedRows:
    """The part ``(1 - [j drawn] / pi_j)·ghat_j`` of each row's gradient.

    Args:
        candidates: those that were drawn.
        softmax: at the centres; at those of the buckets, if there are any.
    """
    share = softmax.share
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
    return ExpectedRows(share, softmax.centers, softmax.center_of)
