"""Rows of the output head, ``[W | B | b]``, and their gradients.

A head is up to three products, ``x_j = h·W_j + u·B_j + b_j``: its weight, the second factor of a
low-rank adapter (the first one made u of h) and a bias. They are one product of ``[h, u, 1]`` with
rows whose columns come from three tensors. Such rows are put together where a loss asks for them,
never all at once, and their gradient is cut into the same columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from sce_lm.ops.memory import gradient_memory, row_sum, row_sums


class Needs(NamedTuple):
    """Which inputs of a loss need a gradient; false if none does."""

    hidden: bool = False
    head: tuple[bool, ...] = (False, False, False)
    """For weight, low_rank and bias."""

    @classmethod
    def of(cls, ctx, grad_enabled: bool) -> Needs:
        """Those of an autograd function whose first inputs are hidden, weight, low_rank, bias."""
        hidden, *head = (grad_enabled and need for need in ctx.needs_input_grad[:4])
        return cls(hidden, tuple(head))

    def __bool__(self) -> bool:
        return self.hidden or any(self.head)


class HeadColumns(NamedTuple):
    """The tensors whose columns make the rows of an output head, D = d + r + 1 of them."""

    weight: torch.Tensor
    """``[V, d]``."""
    low_rank: torch.Tensor | None = None
    """``[V, r]``, or None: no columns."""
    bias: torch.Tensor | None = None
    """``[V]``, or None: no column."""

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

    def row_sum(
        self, of_weight: torch.Tensor | None = None, *, left_out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """fp64 ``[D]`` sum of the rows.

        Args:
            of_weight: ``[d]`` sum of all rows of the weight, where it is known.
            left_out: ``[M]`` distinct int64 ids of rows that are not in the sum; their bias may be
                infinite. None: no row.
        """
        parts = [row_sum(self.weight) if of_weight is None else of_weight]
        if self.low_rank is not None:
            parts.append(row_sum(self.low_rank))
        if left_out is not None:
            tables = (self.weight, self.low_rank)
            parts = [p - row_sum(t, left_out) for p, t in zip(parts, tables) if t is not None]
        if self.bias is not None:
            bias = self._bias_without(left_out)
            parts.append(bias.sum(dtype=torch.float64).unsqueeze(0))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def row_sums(
        self, stratum_of: torch.Tensor, num_strata: int, *, left_out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """fp64 ``[num_strata, D]`` sum of each stratum's rows; ``stratum_of`` is ``[V]`` int64,
        ``left_out`` as for :meth:`row_sum`."""
        counted = num_strata
        if left_out is not None:  # they are a stratum of their own
            stratum_of, counted = stratum_of.index_fill(0, left_out, num_strata), num_strata + 1
        bias = None if self.bias is None else self._bias_without(left_out)[:, None]
        parts = [
            row_sums(part, stratum_of, counted)[:num_strata]
            for part in (self.weight, self.low_rank, bias)
            if part is not None
        ]
        return torch.cat(parts, dim=1)

    def _bias_without(self, left_out: torch.Tensor | None) -> torch.Tensor:
        """``[V]`` bias, 0 where a row is left out."""
        assert self.bias is not None
        bias = self.bias.detach()
        return bias if left_out is None else bias.index_fill(0, left_out, 0.0)

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
        stratum_of: torch.Tensor | None = None,
        left_out: torch.Tensor | None = None,
    ) -> list[torch.Tensor | None]:
        """Gradients of weight, low_rank and bias; None where it is not needed.

        Args:
            needs: which of them need one.
            ids: ``[U]`` distinct, ascending.
            rows: ``[U, D - num_frozen]`` gradient of the rows at ``ids``.
            everywhere: ``[S, D - num_frozen]`` that of all other rows, by stratum; None: 0.
            stratum_of: ``[V]`` int64; None: one stratum.
            left_out: ``[M]`` int64 ids of rows that ``everywhere`` does not reach; None: no row.
            sparse: give that of the weight as a coalesced sparse tensor of ``rows`` alone.
        """
        others = [None] * 3 if everywhere is None else self.split(needs, everywhere)
        found: list[torch.Tensor | None] = []
        for part, mine, rest in zip(self, self.split(needs, rows), others):
            if part is None or mine is None:
                found.append(None)
            elif sparse and part is self.weight:
                found.append(sparse_gradient(part, ids, mine))
            else:
                found.append(dense_gradient(part, ids, mine, rest, stratum_of, left_out))
        return found

    @property
    def _widths(self) -> list[int]:
        return [0 if part is None else part[:1].numel() for part in self]


def dense_gradient(
    like: torch.Tensor,
    ids: torch.Tensor,
    rows: torch.Tensor,
    everywhere: torch.Tensor | None = None,
    stratum_of: torch.Tensor | None = None,
    left_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``rows`` at ``ids`` and at all others ``everywhere`` (None: 0), whose first dimension is 1 or
    what ``stratum_of [V]`` counts, but 0 at ``left_out``; cast to the dtype of ``like`` and in its
    shape."""
    full = gradient_memory(like, like.dtype)
    if everywhere is None:
        full.zero_()
    elif stratum_of is None:
        full.copy_(everywhere[0])
    else:
        torch.index_select(everywhere.to(like.dtype), 0, stratum_of, out=full)
    if left_out is not None and everywhere is not None:
        full.index_fill_(0, left_out, 0.0)
    return full.index_copy_(0, ids, rows.to(like.dtype))


def sparse_gradient(like: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows`` at the distinct ascending ``ids`` as a coalesced sparse tensor like ``like``."""
    return torch.sparse_coo_tensor(
        ids.unsqueeze(0),
        rows.to(like.dtype),
        like.shape,
        is_coalesced=True,
        check_invariants=False,
    )
