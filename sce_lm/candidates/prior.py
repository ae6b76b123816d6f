"""The tail's proposal: how likely each class is to be worth a place in the sample.

Every function here gives a distribution over the V classes, as fp64 ``[V]``. The tail is drawn from
a mixture of them, and weighed by the density of the mixture, so that any choice is unbiased.
"""

from __future__ import annotations

import torch

from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.rows import HeadColumns

TILE_ELEMENTS = 2**23
"""Scores held at a time (32 MiB in fp32)."""


def label_prior(counts: torch.Tensor, power: float) -> torch.Tensor:
    """``n_j^power / sum_k n_k^power``.

    Args:
        counts: ``[V]`` label counts; if all are 0, the prior is 0 too.
        power: 1 follows the frequencies, 0 makes every class seen so far equally likely.
    """
    seen = counts.to(torch.float64)
    frequency = torch.where(counts > 0, seen.pow(power), seen)
    return frequency / frequency.sum().clamp_min(1.0)


def log_with_floor(prior: torch.Tensor, uniform_floor: float) -> torch.Tensor:
    """``log((1 - floor) · prior_j + floor / V)``; the floor bounds the weights at
    ``V / (floor · m)``."""
    return torch.log((1.0 - uniform_floor) * prior + uniform_floor / prior.numel())


def log_label_prior(counts: torch.Tensor, power: float, uniform_floor: float) -> torch.Tensor:
    """:func:`label_prior` with a floor."""
    return log_with_floor(label_prior(counts, power), uniform_floor)


def gradient_prior(
    centers: torch.Tensor,
    sizes: torch.Tensor,
    columns: HeadColumns,
    post: LogitTransform,
    *,
    control_variate: bool,
) -> torch.Tensor:
    """How long the gradient of each row of W is, as the batch's k-means centres see it.

        q_j  ~  | sum_k n_k (p_kj - e_k) c_k |
        p_kj = softmax_j(g(c_k·w_j + b_j)),     e_k = exp g(mean_j (c_k·w_j + b_j)) / Z_k

    A tail whose inclusion probabilities are in proportion to the norms of what it stands for has
    the smallest variance; row j's gradient through Zhat is ``sum_t p_tj h_t``, of which the control
    variate knows ``e_t`` (without it e = 0). It costs a scan, ``n_b·V`` inner products.

    Args:
        centers: ``[n_b, d]`` c, fp32 or fp64.
        sizes: ``[n_b]`` n, positions of each.
        columns: of the head.
        post: g.
        control_variate: whether the tail has one.
    """
    extended = columns.extend(centers, centers.dtype)
    vocab_size, width = columns.weight.shape
    tile = max(1, TILE_ELEMENTS // max(len(centers), width))
    scores = torch.cat(
        [
            extended @ columns.rows(slice(start, start + tile), centers.dtype).T
            for start in range(0, vocab_size, tile)
        ],
        dim=1,
    )
    log_z = torch.logsumexp(post(scores), dim=1)
    mean = scores.mean(dim=1)
    share = post.apply_(scores).sub_(log_z.unsqueeze(1)).exp_().double()
    if control_variate:
        share -= (post(mean) - log_z).exp().unsqueeze(1)
    share *= sizes.unsqueeze(1)
    square = ((centers.double() @ centers.double().T @ share) * share).sum(dim=0)
    norm = square.clamp_min_(0.0).sqrt_()
    return norm / norm.sum().clamp_min(torch.finfo(torch.float64).tiny)
