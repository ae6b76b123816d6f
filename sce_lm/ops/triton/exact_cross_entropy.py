r"""Exact cross-entropy by kernels: log Z less the label's logit, and the best class.

In the logits' gradient the label's entry is ``(softmax - 1)·g'``, in fp32 until it is complete.
"""

from __future__ import annotations

from sce_lm.ops.exact_cross_entropy import ExactLoss
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.row_reductions import Asked
from sce_lm.ops.triton.row_reductions import row_reductions
from sce_lm.ops.triton.supported import losses_supported

exact_cross_entropy_supported = losses_supported


def exact_cross_entropy(head: Head, positions: Positions) -> ExactLoss:
    """As :func:`sce_lm.ops.exact_cross_entropy.exact_cross_entropy`, for inputs that
    :func:`exact_cross_entropy_supported` accepts."""
    labels, asked = positions.labels, Asked(False, False, False, top_k=1)
    log_z, label_logit, *_, top = row_reductions(head, positions.hidden, labels, asked)
    assert label_logit is not None
    assert top is not None
    confidence = (top.values.detach().squeeze(1) - log_z.detach()).exp()
    correct = top.indices.squeeze(1) == labels
    return ExactLoss(positions.reduce(log_z - label_logit), correct, confidence)
