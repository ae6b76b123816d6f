"""The distinct classes among many, and how often each of them is there."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sce_lm.ops.static_shapes import needs_static_shapes


class Distinct(NamedTuple):
    """Classes, ascending."""

    ids: torch.Tensor
    """``[U]`` int64: each class once; where shapes are static, U = min(n, V) and places are left
    over."""
    occurrences: torch.Tensor
    """``[U]`` int64: how often the class is there."""
    is_spare: torch.Tensor | None
    """``[U]`` bool: places left over, whose ids may be any; None: there are none."""

    def once(self, log_weights: torch.Tensor) -> torch.Tensor:
        """``[U]`` log-weights, -inf in places that are left over."""
        if self.is_spare is None:
            return log_weights
        return log_weights.masked_fill(self.is_spare, -torch.inf)


def distinct(ids: torch.Tensor, vocab_size: int, is_there: torch.Tensor | None = None) -> Distinct:
    """The distinct classes of ``ids [n]`` in ``[0, vocab_size)``.

    Args:
        is_there: ``[n]`` bool: which places hold a class; None: all. Only with static shapes.
    """
    if not needs_static_shapes(ids.device):
        found, occurrences = torch.unique(ids, return_counts=True)
        return Distinct(found, occurrences, None)
    if len(ids) >= vocab_size:
        one = torch.ones_like(ids) if is_there is None else is_there.to(ids.dtype)
        occurrences = ids.new_zeros(vocab_size).index_add_(0, ids, one)
        every = torch.arange(vocab_size, device=ids.device)
        return Distinct(every, occurrences, occurrences == 0)
    if is_there is not None:
        ids = ids.masked_fill(~is_there, vocab_size)
    ordered = torch.sort(ids).values
    is_spare = ordered == vocab_size
    is_spare[1:] |= ordered[1:] == ordered[:-1]
    # Places behind the last class repeat the first one.
    ids = torch.where(ordered < vocab_size, ordered, ordered[:1].clamp_max(vocab_size - 1))
    first, stop = (torch.searchsorted(ordered, ids, right=right) for right in (False, True))
    return Distinct(ids, stop - first, is_spare)
