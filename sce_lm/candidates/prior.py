"""The tail's proposal: how likely each class is to be worth a place in the sample.

Every function here gives a distribution over the V classes, as fp64 ``[V]``. The tail is drawn from
a mixture of them, and weighed by the density of the mixture, so that any choice is unbiased.
"""

from __future__ import annotations

import torch

from sce_lm.candidates.center_softmax import CenterSoftmax


def label_prior(counts: torch.Tensor, power: float) -> torch.Tensor:
    """``n_j^power / sum_k n_k^power``.

    Args:
        counts: ``[V]`` label counts; if all are 0, the prior is 0 too.
        power: 1 follows the frequencies, 0 makes every class seen so far equally likely.
    """
    # 0^0 is 1, and classes that were never seen have no part in the prior.
    frequency = counts.double().pow(power) if power else (counts > 0).double()
    return frequency / frequency.sum().clamp_min(1.0)


def log_with_floor(
    prior: torch.Tensor, uniform_floor: float | torch.Tensor, left_out: torch.Tensor | None = None
) -> torch.Tensor:
    """``log((1 - floor) · prior_j + floor / V)``; the floor bounds the weights at
    ``V / (floor · m)``. Classes of the ids ``left_out`` get -inf, and V does not count them."""
    if left_out is None:
        return torch.log((1.0 - uniform_floor) * prior + uniform_floor / prior.numel())
    floor = uniform_floor / max(prior.numel() - len(left_out), 1)
    density = (1.0 - uniform_floor) * prior + floor
    return density.index_fill(0, left_out, 0.0).log()


def log_label_prior(counts: torch.Tensor, power: float, uniform_floor: float) -> torch.Tensor:
    """:func:`label_prior` with a floor."""
    return log_with_floor(label_prior(counts, power), uniform_floor)


def gradient_prior(at_centers: CenterSoftmax, is_valid: torch.Tensor | None = None) -> torch.Tensor:
    """How long the gradient of each row of W is, as the batch's k-means centres see it.

        q_j  ~  | sum_k n_k share_kj c_k |

    A tail whose inclusion probabilities are in proportion to the norms of what it stands for has
    the smallest variance. n_k is the number of centre k's positions, share what
    :class:`~sce_lm.candidates.center_softmax.CenterSoftmax` says.

    Args:
        is_valid: ``[N]`` bool: which positions there are; None: all.
    """
    centers, center_of = at_centers.centers.double(), at_centers.center_of
    one = centers.new_ones(len(center_of)) if is_valid is None else is_valid.to(centers.dtype)
    sizes = centers.new_zeros(len(centers)).index_add_(0, center_of, one)
    share = at_centers.share * sizes.unsqueeze(1)
    square = ((centers @ centers.T @ share) * share).sum(dim=0)
    norm = square.clamp_min_(0.0).sqrt_()
    return norm / norm.sum().clamp_min(torch.finfo(torch.float64).tiny)
