"""Small softmax problems for the tests of losses and estimators."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sce_lm import LogitTransform
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions


class Problem(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    bias: torch.Tensor | None

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The tensors with a gradient."""
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def head(
        self, post: LogitTransform = LogitTransform(), low_rank: torch.Tensor | None = None
    ) -> Head:
        return Head(self.weight, low_rank, self.bias, post)

    def positions(self, weight: torch.Tensor | None = None) -> Positions:
        return Positions(self.hidden, self.labels, weight)


def make_problem(
    num_positions, vocab_size, width, *, with_bias=True, dtype=torch.float64, seed=0, spread=1.0
) -> Problem:
    """Gaussian hidden states and weights with raw logits of standard deviation ``spread``, a bias
    whose mean is not 0, and labels with repetitions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(num_positions, width)
    weight = normal(vocab_size, width) * spread / width**0.5 + 0.1
    bias = 0.5 * normal(vocab_size) + 1.0 if with_bias else None
    share = torch.rand(num_positions, generator=generator) ** 2
    labels = (share * vocab_size).long().clamp_max(vocab_size - 1)
    tensors = [t if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    return Problem(tensors[0], tensors[1], labels, tensors[2])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def gradients(loss: torch.Tensor, problem: Problem) -> list[torch.Tensor]:
    """Dense gradients of a loss in the order hidden, weight, bias."""
    return [g.to_dense() for g in torch.autograd.grad(loss, problem.parameters)]


def equal_chunks(rounds: int, size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """``[rounds, size]`` a chunk for each, in another order each round."""
    orders = [torch.randperm(size, generator=generator) for _ in range(rounds)]
    return torch.stack(orders) * count // size
