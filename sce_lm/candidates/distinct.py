"""The distinct classes among many, and how often each of them is there."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sce_lm.ops.static_shapes import needs_static_shapes


class Distinct(NamedTuple):
    """Classes, ascending."""

    ids: torch.Tensor
    """``[U]`` int64: each class once; where shapes are static, U = n and classes repeat."""
    occurrences: torch.Tensor
    """``[U]`` int64: how often the class is there."""
    is_repeat: torch.Tensor | None
    """``[U]`` bool: the class has had its place, or there is none at all; None: nothing repeats."""

    def once(self, log_weights: torch.Tensor) -> torch.Tensor:
        """``[U]`` log-weights, -inf at repeats."""
        if self.is_repeat is None:
            return log_weights
        return log_weights.masked_fill(self.is_repeat, -torch.inf)


def distinct(
    ids: torch.Tensor, vocab_size: int, is_there: torch.Tensor | None = None
) -> Distinct:
    """The distinct classes of ``ids [n]`` in ``[0, vocab_size)``.

    Args:
        is_there: ``[n]`` bool: which places hold a class; None: all. Only with static shapes.
    """
    if not needs_static_shapes(ids.device):
        return Distinct(*torch.unique(ids, return_counts=True), None)
    if is_there is not None:
        ids = ids.masked_fill(~is_there, vocab_size)
    ordered = torch.sort(ids).values
    is_repeat = ordered == vocab_size
    is_repeat[1:] |= ordered[1:] == ordered[:-1]
    # Places behind the last class repeat the first one.
    ids = torch.where(ordered < vocab_size, ordered, ordered[:1].clamp_max(vocab_size - 1))
    first, stop = (torch.searchsorted(ordered, ids, right=right) for right in (False, True))
    return Distinct(ids, stop - first, is_repeat)
