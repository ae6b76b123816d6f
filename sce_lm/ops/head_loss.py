"""The one autograd function behind every loss of a head.

A loss here is a scalar nearly always, and its gradients are then taken in the forward pass, from
the logits that are at hand, and scaled in the backward pass. A loss for each position has its
gradients computed again once their factors are known, and so has a scalar whose second backward
pass finds the first one's gradients used up. What is specific to a loss is a :class:`Pass`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import NOTHING, Head, Needs
from sce_lm.ops.positions import Positions

OfInputs = tuple[torch.Tensor | None, ...]
"""Gradients of hidden states (``[N, D]`` or narrower), weight, low_rank and bias; None where it is
not needed."""


class Gradients(Protocol):
    """Gradients that were taken, perhaps still in sums that are small beside the head."""

    def of_inputs(self, factor: torch.Tensor | None = None) -> OfInputs:
        """They, times a 0-dim factor (None: 1). May work in place: it is asked for once."""
        ...


class Found(NamedTuple):
    """What the forward pass of a loss finds."""

    losses: torch.Tensor
    """``[N]``."""
    others: tuple[torch.Tensor, ...] = ()
    """What else the loss returns, without gradient."""
    gradients: Gradients | None = None
    """Those that were asked for, where they were taken in this pass."""
    kept: torch.Tensor | None = None
    """What the gradients' own pass can use."""


class Pass(ABC):
    """How one loss goes over the positions of a call."""

    @abstractmethod
    def forward(self, head: Head, positions: Positions, needs: Needs) -> Found:
        """Losses, and gradients of ``sum_t weight_t · loss_t`` for what ``needs`` names (nothing,
        where the positions have no weight)."""

    def backward(
        self, head: Head, positions: Positions, needs: Needs, kept: torch.Tensor | None
    ) -> Gradients:
        """The gradients, in a pass of their own."""
        gradients = self.forward(head, positions, needs).gradients
        assert gradients is not None
        return gradients


def head_loss(
    run: Pass, head: Head, positions: Positions
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The positions' weighted sum of losses, or ``[N]`` of them, with gradients for hidden states,
    weight, low_rank and bias; and what else the pass returns."""
    loss, *others = _HeadLoss.apply(
        positions.hidden,
        *head.tensors,
        positions.labels,
        positions.weight,
        positions.terms,
        positions.is_valid,
        head[3:],
        run,
        torch.is_grad_enabled(),
    )
    return loss, tuple(others)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        low_rank,
        bias,
        labels,
        position_weight,
        terms,
        is_valid,
        rest_of_head,
        run,
        grad_enabled,
    ):
        ctx.needs = Needs.of(ctx, grad_enabled)
        ctx.run, ctx.rest_of_head = run, rest_of_head
        ctx.position_weight, ctx.terms, ctx.is_valid = position_weight, terms, is_valid
        now = NOTHING if position_weight is None else ctx.needs
        positions = Positions(hidden, labels, position_weight, terms, is_valid)
        found = run.forward(Head(weight, low_rank, bias, *rest_of_head), positions, now)
        ctx.gradients = found.gradients if now else None
        ctx.mark_non_differentiable(*found.others)
        ctx.save_for_backward(hidden, weight, low_rank, bias, labels, found.kept)
        return positions.reduce(found.losses), *found.others

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        hidden, *tensors, labels, kept = ctx.saved_tensors
        head = Head(*tensors, *ctx.rest_of_head)
        factor = grad_outputs[0].to(compute_dtype(hidden, head.weight))
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            if ctx.position_weight is not None:
                factor = factor * ctx.position_weight
            positions = Positions(hidden, labels, None, ctx.terms, ctx.is_valid)
            positions = replace(positions, weight=positions.valid(factor))
            gradients, factor = ctx.run.backward(head, positions, ctx.needs, kept), None
        grad_hidden, *of_head = gradients.of_inputs(factor)
        if grad_hidden is not None:
            grad_hidden = grad_hidden[:, : hidden.shape[1]].to(hidden.dtype)
        of_head = [
            None if gradient is None or part is None else gradient.to(part.dtype)
            for gradient, part in zip(of_head, head.tensors)
        ]
        return grad_hidden, *of_head, *[None] * 7
