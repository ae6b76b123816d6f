r"""The logits of all classes, a tile at a time, and what is read off them.

With ``s = g(h W' + b)`` and ``p = softmax(s)``, the first pass keeps for every position the
running maximum m, ``S = sum_j exp(s_j - m)`` and ``T = sum_j (s_j - m) exp(s_j - m)``, both
rescaled whenever m moves, and takes from each tile the logits at wanted ids, their sum and the best
classes:

    log Z = m + log S        E_p[s] = m + T / S        H = log Z - E_p[s] = log S - T / S

The second pass computes the logits again and turns them into the gradient of any loss of these,

    dL/ds_j = p_j (a + b log p_j) + c + sum_k [ids_k = j] e_k,

which reaches hidden states and head as ``dL/dh = G W, dL/dW = G' h, G = dL/ds · g'``. Each row of
dL/dW is finished within its tile, in the dtype of the computation, and written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.gradient_memory import gradient_memory
from sce_lm.ops.head import EVERYTHING, Head, Needs
from sce_lm.ops.head_loss import OfInputs

TILE_CLASSES = 2048
"""Classes of a tile."""
TILE_POSITIONS = 1024
"""Positions multiplied with a tile at a time (8 MiB of logits in fp32)."""
GATHERED_ELEMENTS = 2**22
"""Elements of gathered rows held at a time (16 MiB in fp32)."""
LOWEST = -1e4
"""Exponents below it are taken as it: exp is 0 there, and ``0 · -inf`` is not."""


class Top(NamedTuple):
    """The largest logits of each position, in descending order; of equal ones the first class
    comes first."""

    values: Tensor
    """``[N, k]``."""
    indices: Tensor
    """``[N, k]`` int64: their classes."""


class Scan(NamedTuple):
    """What the first pass finds; None, or no columns, where it was not asked for."""

    log_partition: Tensor
    """``[N]`` log Z."""
    logits_at: Tensor
    """``[N, K]`` s at the ids, 0 where an id is no class."""
    entropy: Tensor | None
    """``[N]`` H."""
    expected_logit: Tensor | None
    """``[N]`` E_p[s]."""
    logit_sum: Tensor | None
    """``[N]`` sum_j s_j."""
    top: Top
    grad_hidden: Tensor | None
    """``[N, D]`` sum_j p_j g'_j W_j: the gradient of log Z."""


class LogitGradient(NamedTuple):
    """The gradient of a loss with respect to the logits, as the module's equation has it."""

    probability: Tensor | None = None
    """``[N]`` a; None: 0, here and below."""
    log_probability: Tensor | None = None
    """``[N]`` b."""
    constant: Tensor | None = None
    """``[N]`` c."""
    ids: Tensor | None = None
    """``[N, K]`` int64, perhaps repeated; an id that is no class has no gradient."""
    at_ids: Tensor | None = None
    """``[N, K]`` e."""

    def times(self, factor: float) -> LogitGradient:
        """That of the loss times a factor."""
        a, b, c, ids, e = self
        a, b, c, e = (t if t is None else t * factor for t in (a, b, c, e))
        return LogitGradient(a, b, c, ids, e)


