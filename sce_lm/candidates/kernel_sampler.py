"""Kernel-based sampling (Blanc & Rendle, ICML 2018): draws whose odds follow the logits.

    q_j = (alpha·x_j² + 1) / sum_k (alpha·x_k² + 1),        x_j = h·w_j

A quadratic kernel sums over a set of classes through its Gram matrix, ``sum_k x_k² = h'Gh`` with
``G = sum_k w_k w_k'``. The paper has a binary tree of them; here there are two levels, which is
exact all the same:

    blocks of b rows with G_i each;  mass of block i = alpha·h'G_i h + b, all blocks in one product
    a block in proportion to its mass, then a row of it in proportion to alpha·x_j² + 1

A position pays ``(V/b)·d²/2`` for the masses and ``m·b·d`` for the rows of its m blocks, so that
``b = sqrt(d·V / 2m)``; the Gram matrices, ``V·d²`` for all positions together, are made anew from
the parameters at every call, so that the proposal follows them whatever changed them. A quartic
kernel has no such sum at a bearable size; its masses come from a scan of the catalogue, a third of
what the exact loss costs.

Memory: ``(V/b)·r²/2`` numbers for the matrices, beside the rows.

Rounding may take a mass below what its rows alone guarantee, or below 0: it is then raised to b.
log q is that of the masses in use and of the rows as they are, so it stays exact.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from sce_lm.candidates.proposals import Categorical
from sce_lm.ops.static_shapes import needs_static_shapes, tiles_of_groups

BLOCK_ELEMENTS = 2**22
"""Elements of the largest intermediate tensor (16 MiB in fp32)."""


class KernelSampler:
    """Draws for each position from its own kernel distribution over the rows of a matrix.

    Args:
        rows: ``[V, r]`` fp32 or fp64.
        draws: how many draws a position will ask for; the block size is chosen for it.
        alpha: weight of the logit's power against the 1; a number, or 0-dim on the device.
        power: 2 or 4.
        block_size: b; None: from the cost model.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        draws: int,
        alpha: float | torch.Tensor,
        *,
        power: int = 2,
        block_size: int | None = None,
    ) -> None:
        vocab_size, width = rows.shape
        auto = math.ceil(math.sqrt(width * vocab_size / (2 * draws)))
        self.rows, self.alpha, self.power = rows, alpha, power
        self.block_size = min(vocab_size, auto if block_size is None else block_size)
        self.num_blocks = -(-vocab_size // self.block_size)
        self.sizes = rows.new_full((self.num_blocks,), self.block_size)
        self.sizes[-1] = vocab_size - (self.num_blocks - 1) * self.block_size
        self.grams = self._grams() if power == 2 else None

    def draw(
        self,
        queries: torch.Tensor,
        size: int,
        generator: torch.Generator,
        shift: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Independent draws for each query.

        Args:
            queries: ``[N, r]``.
            size: draws of a query.
            generator: on the device of the queries.
            shift: ``[N]`` taken off a query's inner products first; None: 0.

        Returns:
            Ids and fp64 log q, each ``[N, size]``.
        """
        num_queries, width = queries.shape
        shift = queries.new_zeros(num_queries) if shift is None else shift
        u = torch.rand(
            2, num_queries, size, generator=generator, dtype=torch.float64, device=queries.device
        )
        block = torch.empty(num_queries, size, dtype=torch.int64, device=queries.device)
        log_q = torch.empty_like(u[0])
        step = max(1, BLOCK_ELEMENTS // max(self.num_blocks, width**2))
        for start in range(0, num_queries, step):
            part = slice(start, start + step)
            masses = self._masses(queries[part], shift[part])
            block[part], log_q[part] = _invert(
                masses.cumsum(dim=1, dtype=torch.float64), u[0, part]
            )
        ids, log_q_inside = self._draw_inside(queries, shift, block, u[1])
        return ids, log_q + log_q_inside

    def operations(self, num_queries: int, draws: int) -> float:
        """Multiply-adds a query: its masses, the rows of its blocks, its share of the matrices."""
        vocab_size, width = self.rows.shape
        inside = float(draws * self.block_size * width)
        if self.grams is None:
            return inside + vocab_size * width
        return inside + self.grams.numel() + vocab_size * width**2 / num_queries

    def _masses(self, queries: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """``[n, V/b]`` sums of the kernel over each block."""
        if self.grams is not None:
            c = shift.unsqueeze(1)
            pairs = _upper(queries.unsqueeze(2) * queries.unsqueeze(1))
            features = torch.cat([pairs, -c * queries, c.square()], dim=1)
            alpha = self.alpha
            if torch.is_tensor(alpha):
                features, alpha = features * alpha, 1.0
            masses = torch.addmm(self.sizes, features, self.grams.T, alpha=alpha)
        else:
            blocks = max(1, BLOCK_ELEMENTS // (len(queries) * self.block_size))
            pieces = [
                self._kernel(queries, shift, rows).unflatten(1, (-1, self.block_size)).sum(dim=2)
                for rows in self._whole_blocks().split(blocks * self.block_size)
            ]
            rest = self._kernel(queries, shift, self._last_rows()).sum(dim=1, keepdim=True)
            masses = torch.cat([*pieces, rest], dim=1)[:, : self.num_blocks]
        return torch.maximum(masses, self.sizes)

    def _draw_inside(self, queries, shift, block, u):
        """A row of each drawn block, block by block: ids ``[N, m]`` and log q inside it."""
        if needs_static_shapes(block.device):
            return self._draw_inside_tiles(queries, shift, block, u)
        flat, u = block.reshape(-1), u.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.bincount(flat, minlength=self.num_blocks).cumsum(0).tolist()
        ids, log_q = torch.empty_like(flat), torch.empty_like(u)
        most = max(1, BLOCK_ELEMENTS // self.block_size)
        for i, (low, high) in enumerate(pairwise([0, *ends])):
            first = i * self.block_size
            rows = self.rows[first : first + self.block_size]
            for start in range(low, high, most):  # a block that most positions drew is cut
                drawn = order[start : min(start + most, high)]
                at = drawn // block.shape[1]
                cumulative = self._kernel(queries[at], shift[at], rows).cumsum(
                    dim=1, dtype=torch.float64
                )
                row, log_inside = _invert(cumulative, u[drawn, None])
                ids[drawn], log_q[drawn] = first + row.squeeze(1), log_inside.squeeze(1)
        return ids.view_as(block), log_q.view_as(block)

    def _draw_inside_tiles(self, queries, shift, block, u):
        """The same where no shape may depend on draws: tiles of them, each in one block, as many as
        hold any draws, with empty places."""
        flat, total = block.reshape(-1), block.numel()
        size = -(-total // self.num_blocks)
        own, drawn, is_there = tiles_of_groups(flat, self.num_blocks, size)
        target = drawn.masked_fill(~is_there, total)  # where empty places go
        at, u = drawn // block.shape[1], u.reshape(-1)[drawn]
        row_of = own.unsqueeze(1) * self.block_size
        row_of = row_of + torch.arange(self.block_size, device=block.device)
        ids, log_q = flat.new_empty(total + 1), u.new_empty(total + 1)
        step = max(1, BLOCK_ELEMENTS // (self.block_size * max(size, queries.shape[1])))
        for part in zip(*(x.split(step) for x in (at, target, u, row_of))):
            some, to, u_of, rows = part
            inside = self.rows[rows.clamp_max(len(self.rows) - 1)]
            kernel = self._kernel(queries[some], shift[some], inside)
            kernel.masked_fill_((rows >= len(self.rows)).unsqueeze(1), 0.0)
            cumulative = kernel.cumsum(dim=2, dtype=torch.float64).flatten(0, 1)
            row, log_inside = _invert(cumulative, u_of.reshape(-1, 1))
            to = to.reshape(-1)
            ids[to] = (row.view_as(some) + rows[:, :1]).reshape(-1)
            log_q[to] = log_inside.squeeze(1)
        return ids[:-1].view_as(block), log_q[:-1].view_as(block)

    def _kernel(self, queries, shift, rows) -> torch.Tensor:
        """``[..., n, k]`` alpha·(h·w - shift)^power + 1."""
        product = torch.addmm if rows.dim() == 2 else torch.baddbmm
        x = product(-shift.unsqueeze(-1), queries, rows.mT).square_()
        if self.power == 4:
            x = x.square_()
        return x.mul_(self.alpha).add_(1.0)

    def _whole_blocks(self) -> torch.Tensor:
        return self.rows[: len(self.rows) // self.block_size * self.block_size]

    def _last_rows(self) -> torch.Tensor:
        """The rows of the block that is not full; none if all are."""
        return self.rows[len(self.rows) // self.block_size * self.block_size :]

    def _grams(self) -> torch.Tensor:
        """``[V/b, r(r+1)/2 + r + 1]`` what a block's sum of ``(h·w - c)²`` is linear in: the upper
        triangle of its Gram matrix with what lies off the diagonal doubled, twice its row sum, and
        its size."""
        width = self.rows.shape[1]
        whole = self._whole_blocks().reshape(-1, self.block_size, width)
        parts = [*whole.split(max(1, BLOCK_ELEMENTS // width**2))]
        if len(self._last_rows()):
            parts.append(self._last_rows().unsqueeze(0))
        squares = [_upper(torch.bmm(part.mT, part), off_diagonal=2.0) for part in parts]
        sums = [2.0 * part.sum(dim=1) for part in parts]
        return torch.cat([torch.cat(squares), torch.cat(sums), self.sizes.unsqueeze(1)], dim=1)


def mean_kernel_proposal(
    rows: torch.Tensor,
    queries: torch.Tensor,
    alpha: float | torch.Tensor,
    shift: torch.Tensor | None = None,
    is_valid: torch.Tensor | None = None,
) -> Categorical:
    """The mean over positions of their quadratic kernel distributions, one proposal for all.

        q_j = sum_t r_t (alpha·(h_t·w_j - c_t)² + 1)
            = alpha·(w_j'M w_j - 2 v·w_j + k) + sum_t r_t
        M = sum_t r_t h_t h_t',  v = sum_t r_t c_t h_t,  k = sum_t r_t c_t²
        1 / r_t = N·(alpha·(h_t'G h_t - 2 c_t h_t·sum_j w_j + V c_t²) + V),   G = sum_j w_j w_j'

    Args:
        rows: ``[V, r]``.
        queries: ``[N, r]``.
        alpha: weight of the square against the 1.
        shift: ``[N]`` c, taken off a query's inner products first; None: 0.
        is_valid: ``[N]`` bool: which positions count, or all if none does; None: all.
    """
    c = queries.new_zeros(len(queries)) if shift is None else shift
    total = (queries @ (rows.T @ rows) * queries).sum(dim=1)
    total += len(rows) * c.square() - 2.0 * c * (queries @ rows.sum(dim=0))
    r = 1.0 / (len(queries) * (alpha * total.clamp_min(0.0) + len(rows)))
    if is_valid is not None:
        r = torch.where(is_valid | ~is_valid.any(), r, 0.0)
    weighted = queries * r.unsqueeze(1)
    mixed, linear = queries.T @ weighted, weighted.T @ c
    square = torch.cat(
        [
            torch.linalg.vecdot(part @ mixed - 2.0 * linear, part)
            for part in rows.split(max(1, BLOCK_ELEMENTS // rows.shape[1]))
        ]
    )
    square = (square + (r * c.square()).sum()).clamp_min(0.0)
    return Categorical(torch.log(alpha * square + r.sum()))


def fit_projection(
    hidden: torch.Tensor, rows: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps to ``width`` dimensions in which inner products stay nearest, on average over hidden
    states and rows: the principal directions of the rows in the metric of the hidden states.

    With ``E[hh'] = LL'`` and U the leading eigenvectors of ``L'E[ww']L``, ``h -> U'L^-1 h`` and
    ``w -> U'L'w``.

    Args:
        hidden: ``[N, d]``.
        rows: ``[R, d]`` a sample of the weight's rows.

    Returns:
        ``[d, width]`` for the hidden states and ``[d, width]`` for the rows, in the dtype of
        ``hidden``.
    """
    h, w = hidden.double(), rows.double()
    second = h.T @ h / len(h)
    # Directions that the hidden states do not take would have no inverse.
    floor = 1e-4 * second.diagonal().mean().clamp_min(1e-30)
    root = torch.linalg.cholesky(second + floor * torch.eye(len(second), device=h.device))
    leading = torch.linalg.eigh(root.T @ (w.T @ w) @ root).eigenvectors[:, -width:]
    of_hidden = torch.linalg.solve_triangular(root.T, leading, upper=True)
    return of_hidden.to(hidden.dtype), (root @ leading).to(hidden.dtype)


def _invert(cumulative: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of each row's cumulative sum ``[n, K]`` at the quantiles u ``[n, m]``: the columns,
    and the log-probability of each."""
    total = cumulative[:, -1:]
    column = torch.searchsorted(cumulative, u * total, right=True)
    column.clamp_max_(cumulative.shape[1] - 1)
    before = cumulative.gather(1, (column - 1).clamp_min(0)).masked_fill(column == 0, 0.0)
    return column, torch.log((cumulative.gather(1, column) - before) / total)


def _upper(square: torch.Tensor, off_diagonal: float = 1.0) -> torch.Tensor:
    """``[n, r, r]`` to the upper triangles, ``[n, r(r+1)/2]``."""
    i, j = torch.triu_indices(square.shape[1], square.shape[2], device=square.device)
    return square[:, i, j] * torch.where(i == j, 1.0, off_diagonal).to(square.dtype)
