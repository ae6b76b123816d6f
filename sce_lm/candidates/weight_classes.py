"""Poisson sampling of a large catalogue, in time that does not depend on its size.

Classes with about the same label count share one proposal q. A threshold t that makes the expected
number of draws m, and independent draws with

    pi_j = min(1, t·q_j);     c_j = -log pi_j;     E[ sum_{j in T} f_j exp(c_j) ] = sum_j f_j

are exactly unbiased, and have the variance of priority sampling (there tau = 1/t is random and the
size fixed; here it is the other way round). To draw only what is drawn, lay the classes on a line,
each ``lambda_j = -log(1 - pi_j)`` long, and throw a Poisson process of rate 1 at it: j is hit with
probability ``1 - exp(-lambda_j) = pi_j``, independently of the others. Within a group of equal pi
the class is found by a division.

Groups follow counts: 0 by itself, then two to an octave, so that counts in one group differ by at
most a factor of sqrt(2). They are built anew when the labels seen have grown by half; any proposal
that was fixed before the noise is unbiased, so a proposal that lags a little costs nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch

GROWTH = 1.5
"""The groups are built again when this many times as many labels have been seen."""


@dataclass(frozen=True)
class WeightClasses:
    """A catalogue sorted by how often each class was a label (4 bytes a class)."""

    order: torch.Tensor
    """``[V]`` int32 class ids, groups of ascending counts one after the other."""
    sizes: torch.Tensor
    """``[G]`` int64 on the CPU: classes of each group."""
    mean_counts: torch.Tensor
    """``[G]`` fp64 on the CPU: mean count of each group."""
    num_labels: int
    """Labels that had been seen when this was built."""

    @classmethod
    def build(cls, counts: torch.Tensor, num_labels: int) -> WeightClasses:
        """Sort the catalogue by ``counts [V]``; time proportional to V."""
        seen = (counts > 0).nonzero().squeeze(1)
        unseen = (counts == 0).nonzero().squeeze(1)
        group = _group(counts[seen])
        order = torch.argsort(group, stable=True)
        sizes = torch.bincount(group, minlength=1)
        totals = torch.bincount(group, weights=counts[seen].double(), minlength=1)
        sizes[0] = len(unseen)
        return cls(
            torch.cat([unseen, seen[order]]).to(torch.int32),
            sizes.cpu(),
            (totals / sizes.clamp_min(1)).cpu(),
            num_labels,
        )

    def is_due(self, num_labels: int) -> bool:
        """Whether so many labels call for building anew."""
        return num_labels >= max(GROWTH * self.num_labels, 1)

    def sample(
        self,
        size: int,
        counts: torch.Tensor,
        excluded: torch.Tensor,
        generator: torch.Generator,
        *,
        power: float,
        uniform_floor: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw about ``size`` distinct classes and their log-weights.

        Args:
            size: expected number; all that are left, if there are no more.
            counts: ``[V]`` present counts, to tell the groups of ``excluded``.
            excluded: ``[E]`` distinct ids that are never drawn.
            generator: source of the noise, on the device of ``order``.
            power: on the counts, in the proposal ``(1 - floor)·n^power / sum + floor / V``.
            uniform_floor: share of the proposal that is spread evenly.

        Returns:
            int64 ids and fp64 log-weights c >= 0.
        """
        group_sizes = self.sizes.tolist()
        shares = [
            n * (c**power if c > 0 else 0.0) for n, c in zip(group_sizes, self.mean_counts.tolist())
        ]
        total, vocab_size = sum(shares), len(self.order)
        proposal = [
            (1.0 - uniform_floor) * s / n / total + uniform_floor / vocab_size if total and n else
            1.0 / vocab_size
            for s, n in zip(shares, group_sizes)
        ]  # fmt: skip
        # Counts may have grown since the groups were built, so this is the number to expect of
        # each, not to rely on.
        gone = torch.bincount(_group(counts[excluded]), minlength=len(proposal)).tolist()
        left = [max(0, n - g) for n, g in zip(group_sizes, gone)]
        inclusion = _inclusion(proposal, left, size)

        starts = [0, *accumulate(group_sizes)]
        lengths = [0.0 if p >= 1.0 else -math.log1p(-p) for p in inclusion]
        edges = [0.0, *accumulate(n * length for n, length in zip(group_sizes, lengths))]
        device, f64 = self.order.device, torch.float64
        expected = torch.tensor(edges[-1], dtype=f64, device=device)
        hits = int(torch.poisson(expected, generator=generator))
        x = torch.rand(hits, generator=generator, dtype=f64, device=device) * edges[-1]
        bounds = torch.tensor(edges, dtype=f64, device=device)
        group = torch.searchsorted(bounds[1:], x, right=True).clamp_max_(len(lengths) - 1)
        start, length, count = (
            torch.tensor(values, dtype=f64, device=device)[group]
            for values in (starts[:-1], lengths, group_sizes)
        )
        inside = ((x - bounds[group]) / length).floor_().clamp_(min=0.0).minimum(count - 1)
        place = torch.unique((start + inside).long())
        certain = [
            torch.arange(starts[g], starts[g + 1], device=device)
            for g, p in enumerate(inclusion)
            if p >= 1.0
        ]
        place = torch.cat([place, *certain])
        group = torch.searchsorted(torch.tensor(starts[1:], device=device), place, right=True)
        log_weight = -torch.tensor(inclusion, dtype=f64, device=device).log()
        ids = self.order[place].long()
        is_in = torch.isin(ids, excluded, assume_unique=True)
        return ids[~is_in], log_weight[group[~is_in]].clamp_min_(0.0)


def _group(counts: torch.Tensor) -> torch.Tensor:
    """0 for a count of 0, else 1 + floor(2 log2 n)."""
    octave = (2.0 * counts.double().clamp_min(0.5).log2()).floor_().long()
    return torch.where(counts > 0, octave + 1, 0)


def _inclusion(proposal: list[float], left: list[int], size: int) -> list[float]:
    """``min(1, t·q_g)`` with t such that ``sum_g left_g · min(1, t·q_g) = size``."""
    if size >= sum(left):
        return [1.0] * len(left)
    certain: set[int] = set()
    while True:
        rest = [g for g in range(len(left)) if g not in certain]
        mass = sum(left[g] * proposal[g] for g in rest)
        wanted = size - sum(left[g] for g in certain)
        t = wanted / mass
        over = {g for g in rest if t * proposal[g] >= 1.0}
        if not over:
            return [1.0 if g in certain else t * proposal[g] for g in range(len(left))]
        certain |= over
