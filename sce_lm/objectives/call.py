"""One call of an objective: its seed and streams of random numbers, and what its state knows of it.

It is made once, before anything is chosen, and passed whole. A call under gradient checkpointing
runs twice; the second run has the seed of the first, sees the counts that it saw, is not counted,
and gets from :meth:`Call.once` what it read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from sce_lm.candidates.noise import draw_seed, stream
from sce_lm.candidates.state import SCEState
from sce_lm.ops.dispatch import Backend

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """What belongs to one call, beside the head and the positions."""

    backend: Backend = "auto"
    want_statistics: bool = False
    state: SCEState | None = None
    """None for an objective that draws nothing; there is no seed and no count then."""
    seed: int = 0
    labels: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """``[n]`` int64 labels among the head's rows: all of them, or those of a rank."""
    is_valid: torch.Tensor | None = None
    """``[n]`` bool, if some positions have no label: which of these are labels."""
    counts: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """``[V]`` int64 label counts, this call's labels among them."""
    prefer_control_variate: bool = True
    """What past draws say for ``control_variate="auto"``."""
    counted: bool = False
    """Whether the state counts the call: False for a replay, and without gradients."""

    def begin(
        self,
        state: SCEState,
        labels: torch.Tensor,
        vocab_size: int,
        generator: torch.Generator | None = None,
        is_valid: torch.Tensor | None = None,
    ) -> Call:
        """The same call with its seed drawn and the state told of the labels.

        Args:
            labels: ``[n]`` int64 in ``[0, vocab_size)``.
            generator: CPU generator of the seed; None: torch's own.
            is_valid: ``[n]`` bool: which of them are labels; None: all.

        Raises:
            ValueError: the state belongs to another vocabulary.
        """
        seed = draw_seed(generator)
        counts, prefer, counted = state.begin_call(labels, vocab_size, seed, is_valid)
        begun = (state, seed, labels, is_valid, counts, prefer, counted)
        return Call(self.backend, self.want_statistics, *begun)

    def stream(self, name: str) -> torch.Generator:
        """Random numbers for the use ``name``, on the device of the counts."""
        return stream(self.seed, name, self.counts.device)

    def once(self, name: str, read: Callable[[], T]) -> T:
        """What ``read()`` gave in the first run of this call; see :meth:`SCEState.once`."""
        assert self.state is not None
        return self.state.once(self.seed, name, read)
