"""The loss of a patched model as it runs, and what is seen of it: time, statistics, probes, advice.

In training mode it is the objective, in ``eval()`` exact cross-entropy. What should be known beside
the number is said once: a state that starts anew, a vocabulary that was resized, training in eval
mode.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sce_lm import objectives
from sce_lm.distributed import vocab_parallel_loss
from sce_lm.hf.head_call import merged_adapters
from sce_lm.objectives import Objective, Statistics
from sce_lm.objectives.compile_operator import register
from sce_lm.objectives.probe import Probe


class ObservedLoss:
    """The objective of one model, and the exact loss of its evaluation."""

    def __init__(self, objective: Objective, vocab_size: int) -> None:
        self.seconds = 0.0
        """Spent in training losses so far, without probes."""
        self.weights_loaded = False
        self.vocab_size = vocab_size
        self.warned: set[str] = set()
        self.merged: tuple[Any, list[str]] = (None, [])
        self.use(objective)

    def use(self, objective: Objective) -> None:
        """Train with ``objective``, and evaluate with exact cross-entropy by its backend."""
        self.objective = objective
        self.evaluation = objectives.get("exact", backend=objective.config.backend)
        self.statistics: Statistics | None = None
        self.probes: dict[bool, Probe] = {}  # of losses in training mode, and in eval()
        self.advised = False

    def __call__(self, training: bool, *inputs: Any, **options: Any) -> torch.Tensor:
        """A loss in one of the two modes, with what is noted about it."""
        if training:
            self.note_new_state()
            self.note_vocabulary(inputs[1])
        objective = self.objective if training else self.evaluation
        if isinstance(inputs[1], DTensor):  # the weight of a tensor-parallel plan's head
            objective = partial(vocab_parallel_loss, config=objective)
        elif training in self.probes and (torch.is_grad_enabled() or not training):
            started = time.perf_counter()
            self.probes[training](self.objective, *inputs, **options)
            if training:  # the time of the loss includes it
                self.seconds -= time.perf_counter() - started
        loss = objective(*inputs, return_stats=not training, **options)
        self.statistics = None
        if isinstance(loss, tuple):
            loss, self.statistics = loss
        if loss.requires_grad and not training:
            loss.register_hook(self.note_gradient_in_eval)
        return loss

    def in_graph(self, training: bool, *args: Any, **options: Any) -> torch.Tensor:
        with self.timed(training):
            return self(training, *args, **options)

    @contextmanager
    def timed(self, training: bool) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if training:
            self.seconds += time.perf_counter() - started

    def figures(self) -> dict[str, float]:
        """Running averages of the state and the probe's latest figures; warns once where they say
        that something should be changed."""
        state, probe = self.objective.state, self.probes.get(True)
        figures = {} if state is None else state.summary()
        advice = self.objective.advice()
        if advice is not None and not self.advised:
            self.advised = True
            warnings.warn(advice, stacklevel=3)
        return figures if probe is None else figures | probe.figures

    def note_vocabulary(self, weight: torch.Tensor) -> None:
        """The state of this model alone follows a resizing of its embeddings; another model's
        state is refused where it is used."""
        before, self.vocab_size = self.vocab_size, len(weight)
        state = self.objective.state
        if before == self.vocab_size or state is None or state.counts is None:
            return
        if state.counts.numel() == before:
            state.resize(self.vocab_size)
            self.warn_once(
                f"the vocabulary of this model went from {before} to {self.vocab_size} classes; "
                "its SCEState keeps the counts of those that stayed, and what else it learned "
                "about them it learns again."
            )

    def note_new_state(self) -> None:
        state = self.objective.state
        if self.weights_loaded and state is not None and state.is_new and torch.is_grad_enabled():
            self.warn_once(
                "weights were loaded into this model but its SCEState starts anew, which is still "
                "unbiased; add SCECallback() to the Trainer, or call "
                "objective_of(model).state.load(path), to go on with a saved state."
            )

    def note_merged(self, head: Any) -> None:
        """What is known of a frozen weight is forgotten when adapters are merged into it."""
        merged = (head, merged_adapters(head))
        if merged != self.merged and self.objective.state is not None:
            self.objective.state.row_sum.forget()
        self.merged = merged

    def note_gradient_in_eval(self, gradient: torch.Tensor) -> None:
        self.warn_once(
            "this model is being trained in eval mode, where the loss is always exact "
            f"cross-entropy; call model.train() to train with {self.objective.name!r}."
        )

    def warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=2)


@torch.compiler.assume_constant_result
def number_of_loss(observed: ObservedLoss, training: bool) -> int:
    """By which the operator of a compiled graph finds it."""
    owner = weakref.proxy(observed)
    return register(lambda: partial(owner.in_graph, training))
