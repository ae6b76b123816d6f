"""Resampling: many independent draws for each position from a pool, as counts."""

from __future__ import annotations

import torch


def multinomial_counts(
    log_weights: torch.Tensor, draws: int, generator: torch.Generator
) -> torch.Tensor:
    """How often each of U classes comes up in ``draws`` draws by ``exp(log_weights)``.

    Args:
        log_weights: ``[n, U]``; -inf is never drawn, and a row of -inf draws nothing.

    Returns:
        ``[n, U]`` whole numbers in the dtype of ``log_weights``.
    """
    counts = torch.zeros_like(log_weights)
    top = log_weights.amax(dim=1, keepdim=True).clamp_min(torch.finfo(log_weights.dtype).min)
    cumulative = (log_weights - top).exp().cumsum(dim=1, dtype=torch.float64)
    total = cumulative[:, -1:]
    u = torch.rand(
        len(counts), draws, generator=generator, dtype=torch.float64, device=counts.device
    )
    # The first class whose cumulative sum exceeds u: never one of weight 0.
    drawn = torch.searchsorted(cumulative, u.mul_(total), right=True)
    drawn.clamp_max_(counts.shape[1] - 1)
    counts.scatter_add_(1, drawn, counts.new_ones(()).expand_as(drawn))
    return counts * (total > 0)
