"""The tail's proposal: how likely each class is to be worth a place in the sample."""

from __future__ import annotations

import torch


def log_label_prior(counts: torch.Tensor, power: float, uniform_floor: float) -> torch.Tensor:
    """``log((1 - floor) · n_j^power / sum_k n_k^power + floor / V)``, fp64 ``[V]``.

    Args:
        counts: ``[V]`` label counts, not all 0.
        power: 1 follows the frequencies, 0 makes every class seen so far equally likely.
        uniform_floor: share spread evenly, which bounds the weights at ``V / (floor · m)``.
    """
    seen = counts.to(torch.float64)
    frequency = torch.where(counts > 0, seen.pow(power), seen)
    share = frequency / frequency.sum()
    return torch.log((1.0 - uniform_floor) * share + uniform_floor / counts.numel())