class LogitStream:
    """The two passes over tiles of classes.

    Of a head that is cut by rows over several ranks, each makes them over its own rows, with ids of
    -1 where a class's row is elsewhere.
    """

    def __init__(self, head: Head, hidden: Tensor) -> None:
        self.head, self.post, self.vocab_size = head, head.post, head.vocab_size
        self.dtype = compute_dtype(hidden, head.weight)
        self.hidden = head.extend(hidden, self.dtype)
        self.blocks = [
            slice(start, min(start + TILE_POSITIONS, len(hidden)))
            for start in range(0, len(hidden), TILE_POSITIONS)
        ]

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Slice of classes, and their rows."""
        for start in range(0, self.vocab_size, TILE_CLASSES):
            classes = slice(start, min(start + TILE_CLASSES, self.vocab_size))
            yield classes, self.head.rows(classes, self.dtype)

    def logits(self, rows: slice, w: Tensor, buffer: Tensor) -> Tensor:
        """``[n, tile]`` s, in a corner of ``buffer``."""
        h = self.hidden[rows]
        return self.post.apply_(torch.mm(h, w.T, out=buffer[: len(h), : len(w)]))

    def new_buffer(self) -> Tensor:
        height = min(TILE_POSITIONS, len(self.hidden))
        return self.hidden.new_empty(height, min(TILE_CLASSES, self.vocab_size))

    def scan(
        self,
        *,
        ids: Tensor | None = None,
        expectation: bool = False,
        logit_sum: bool = False,
        top_k: int = 0,
        grad_hidden: bool = False,
    ) -> Scan:
        """The first pass.

        Args:
            ids: ``[N, K]`` int64.
            expectation: find entropy and expected logit.
            grad_hidden: find the gradient of log Z; not together with ``expectation``.
        """
        hidden, buffer = self.hidden, self.new_buffer()
        peak = hidden.new_full((len(hidden),), torch.finfo(self.dtype).min)
        total = torch.zeros_like(peak)
        moment, spare = (torch.zeros_like(peak), self.new_buffer()) if expectation else (None, None)
        sums = torch.zeros_like(peak) if logit_sum else None
        at_ids = hidden.new_zeros(len(hidden), 0 if ids is None else ids.shape[1])
        grad = torch.zeros_like(hidden) if grad_hidden else None
        best = [_Best(top_k) for _ in self.blocks] if top_k else []
        for classes, w in self.tiles() if self.blocks else ():
            for block, rows in enumerate(self.blocks):
                s = self.logits(rows, w, buffer)
                largest = s.amax(dim=1)
                if best:
                    best[block].meet(s, largest, classes.start)
                if ids is not None:
                    column, is_here = _columns(ids[rows], classes)
                    at_ids[rows] = torch.where(is_here, s.gather(1, column), at_ids[rows])
                if sums is not None:
                    sums[rows] += s.sum(dim=1)
                # All classes so far may be masked by -inf, from which nothing can be taken off.
                now = torch.maximum(peak[rows], largest)
                shift = (peak[rows] - now).clamp_min_(LOWEST)
                shrink, peak[rows] = shift.exp(), now
                slope = 1.0 if grad is None else self.post.slope(s)
                x = s.sub_(now.unsqueeze(1))
                if moment is None or spare is None:
                    e = x.exp_()
                    tile_total = e.sum(dim=1)
                else:
                    e = torch.exp(x.clamp_min_(LOWEST), out=spare[: len(x), : len(w)])
                    tile_total = e.sum(dim=1)
                    before = moment[rows] + shift * total[rows]
                    moment[rows] = before * shrink + x.mul_(e).sum(dim=1)
                total[rows] = total[rows] * shrink + tile_total
                if grad is not None:
                    e = e.mul_(slope) if torch.is_tensor(slope) else e
                    grad[rows] *= shrink.unsqueeze(1)
                    grad[rows].addmm_(e, w)
        if grad is not None:
            slope = 1.0 if self.post.soft_cap is not None else self.post.slope(total)
            grad.mul_((slope / total).unsqueeze(1))
        log_total = total.log()
        mean = None if moment is None else moment / total
        return Scan(
            peak + log_total,
            at_ids,
            None if mean is None else log_total - mean,
            None if mean is None else peak + mean,
            sums,
            _joined(best, hidden, min(top_k, self.vocab_size)),
            grad,
        )

    def gradients(self, loss: LogitGradient, log_partition: Tensor, needs: Needs) -> OfInputs:
        """The second pass: dL/dh ``[N, D]`` (of these rows alone), and those of weight, low_rank
        and bias.

        Args:
            log_partition: ``[N]`` log Z over all rows there are.
            needs: which of them are wanted.
        """
        hidden, buffer, post = self.hidden, self.new_buffer(), self.post
        grad_hidden = torch.zeros_like(hidden) if needs.hidden else None
        of_head = [
            gradient_memory(part, part.dtype) if need and part is not None else None
            for part, need in zip(self.head.tensors, needs.head)
        ]
        trained = hidden[:, self.head.num_frozen(needs.head) :]
        rows_gradient = hidden.new_zeros(min(TILE_CLASSES, self.vocab_size), trained.shape[1])
        spare = None if loss.log_probability is None else self.new_buffer()
        is_linear = post.soft_cap is None
        loss = loss.times(post.scale) if is_linear else loss
        for classes, w in self.tiles():
            of_rows = rows_gradient[: len(w)]
            for rows in self.blocks:
                s = self.logits(rows, w, buffer)
                slope = 1.0 if is_linear else post.slope(s)
                g = self._logit_gradient(s, loss, rows, log_partition, spare)
                if loss.ids is not None and loss.at_ids is not None:
                    column, is_here = _columns(loss.ids[rows], classes)
                    g.scatter_add_(1, column, loss.at_ids[rows] * is_here)
                if not is_linear:
                    g *= slope
                if grad_hidden is not None:
                    grad_hidden[rows].addmm_(g, w)
                if any(needs.head):
                    keep = 0.0 if rows.start == 0 else 1.0
                    torch.addmm(of_rows, g.T, trained[rows], beta=keep, out=of_rows)
            for grad, mine in zip(of_head, self.head.split(needs.head, of_rows)):
                if grad is not None and mine is not None:
                    grad[classes] = mine
        return grad_hidden, *of_head

    def add_rows(self, out: Tensor, ids: Tensor, s: Tensor, factors: Tensor) -> None:
        """Add ``sum_k factors_tk g'_tk W_{ids_tk}`` to ``out [N, D]``: the gradient at some ids.

        Args:
            ids: ``[N, K]`` int64 in ``[0, V)``.
            s: ``[N, K]`` their logits.
            factors: ``[N, K]`` gradient of the loss with respect to these.
        """
        (_, count), width = ids.shape, out.shape[1]
        factors = factors * self.post.slope(s)
        step = max(1, GATHERED_ELEMENTS // max(count * width, 1))
        for mine, some, by in zip(out.split(step), ids.split(step), factors.split(step)):
            rows = self.head.rows(some.reshape(-1), self.dtype).view(len(some), count, width)
            mine += torch.bmm(by.unsqueeze(1), rows).squeeze(1)

    @staticmethod
    def _logit_gradient(
        s: Tensor, loss: LogitGradient, rows: slice, log_partition: Tensor, spare: Tensor | None
    ) -> Tensor:
        """``[n, tile]`` p (a + b log p) + c, written over s."""
        a, b, c = (None if t is None else t[rows].unsqueeze(1) for t in loss[:3])
        if b is not None and spare is not None:
            log_p = s.sub_(log_partition[rows].unsqueeze(1)).clamp_min_(LOWEST)
            p = torch.exp(log_p, out=spare[: len(s), : s.shape[1]])
            g = log_p.mul_(b).add_(0.0 if a is None else a).mul_(p)
        elif a is not None:
            g = s.sub_(log_partition[rows].unsqueeze(1)).exp_().mul_(a)
        else:
            g = s.zero_()
        return g if c is None else g.add_(c)


def _columns(ids: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """Column of each id in a tile, and whether it lies there (column 0 where it does not)."""
    is_here = (ids >= classes.start) & (ids < classes.stop)
    return (ids - classes.start).masked_fill(~is_here, 0), is_here


class _Best:
    """The k best classes of a block of positions, of those met so far."""

    def __init__(self, k: int) -> None:
        self.k, self.found = k, None

    def meet(self, s: Tensor, largest: Tensor, first_class: int) -> None:
        """Take a tile's logits ``[n, tile]``, whose largest are ``[n]``."""
        if self.found is None:
            self.found = _best_of(s, self.k)
            return
        old, here = self.found, EVERYTHING
        # A class counts only if it is better than all k, and soon few are. On other devices than
        # the CPU a number of rows that depends on data would be a wait.
        if s.device.type == "cpu" and old.values.shape[1] == self.k:
            here = (largest > old.values[:, -1]).nonzero().squeeze(1)
            if len(here) == 0:
                return
        new = _best_of(s[here], self.k)
        values = torch.cat([old.values[here], new.values], dim=1)
        classes = torch.cat([old.indices[here], new.indices + first_class], dim=1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        top = Top(values[:, : self.k], classes.gather(1, order[:, : self.k]))
        if here is EVERYTHING:
            self.found = top
        else:
            old.values[here], old.indices[here] = top


def _best_of(s: Tensor, k: int) -> Top:
    """The k best columns, or all; of equal ones the first comes first."""
    if k == 1:
        return Top(*s.max(dim=1, keepdim=True))
    if k >= s.shape[1] or s.device.type != "cpu":
        return _sorted(s, k)
    values, columns = torch.topk(s, k + 1, dim=1)
    top = Top(values[:, :k], columns[:, :k])
    # topk leaves open which of equal logits come in, and in which order.
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1).nonzero().squeeze(1)
    if len(tied):
        top.values[tied], top.indices[tied] = _sorted(s[tied], k)
    return top


def _sorted(s: Tensor, k: int) -> Top:
    values, columns = s.sort(dim=1, descending=True, stable=True)
    return Top(values[:, :k], columns[:, :k])


def _joined(best: list[_Best], hidden: Tensor, k: int) -> Top:
    """Of all blocks; empty if there is none."""
    found = [b.found for b in best if b.found is not None]
    if not found:
        values = hidden.new_empty(len(hidden), k)
        return Top(values, torch.empty_like(values, dtype=torch.int64))
    return Top(torch.cat([f.values for f in found]), torch.cat([f.indices for f in found]))
