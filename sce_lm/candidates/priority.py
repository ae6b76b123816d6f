"""Priority sampling (Duffield, Lund, Thorup 2007): m distinct classes, exactly unbiased sums.

    u_j ~ U(0, 1];   r_j = a_j - log u_j;   T = the m largest r;   tau = the (m+1)-th largest r
    c_j = max(0, tau - a_j)                 minus the log of the inclusion probability, given tau
    E[ sum_{j in T} f_j exp(c_j) ] = sum_j f_j         for every f fixed before u is drawn

The sum is right for every f at once, hence for every position that shares the sample.
"""

from __future__ import annotations

import torch


def priority_sample(
    log_proposal: torch.Tensor, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw ``size`` distinct classes and the log-weights that make their sums unbiased.

    Args:
        log_proposal: ``[V]`` fp64, a_j up to a common constant; -inf leaves a class out.
        size: m; if it reaches the number of classes with a finite ``a``, all of them are taken
            with weight 1.
        generator: source of u, on the device of ``log_proposal``. The uniforms have 53 bits, and
            class j takes the j-th, so that a draw does not depend on which classes are left out.

    Returns:
        ``[m]`` int64 ids and ``[m]`` fp64 log-weights c >= 0.
    """
    available = int(torch.isfinite(log_proposal).sum())
    if size >= available:
        ids = torch.isfinite(log_proposal).nonzero().squeeze(1)
        return ids, log_proposal.new_zeros(available)
    uniform = torch.rand(
        log_proposal.shape, generator=generator, dtype=torch.float64, device=log_proposal.device
    )
    rank = log_proposal - torch.log1p(-uniform)  # 1 - uniform lies in (0, 1]
    top = torch.topk(rank, size + 1)
    ids, threshold = top.indices[:size], top.values[size]
    return ids, (threshold - log_proposal[ids]).clamp_min_(0.0)
