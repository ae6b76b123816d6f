r"""Divergences of a student's softmax from a teacher's, class by class.

With ``p`` the student's probabilities, ``q`` the teacher's and ``m = (1 - beta) p + beta q``

    forward_kl   sum_j q_j log(q_j / p_j)                                      Hinton et al. 2015
    reverse_kl   sum_j p_j log(p_j / q_j)                                      MiniLLM, 2306.08543
    jsd          beta · sum_j q_j log(q_j / m_j) + (1 - beta) · sum_j p_j log(p_j / m_j)
                                                                               GKD, 2306.13649

and beta is as in TRL's GKDTrainer, whose beta of 0 is the forward and of 1 the reverse KL. All
three have one form of gradient with respect to the student's logits,

    G_j = p_j (r_j - K),    K = sum_j p_j r_j,    p·r = -q | p log(p / q) | (1 - beta) p log(p / m)

Everything is a sum over classes, so that it can be taken a tile of classes at a time, and over
candidates whose log-weights are part of ``log p`` and ``log q``: they cancel in every ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Kind = Literal["forward_kl", "reverse_kl", "jsd"]

FLOOR = -1e30
"""Log of a probability of 0. It is finite, so that 0·(FLOOR - FLOOR) is 0."""


class Terms(NamedTuple):
    """What some classes add, for n positions."""

    losses: torch.Tensor
    """``[n]`` their part of the divergence."""
    p: torch.Tensor
    """``[n, k]`` the student's probabilities."""
    pr: torch.Tensor
    """``[n, k]`` p·r."""

    @property
    def pull(self) -> torch.Tensor:
        """``[n]`` their part of K."""
        return self.pr.sum(dim=1)

    def gradient_(self, pull: torch.Tensor) -> torch.Tensor:
        """``[n, k]`` G, written over ``pr``.

        Args:
            pull: ``[n]`` K over all classes.
        """
        return self.pr.addcmul_(self.p, pull.unsqueeze(1), value=-1.0)


@dataclass(frozen=True, slots=True)
class Divergence:
    """One of them. Raises ValueError for a name that is none, and for beta outside [0, 1]."""

    kind: Kind = "forward_kl"
    beta: float = 0.5
    """The teacher's share in m; "jsd" only."""

    def __post_init__(self) -> None:
        if self.kind not in ("forward_kl", "reverse_kl", "jsd"):
            raise ValueError(
                f'divergence is {self.kind!r}; choose "forward_kl", "reverse_kl" or "jsd".'
            )
        if not (math.isfinite(self.beta) and 0.0 <= self.beta <= 1.0):
            raise ValueError(
                f"beta is {self.beta!r}; give the teacher's share in the mixture, in [0, 1]."
            )

    def __call__(self, log_p: torch.Tensor, log_q: torch.Tensor) -> Terms:
        """The terms of some classes; both arguments are ``[n, k]``, and are overwritten.

        Args:
            log_p: the student's log-probabilities.
            log_q: the teacher's.
        """
        kind, beta = self.kind, self.beta
        if kind == "jsd" and beta in (0.0, 1.0):
            kind = "reverse_kl" if beta else "forward_kl"
        p = log_p.exp()
        if kind == "reverse_kl":
            pr = log_p.sub_(log_q).mul_(p)
            return Terms(pr.sum(dim=1), p, pr)
        q = log_q.exp()
        if kind == "forward_kl":
            losses = log_q.sub_(log_p).mul_(q).sum(dim=1)
            return Terms(losses, p, q.neg_())
        # Where both are too small for a float, so are their terms, whatever the logarithm is.
        log_m = torch.lerp(p, q, beta).clamp_min_(torch.finfo(p.dtype).tiny).log_()
        pr = log_p.sub_(log_m).mul_(p).mul_(1.0 - beta)
        of_teacher = log_q.sub_(log_m).mul_(q).sum(dim=1)
        return Terms(pr.sum(dim=1) + beta * of_teacher, p, pr)
