"""Proposals: distributions over the catalogue that are cheap to draw from, with their exact log q,
and the log-weights with which their draws stand for the sum over all classes.

    with replacement, m draws:   k_j draws of j      c_j = log k_j - log(m q_j)
    distinct, n tries:           j drawn at all      c_j = -log(1 - (1 - q_j)^n)

Both make ``E[sum_j f_j exp(c_j)] = sum_j f_j`` for every f that vanishes where q does. The second
fixes the number of tries: to go on until m classes are distinct would bias the inclusion
probabilities.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from sce_lm.candidates.distinct import distinct


class Proposal(ABC):
    """A distribution q over ``vocab_size`` classes."""

    vocab_size: int

    @abstractmethod
    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Independent draws from q, int64 of this shape on the generator's device."""

    @abstractmethod
    def log_prob(self, ids: torch.Tensor) -> torch.Tensor:
        """log q of these classes, fp64."""


class Uniform(Proposal):
    """q = 1/V."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def draw(self, shape, generator):
        return torch.randint(self.vocab_size, shape, generator=generator, device=generator.device)

    def log_prob(self, ids):
        return torch.full_like(ids, -math.log(self.vocab_size), dtype=torch.float64)


class LogUniform(Proposal):
    """``q_j = log((j + 2) / (j + 1)) / log(V + 1)``: Zipf's law for ids in order of falling
    frequency, drawn in closed form."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def draw(self, shape, generator):
        u = _uniform(shape, generator)
        ids = (u * math.log(self.vocab_size + 1)).exp_().sub_(1.0).long()
        return ids.clamp_max_(self.vocab_size - 1)

    def log_prob(self, ids):
        rank = ids.to(torch.float64)
        return torch.log(torch.log1p(1.0 / (rank + 1.0)) / math.log(self.vocab_size + 1))


class Categorical(Proposal):
    """Any q, drawn through its cumulative sum in fp64.

    Args:
        log_weights: ``[V]`` log q up to a constant; -inf leaves a class out, and not all are.
    """

    def __init__(self, log_weights: torch.Tensor) -> None:
        self.vocab_size = log_weights.numel()
        self._log_q = torch.log_softmax(log_weights.to(torch.float64), dim=0)
        self._cumulative = self._log_q.exp().cumsum(0)

    def draw(self, shape, generator):
        u = _uniform(shape, generator) * self._cumulative[-1]
        return torch.searchsorted(self._cumulative, u, right=True).clamp_max_(self.vocab_size - 1)

    def log_prob(self, ids):
        return self._log_q[ids]


def draw_with_replacement(
    proposal: Proposal, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """``size`` draws as ``[K]`` ids, ascending, and their ``[K]`` log-weights. Ids are distinct;
    with static shapes K is ``size``, and places left over have the weight -inf."""
    drawn = distinct(proposal.draw((size,), generator), proposal.vocab_size)
    log_weights = torch.log(drawn.occurrences.to(torch.float64) / size)
    return drawn.ids, drawn.once(log_weights - proposal.log_prob(drawn.ids))


def draw_distinct(
    proposal: Proposal, tries: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``[K]`` distinct ids among ``tries`` draws, ascending, and their ``[K]`` log-weights;
    with static shapes as above."""
    drawn = distinct(proposal.draw((tries,), generator), proposal.vocab_size)
    return drawn.ids, drawn.once(-log_inclusion(proposal.log_prob(drawn.ids), tries))


def draw_rows(
    proposal: Proposal, rows: int, size: int, generator: torch.Generator, *, distinct: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent draws for each row: ``[rows, size]`` ids and log-weights.

    ``distinct`` gives repetitions within a row the weight -inf and the rest that of ``size`` tries.
    """
    ids = proposal.draw((rows, size), generator)
    if not distinct:
        return ids, -proposal.log_prob(ids) - math.log(size)
    ids = ids.sort(dim=1).values
    log_weights = -log_inclusion(proposal.log_prob(ids), size)
    log_weights[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], -torch.inf)
    return ids, log_weights


def log_inclusion(log_q: torch.Tensor, tries: int) -> torch.Tensor:
    """``log(1 - (1 - q)^tries)``, the log-probability to be among ``tries`` draws."""
    return torch.log(-torch.expm1(tries * torch.log1p(-log_q.exp())))


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
