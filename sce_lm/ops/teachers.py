r"""What a teacher says of some classes, for a pass that meets them tile by tile.

A teacher gives terms x whose log-sum-exp B over all classes normalises them, and from ``x - B`` its
log-probabilities:

    a head                  x = its logits
    top k, rest uniform     x = the stored log-probabilities, log(rest / (V - k)) elsewhere
    top k, rest dropped     x = the same, nothing elsewhere: the k kept ones are normalised anew
    top k, one ghost class  x = the student's logits outside the k

The ghost class is everything outside the k: the teacher gives it ``rest = 1 - sum of the k``, the
student what its softmax has there. A divergence over k + 1 classes is the one over V classes of a
teacher that spreads ``rest`` as the student does, in value and, that teacher being a constant, in
gradient, because ``p / q`` is the same for all of them: hence ``log q_j = x_j - B + log rest``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from sce_lm.ops.candidates import find
from sce_lm.ops.divergence import FLOOR
from sce_lm.ops.head import Head

Rest = Literal["ghost", "uniform", "drop"]

Columns = slice | torch.Tensor
"""Which classes the columns of a block of logits are: these; or this ascending list and others
behind it."""

TILE_CLASSES = 2048
"""Classes multiplied at a time."""


def class_tiles(classes: slice) -> list[slice]:
    """Slices of at most ``TILE_CLASSES`` that make up a slice."""
    edges = range(classes.start, classes.stop, TILE_CLASSES)
    return [slice(start, min(start + TILE_CLASSES, classes.stop)) for start in edges]


def logits_of(head: Head, hidden: torch.Tensor, classes: slice, out: torch.Tensor) -> torch.Tensor:
    """The logits of some classes, ``[n, k]`` in a corner of ``out``.

    Args:
        hidden: ``[n, D]``, as :meth:`Head.extend` gives them.
    """
    s = out[: len(hidden), : classes.stop - classes.start]
    for tile in class_tiles(classes):
        at = slice(tile.start - classes.start, tile.stop - classes.start)
        torch.mm(hidden, head.rows(tile, hidden.dtype).T, out=s[:, at])
    return head.post.apply_(s)


class Teacher(ABC):
    """The teacher's side of a divergence, without gradient."""

    @abstractmethod
    def terms(
        self, at: slice | torch.Tensor, columns: Columns, s: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """``[n, k]`` x, in a corner of ``out``.

        Args:
            at: which positions.
            columns: which classes.
            s: ``[n, k]`` the student's logits of them.
            out: ``[>= n, > k]``.
        """

    def log_probs(
        self, at: slice | torch.Tensor, columns: Columns, x: torch.Tensor
    ) -> torch.Tensor:
        """``[n, k]`` log-probabilities from ``x - B``, which may be overwritten."""
        return x


class HeadTeacher(Teacher):
    """A linear head and the hidden states that enter it."""

    def __init__(self, head: Head, hidden: torch.Tensor) -> None:
        self.head, self.hidden = head, hidden

    def terms(
        self, at: slice | torch.Tensor, columns: Columns, s: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        assert isinstance(columns, slice)
        hidden = self.head.extend(self.hidden[at], s.dtype)
        return logits_of(self.head, hidden, columns, out)


@dataclass(frozen=True)
class TopKTeacher(Teacher):
    """The k best classes of each position with their log-probabilities."""

    ids: torch.Tensor
    """``[N, k]`` int64, distinct in each row."""
    given: torch.Tensor
    """``[N, k]`` their log-probabilities, in the dtype of the computation."""
    rest: Rest
    vocab_size: int

    def log_rest(self, at: slice | torch.Tensor) -> torch.Tensor:
        """``[n, 1]`` log of the mass outside the k: at least one rounding unit, as sums of rounded
        probabilities do not tell less from nothing."""
        given = self.given[at]
        rest = 1.0 - given.exp().sum(dim=1, keepdim=True)
        return rest.clamp_min(torch.finfo(given.dtype).eps).log()

    def terms(
        self, at: slice | torch.Tensor, columns: Columns, s: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        x = out[: len(s), : s.shape[1] + 1]  # one more for those that are in no column
        if self.rest == "ghost":
            x[:, :-1] = s
            return self._put(at, columns, x, None)
        others = max(self.vocab_size - self.ids.shape[1], 1)
        if self.rest == "uniform":
            x[:] = self.log_rest(at) - torch.tensor(float(others), dtype=s.dtype).log()
        else:
            x.fill_(FLOOR)
        return self._put(at, columns, x, self.given[at])

    def log_probs(
        self, at: slice | torch.Tensor, columns: Columns, x: torch.Tensor
    ) -> torch.Tensor:
        if self.rest != "ghost":
            return x
        spare = torch.nn.functional.pad(x + self.log_rest(at), (0, 1))
        return self._put(at, columns, spare, self.given[at])

    def _put(
        self,
        at: slice | torch.Tensor,
        columns: Columns,
        x: torch.Tensor,
        values: torch.Tensor | None,
    ) -> torch.Tensor:
        """``x`` without its last column, with values (None: probability 0) at the k."""
        ids = self.ids[at]
        if isinstance(columns, slice):
            is_here = (ids >= columns.start) & (ids < columns.stop)
            place = ids - columns.start
        else:
            place, is_here = find(ids, columns)
        place = place.masked_fill(~is_here, x.shape[1] - 1)
        if values is None:
            x.scatter_(1, place, FLOOR)
        else:
            x.scatter_(1, place, values)
        return x[:, :-1]
