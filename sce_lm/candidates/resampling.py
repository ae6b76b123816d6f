"""Resampling: many draws for each position from a pool, as counts.

Independent draws are multinomial. Systematic ones need one number a position, u uniform in [0, 1):
with F the cumulative sum of the position's weights w, which add up to 1,

    k_j = floor(R F_j + u) - floor(R F_{j-1} + u),       E[k_j] = R w_j,       |k_j - R w_j| < 1

so a sum that is linear in k is as unbiased as with independent draws, and varies less. Counts of
different classes are not those of independent draws: a loss that is defined by such draws keeps
its distribution with them alone.
"""

from __future__ import annotations

import torch


def multinomial_counts(
    log_weights: torch.Tensor, draws: int, generator: torch.Generator
) -> torch.Tensor:
    """How often each of U classes comes up in ``draws`` independent draws by ``exp(log_weights)``.

    Args:
        log_weights: ``[n, U]``; -inf is never drawn, and a row of -inf draws nothing.

    Returns:
        ``[n, U]`` whole numbers in the dtype of ``log_weights``.
    """
    counts, cumulative = torch.zeros_like(log_weights), _cumulative(log_weights)
    total = cumulative[:, -1:]
    u = torch.rand(
        len(counts), draws, generator=generator, dtype=torch.float64, device=counts.device
    )
    # The first class whose cumulative sum exceeds u: never one of weight 0.
    drawn = torch.searchsorted(cumulative, u.mul_(total), right=True)
    drawn.clamp_max_(counts.shape[1] - 1)
    counts.scatter_add_(1, drawn, counts.new_ones(()).expand_as(drawn))
    return counts * (total > 0)


def systematic_counts(
    log_weights: torch.Tensor, draws: int, generator: torch.Generator
) -> torch.Tensor:
    """The same for systematic draws; arguments and result as of :func:`multinomial_counts`."""
    cumulative = _cumulative(log_weights)
    total = cumulative[:, -1:].clamp_min(1.0)  # as it is, or 0 for a row without classes
    u = torch.rand(total.shape, generator=generator, dtype=torch.float64, device=total.device)
    below = torch.add(u, cumulative.div_(total), alpha=draws).floor_()
    below.clamp_max_(draws)  # draws + u may be rounded up
    below[:, 1:].sub_(below[:, :-1].clone())
    return below.to(log_weights.dtype)


def _cumulative(log_weights: torch.Tensor) -> torch.Tensor:
    """``[n, U]`` fp64 sums of the weights, in units of the row's largest."""
    top = log_weights.amax(dim=1, keepdim=True).clamp_min(torch.finfo(log_weights.dtype).min)
    return (log_weights - top).exp_().cumsum(dim=1, dtype=torch.float64)
