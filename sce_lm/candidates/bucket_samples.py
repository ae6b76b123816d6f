"""A weighted sample of the catalogue for each bucket, by the softmax at its centre."""

from __future__ import annotations

import math

import torch

from sce_lm.candidates.priority import priority_samples
from sce_lm.ops.head import EVERYTHING, Head

PRIOR_SHARE = 0.5
"""Share of the tail's proposal in that of a bucket's own sample, for positions far from its
centre."""
SCORES = 2**23
"""Scores of centres held at a time (32 MiB in fp32)."""


def bucket_samples(
    centers: torch.Tensor,
    head: Head,
    log_prior: torch.Tensor,
    size: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A priority sample of the catalogue for each bucket.

        q_kj = (1 - share) · softmax_j(g(c_k·w_j + b_j)) + share · prior_j

    Args:
        centers: ``[n_b, d]``.
        head: the output head.
        log_prior: ``[V]`` fp64; -inf leaves a class out.
        size: K, at most the number of classes that are not left out; where shapes are static, at
            most V.

    Returns:
        Ids ascending in each row and their log-weights, each ``[n_b, K]``. Static shapes may leave
        places empty, with the log-weight -inf and any id.
    """
    dtype = centers.dtype
    rows = head.rows(EVERYTHING, dtype)
    left_out = log_prior == -torch.inf
    prior = log_prior + math.log(PRIOR_SHARE)
    ids, log_weights = [], []
    for part in head.extend(centers, dtype).split(max(1, SCORES // len(rows))):
        scores = head.post((part @ rows.T).double())
        scores = torch.log_softmax(scores, dim=1) + math.log1p(-PRIOR_SHARE)
        own = torch.logaddexp(scores, prior).masked_fill_(left_out, -torch.inf)
        drawn, c = priority_samples(own, size, generator)
        drawn, order = torch.sort(drawn, dim=1)
        ids.append(drawn)
        log_weights.append(c.gather(1, order))
    return torch.cat(ids), torch.cat(log_weights)
