"""Rows of lazy logits that are reduced by one stream over the vocabulary, and what it found.

Records that differ only in what was done to each logit share their rows, and so do the pieces of a
split: the rows of ``for row in logits`` are reduced all together when the first of them is asked.
A slice is reduced by itself, unless the rows that it was cut from were reduced before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch

from sce_lm.hf.recorded_logits import Place


class Wanted(NamedTuple):
    """What is wanted beside log Z."""

    entropy: bool = False
    logit_sum: bool = False
    top_k: int = 0

    def and_of(self, other: Wanted) -> Wanted:
        """What serves both."""
        return Wanted(
            self.entropy or other.entropy,
            self.logit_sum or other.logit_sum,
            max(self.top_k, other.top_k),
        )


class Found(NamedTuple):
    """What a stream found, ``[..., 1]`` or ``[..., k]`` each; None where it was not asked for."""

    log_partition: torch.Tensor
    entropy: torch.Tensor | None
    logit_sum: torch.Tensor | None
    top_values: torch.Tensor | None
    top_indices: torch.Tensor | None

    @property
    def wanted(self) -> Wanted:
        """What this serves."""
        top_k = 0 if self.top_indices is None else self.top_indices.shape[-1]
        return Wanted(self.entropy is not None, self.logit_sum is not None, top_k)

    def at(self, place: Place) -> Found:
        """The same of some of the rows."""
        others = (None if part is None else place(part) for part in self[1:])
        return Found(place(self.log_partition), *others)


class Rows:
    """``[..., d]`` hidden states of rows, and what was found of their logits so far."""

    def __init__(
        self, hidden: torch.Tensor, whole: tuple[Rows, Place] | None = None, together: bool = False
    ) -> None:
        self.hidden = hidden
        self.whole = whole
        """The rows that these lie among, and where."""
        self.together = together
        """Whether they are reduced with those."""
        self.found: dict[Hashable, tuple[Found, Any]] = {}
        """By logits; with what keeps the keys unique."""
        self._factors: dict[bool, torch.Tensor] = {}

    @property
    def reduced(self) -> Rows:
        """The rows that one stream reduces."""
        return self.whole[0].reduced if self.whole is not None and self.together else self

    def factors(self, with_grad: bool, seen: torch.Tensor | None = None) -> Any:
        """``[..., d + r]`` hidden states as a head's low-rank operand takes them: those of the
        first call. Under dropout each call of the head has others; now it has ``seen``."""
        factors = self._factors.get(with_grad)
        if factors is None and self.whole is not None:
            rows, place = self.whole
            of_whole = rows.factors(with_grad)
            factors = None if of_whole is None else place(of_whole)
        if factors is None and seen is not None:
            factors = self._factors[with_grad] = seen
        return factors

    def known(self, key: Hashable, wanted: Wanted) -> Found | None:
        """What was found already of these rows, or of rows that they lie among."""
        found = self.found.get(key, (None,))[0]
        if found is not None and found.wanted.and_of(wanted) == found.wanted:
            return found
        if self.whole is None:
            return None
        rows, place = self.whole
        found = rows.known(key, wanted)
        return None if found is None else found.at(place)

    def reduce(
        self, key: Hashable, wanted: Wanted, stream: Callable[[Rows, Wanted], Found], keep: Any
    ) -> Found:
        """What is wanted of these rows, by ``stream`` if it is not known.

        Args:
            key: of the logits, unique as long as ``keep`` is kept.
            wanted: at least this.
            stream: reduces rows.
            keep: see ``key``.
        """
        found = self.known(key, wanted)
        if found is None and self.whole is not None and self.together:
            rows, place = self.whole
            return rows.reduce(key, wanted, stream, keep).at(place)
        if found is None:
            before = self.found.get(key, (None,))[0]
            found = stream(self, wanted if before is None else wanted.and_of(before.wanted))
            self.found[key] = found, keep
        return found
