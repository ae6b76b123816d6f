"""The output head, what the scores are made of, and gradients with respect to it.

A head is up to three products, ``x_j = h·W_j + u·B_j + b_j``: its weight, the second factor of a
low-rank adapter (the first one made u of h) and a bias. They are one product of ``[h, u, 1]`` with
rows ``[W | B | b]`` of D = d + r + 1 columns, which come from three tensors. Such rows are put
together where a loss asks for them, never all at once, and their gradient is cut into the same
columns. The scores are ``s_j = post(x_j)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from sce_lm.ops.gradient_memory import gradient_memory, row_sum
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.static_shapes import needs_static_shapes

EVERYTHING = slice(None)
"""Index of all rows."""


class Needs(NamedTuple):
    """Which inputs of a loss need a gradient; false if none does."""

    hidden: bool = False
    head: tuple[bool, ...] = (False, False, False)
    """For weight, low_rank and bias."""

    @classmethod
    def of(cls, ctx, grad_enabled: bool = True) -> Needs:
        """Those of an autograd function whose first inputs are hidden, weight, low_rank, bias."""
        hidden, *head = (grad_enabled and need for need in ctx.needs_input_grad[:4])
        return cls(hidden, tuple(head))

    def __bool__(self) -> bool:
        return self.hidden or any(self.head)


NOTHING = Needs()
"""No gradient at all."""


class Head(NamedTuple):
    """An output head, or the rows of one that a rank holds."""

    weight: torch.Tensor
    """``[V, d]``."""
    low_rank: torch.Tensor | None = None
    """``[V, r]``: further columns in a tensor of their own; None: no columns."""
    bias: torch.Tensor | None = None
    """``[V]``, or None: no column."""
    post: LogitTransform = LogitTransform()
    """The map from raw logits to softmax logits."""
    masked: torch.Tensor | None = None
    """``[M]`` int64 ids, ascending, of the classes that the bias keeps out of the softmax (module
    :mod:`sce_lm.candidates.masks`): what stands for the catalogue leaves them out. None: none."""
    kept: torch.Tensor | slice = EVERYTHING
    """Index of all others, ascending, into anything ``[V, ...]``."""

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Weight, low_rank and bias: what may need a gradient."""
        return self.weight, self.low_rank, self.bias

    @property
    def vocab_size(self) -> int:
        """V, the number of rows."""
        return len(self.weight)

    @property
    def num_classes(self) -> int:
        """V without the masked ones."""
        return len(self.weight) - (0 if self.masked is None else len(self.masked))

    def named(self, places: torch.Tensor) -> torch.Tensor:
        """Ids of the classes at these places among those that are not masked."""
        return self.kept[places] if isinstance(self.kept, torch.Tensor) else places

    def requires_grad(self) -> bool:
        """Whether a loss of it would build a gradient for one of its tensors."""
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in self.tensors
        )

    def rows(self, ids: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
        """``[n, D]`` rows in ``dtype``."""
        # index_select is several times as fast as weight[ids] on a CPU.
        parts = [
            (part[ids] if isinstance(ids, slice) else part.index_select(0, ids)).to(dtype)
            for part in (self.weight, self.low_rank)
            if part is not None
        ]
        if self.bias is not None:
            parts.append(self.bias[ids, None].to(dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def extend(self, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``[N, D]`` of hidden states ``[N, d + r]``, in ``dtype``: a 1 meets the bias."""
        h = hidden.to(dtype)
        return h if self.bias is None else pad(h, (0, 1), value=1.0)

    def row_sum(self, of_weight: torch.Tensor | None = None) -> torch.Tensor:
        """fp64 ``[D]`` sum of the rows that are not masked.

        Args:
            of_weight: ``[d]`` sum of all rows of the weight, masked ones too, where it is known.
        """
        parts = [row_sum(self.weight) if of_weight is None else of_weight]
        if self.low_rank is not None:
            parts.append(row_sum(self.low_rank))
        bias = self.bias
        if self.masked is not None:
            tables = (self.weight, self.low_rank)
            parts = [p - row_sum(t, self.masked) for p, t in zip(parts, tables) if t is not None]
            if bias is not None:  # theirs may be infinite
                bias = bias.detach().index_fill(0, self.masked, 0.0)
        if bias is not None:
            parts.append(bias.detach().sum(dtype=torch.float64).unsqueeze(0))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def num_frozen(self, needs: tuple[bool, ...]) -> int:
        """How many columns lie before those of the first tensor that needs a gradient.

        Args:
            needs: whether weight, low_rank and bias need one.
        """
        return sum(self._widths[: (*needs, True).index(True)])

    def split(self, needs: tuple[bool, ...], columns: torch.Tensor) -> list[torch.Tensor | None]:
        """``[n, D - num_frozen]`` columns as those of weight, low_rank and bias, the last one
        ``[n]``; None for a tensor that needs no gradient."""
        found: list[torch.Tensor | None] = []
        at = -self.num_frozen(needs)
        for width, is_needed in zip(self._widths, needs):
            found.append(columns[:, at : at + width] if is_needed else None)
            at += width
        if found[2] is not None:
            found[2] = found[2].squeeze(1)
        return found

    def gradients(
        self,
        needs: tuple[bool, ...],
        ids: torch.Tensor,
        rows: torch.Tensor,
        everywhere: torch.Tensor | None = None,
        *,
        sparse: bool = False,
    ) -> list[torch.Tensor | None]:
        """Gradients of weight, low_rank and bias; None where it is not needed.

        Args:
            needs: which of them need one.
            ids: ``[U]`` ascending, and distinct; where shapes are static an id may stand several
                times, each time with the same row.
            rows: ``[U, D - num_frozen]`` gradient of the rows at ``ids``.
            everywhere: ``[1, D - num_frozen]`` that of all other rows, the masked ones aside, whose
                gradient is 0; None: 0.
            sparse: give that of the weight as a sparse tensor of ``rows`` alone, coalesced if ids
                are distinct.
        """
        others = [None] * 3 if everywhere is None else self.split(needs, everywhere)
        found: list[torch.Tensor | None] = []
        for part, mine, rest in zip(self.tensors, self.split(needs, rows), others):
            if part is None or mine is None:
                found.append(None)
            elif sparse and part is self.weight:
                is_distinct = not needs_static_shapes(ids.device)
                if not is_distinct:  # entries of a sparse tensor add up
                    is_repeat = pad(ids[1:] == ids[:-1], (1, 0))
                    mine = mine.masked_fill(is_repeat.unsqueeze(1), 0.0)
                found.append(sparse_gradient(part, ids, mine, is_coalesced=is_distinct))
            else:
                found.append(self._dense_gradient(part, ids, mine, rest))
        return found

    def _dense_gradient(
        self,
        like: torch.Tensor,
        ids: torch.Tensor,
        rows: torch.Tensor,
        everywhere: torch.Tensor | None,
    ) -> torch.Tensor:
        """See :meth:`gradients`; cast to the dtype of ``like`` and in its shape."""
        full = gradient_memory(like, like.dtype)
        if everywhere is None:
            full.zero_()
        else:
            full.copy_(everywhere[0])
            if self.masked is not None:
                full.index_fill_(0, self.masked, 0.0)
        return full.index_copy_(0, ids, rows.to(like.dtype))

    @property
    def _widths(self) -> list[int]:
        return [0 if part is None else part[:1].numel() for part in self.tensors]


def sparse_gradient(
    like: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor, *, is_coalesced: bool = True
) -> torch.Tensor:
    """``rows`` at the ascending ``ids``, which are distinct if it is coalesced, as a sparse tensor
    like ``like``."""
    return torch.sparse_coo_tensor(
        ids.unsqueeze(0),
        rows.to(like.dtype),
        like.shape,
        is_coalesced=is_coalesced,
        check_invariants=False,
    )
