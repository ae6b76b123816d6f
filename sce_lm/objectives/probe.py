"""What the approximation costs, measured while training: the exact loss on a few positions.

The relative error that an objective reports comes from its own sample and cannot see what was never
drawn. Every so many calls a :class:`Probe` takes some positions of the batch and compares

    probe_bias         mean of (loss - exact loss), nats; of a softmax log Zhat - log Z
    probe_cos_hidden   cosine of the loss's gradient of their hidden states with the exact one's

A position that the objective leaves out, as published SCE may, has loss 0.

It draws for itself from a copy of the objective and its state, so training goes on as without it,
bit for bit. It costs the loss of a batch with a frozen head, and exact cross-entropy of its
positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from sce_lm.objectives.base import Objective
from sce_lm.objectives.exact import Exact, ExactConfig


class Probe:
    """Called as the objective is, after it, with its arguments. Positions count alike, whatever
    they weigh.

    Args:
        every: calls from one look to the next; the first call is looked at.
        positions: of a look, spread evenly over those that have a label.
        tell_classes: also say which classes a look was at; costs statistics of the whole batch.
    """

    def __init__(self, every: int, positions: int = 256, *, tell_classes: bool = False) -> None:
        if every < 1 or positions < 1:
            raise ValueError(
                f"Probe takes {every} calls and {positions} positions; give 1 or more."
            )
        self.every, self.positions, self.tell_classes = every, positions, tell_classes
        self.calls = 0
        self.figures: dict[str, float] = {}
        """Of the latest look, empty before it."""
        self.errors = torch.empty(0)
        """``[positions]`` loss - exact loss of the latest look, on the CPU."""
        self.by_frequency: dict[str, list[float]] = {}
        """Which classes its batch was compared with, by :func:`shares_by_frequency`; empty if with
        all of them, or not asked for."""

    def __call__(
        self,
        objective: Objective,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        *,
        ignore_index: int = -100,
        num_items_in_batch: Any = None,
        token_weights: Any = None,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        is_due = self.calls % self.every == 0
        self.calls += 1
        labels = labels.reshape(-1)
        valid = (labels != ignore_index).nonzero().squeeze(1)
        if not is_due or objective.state is None or not len(valid):
            return
        count = min(len(valid), self.positions)
        chosen = valid[torch.linspace(0, len(valid) - 1, count, device=valid.device).long()]
        hidden = hidden_states.detach().reshape(-1, hidden_states.shape[-1])
        options = {k: v.detach() if torch.is_tensor(v) else v for k, v in options.items()}
        options |= {
            "reduction": "none",
            "ignore_index": ignore_index,
            "generator": torch.Generator().manual_seed(self.calls),
        }
        weight, twin = weight.detach(), copy.deepcopy(objective)
        assert twin.state is not None
        twin.state.forget_calls()  # a run with a seed like the probe's has drawn the same numbers
        exact_loss = Exact(ExactConfig(**asdict(objective.config.terms())))

        def approximate(leaf: torch.Tensor) -> torch.Tensor:
            if not self.tell_classes:
                return twin(leaf, weight, labels, **options)[chosen]
            losses, statistics = twin(leaf, weight, labels, return_stats=True, **options)
            if statistics.candidates is not None:
                assert twin.state is not None
                assert twin.state.counts is not None
                self.by_frequency = shares_by_frequency(
                    twin.state.counts, candidates=statistics.candidates, labels=labels[valid]
                )
            return losses[chosen]

        def exact(leaf: torch.Tensor) -> torch.Tensor:
            return exact_loss(leaf, weight, labels[chosen], **options)

        loss, gradient = _with_gradient(approximate, hidden)
        expected, direction = _with_gradient(exact, hidden[chosen])
        self.errors = (loss - expected).cpu()
        self.figures = {
            "probe_bias": float(self.errors.mean()),
            "probe_cos_hidden": float(
                torch.cosine_similarity(gradient[chosen].flatten(), direction.flatten(), dim=0)
            ),
        }


def _with_gradient(
    loss: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # The backward pass is made here too, inside the autocast of the caller's forward.
    with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
        leaf = hidden.detach().requires_grad_()
        losses = loss(leaf)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient.double()


def shares_by_frequency(counts: torch.Tensor, **chosen: torch.Tensor) -> dict[str, list[float]]:
    """Which classes a call looks at: the share of each octave of classes that it chose.

    Args:
        counts: ``[V]`` how often each class has been a label.
        chosen: ids of classes, by name, for instance those of the candidates and the labels.

    Returns:
        ``"classes"``, the last rank 1, 2, 4, ... V of each octave, most frequent class first; and
        by name the share of the octave's classes that are among the ids.
    """
    order = counts.argsort(descending=True, stable=True)
    stops = [2**n for n in range((len(counts) - 1).bit_length())] + [len(counts)]
    found: dict[str, list[float]] = {"classes": [float(stop) for stop in stops]}
    for name, ids in chosen.items():
        is_chosen = torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
        is_chosen[ids] = 1.0
        parts = is_chosen[order].tensor_split(stops[:-1])
        found[name] = [float(part.mean()) for part in parts]
    return found
