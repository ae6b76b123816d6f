"""The mean logit of each position over all classes, which label smoothing spreads its share over.

    mean_j s_j = scale·(h·mean_j W_j + mean_j b_j)              without a soft cap

One product a position, and a read of W. Its gradient reaches every row of W alike: autograd hands
on one row, expanded.
"""

from __future__ import annotations

import torch

from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions


def mean_logits(head: Head, positions: Positions) -> torch.Tensor:
    """``[N]`` mean of the logits of the classes that are not masked, with gradients for hidden
    states, weight, low_rank and bias.

    Raises:
        ValueError: the head has a soft cap.
    """
    if head.post.soft_cap is not None:
        raise ValueError(
            "label_smoothing needs the sum of all logits, which a soft cap "
            f"({head.post.soft_cap}) leaves to be computed one by one, as dear as exact "
            'cross-entropy; use objectives.get("exact", label_smoothing=...), or 0.'
        )
    dtype = compute_dtype(positions.hidden, head.weight)
    tables = [part for part in (head.weight, head.low_rank) if part is not None]
    mean = positions.hidden.to(dtype) @ torch.cat([_mean(t, head, dtype) for t in tables])
    if head.bias is not None:
        mean = mean + _mean(head.bias, head, dtype)
    return mean * head.post.scale


def _mean(table: torch.Tensor, head: Head, dtype: torch.dtype) -> torch.Tensor:
    """Mean over the classes of a table ``[V, ...]``, which takes no part in masked ones."""
    total = table.sum(dim=0, dtype=dtype)
    if head.masked is not None:
        if table.dim() == 1:  # they may be infinite, from which nothing can be taken off
            total = table[head.kept].sum(dtype=dtype)
        else:
            total = total - table.index_select(0, head.masked).sum(dim=0, dtype=dtype)
    return total / head.num_classes
