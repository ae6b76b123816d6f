"""A lazy record that is asked something: what is found of it inside the head's own call.

What is found is kept with the rows (:mod:`sce_lm.hf.reduced_rows`). Everything is computed in fp32
or, for fp64, in fp64, whatever the dtype of the record, and :meth:`AskedLogits.give` casts it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from sce_lm.hf.head_call import call_inside
from sce_lm.hf.logit_operations import is_lazy
from sce_lm.hf.reduced_rows import Found, Rows, Wanted
from sce_lm.ops.head import Head
from sce_lm.ops.logits_at import logits_at
from sce_lm.ops.row_reductions import row_reductions

FORMED_ELEMENTS = 2**21
"""Of a head without hooks and adapters, this many logits (8 MiB in fp32) are formed rather than
streamed: it is faster, and gives the very bits."""


class Unanswered(Exception):
    """The logits are needed."""


class AskedLogits:
    """A record of one of the ``forms``, or :class:`Unanswered`."""

    def __init__(self, x: Any, *forms: str | None) -> None:
        if not is_lazy(x) or x.has_hooks or x._hidden.numel() == 0:
            raise Unanswered
        read = x.reading
        if read is None or read.form not in forms:
            raise Unanswered
        if x._source.label_terms is None and x.is_small(FORMED_ELEMENTS):
            raise Unanswered
        self.x, self.read = x, read
        self.with_grad = torch.is_grad_enabled() and x.requires_grad

    def check_dim(self, dim: Any) -> None:
        """Only the classes are reduced."""
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        if not isinstance(dim, int) or dim not in (-1, self.x.dim() - 1):
            raise Unanswered

    def check_bare(self, *, factor: bool = True) -> None:
        """Not multiplied by other logits, nor, if ``factor``, by a number."""
        if self.read.times is not None or (factor and self.read.factor != 1.0):
            raise Unanswered

    def found(self, *, entropy: bool = False, logit_sum: bool = False, top_k: int = 0) -> Found:
        """Of each row, ``[..., 1]`` or ``[..., k]``."""
        wanted, rows = Wanted(entropy, logit_sum, top_k), self.x._rows
        known = None if self.with_grad else rows.known(self._key(True), wanted)
        if known is not None:
            return known

        def stream(rows: Rows, wanted: Wanted) -> Found:
            return self._stream(rows, wanted)[0]

        return rows.reduce(self._key(), wanted, stream, self.x._steps)

    def at(self, ids: torch.Tensor, *, logit_sum: bool = False) -> torch.Tensor:
        """``[..., K]`` logits at these ids: from the stream that finds log Z (and the logits' sum),
        or from their rows of the weight alone."""
        rows, wanted = self.x._rows, Wanted(logit_sum=logit_sum)
        ids = self._checked(ids)
        is_known = rows.known(self._key(), wanted) is not None
        if is_known or not self.with_grad or rows.reduced is not rows:
            if self.read.form is not None:
                self.found()  # first, so that under dropout both see the same draw
            return self._direct(ids, slice(None))
        found, logits = self._stream(rows, wanted, ids)
        rows.found[self._key()] = found, self.x._steps
        assert logits is not None
        return logits

    def ask_objective(self, labels: torch.Tensor) -> None:
        """Find log Z of rows with these labels, ``[..., 1]``, by the objective that the model
        trains with, and the sum of their logits, which label smoothing asks for next."""
        label_terms, rows = self.x._source.label_terms, self.x._rows
        if label_terms is None or not self.with_grad or self.read.form != "log_softmax":
            return
        labels = self._checked(labels).reshape(-1)

        def compute(hidden: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
            losses, mean = label_terms(hidden, head, labels)
            logits = logits_at(head, hidden, labels.unsqueeze(1), sparse_grad=True).squeeze(1)
            return losses + logits, mean * self.x.shape[-1]

        shape = rows.hidden.shape[:-1]
        log_partition, total = (part.view(*shape, 1) for part in self._inside(rows, compute))
        found = Found(log_partition, None, total, None, None)
        rows.found[self._key()] = found, self.x._steps

    def values(self, logits: torch.Tensor, log_partition: torch.Tensor | None = None) -> Any:
        """Of logits, what the record makes of them; ``log_partition`` is that of their rows."""
        if self.read.form is not None:
            logits = logits - (self.found()[0] if log_partition is None else log_partition)
        if self.read.form == "softmax":
            logits = logits.exp()
        return logits if self.read.factor == 1.0 else logits * self.read.factor

    def values_at(self, places: tuple[torch.Tensor, ...], ids: torch.Tensor) -> torch.Tensor:
        """What the record has for one id at each of these places of rows."""
        places, ids = tuple(place.to(self.x._hidden.device) for place in places), self._checked(ids)
        of_rows = None if self.read.form is None else self.found().log_partition[places]
        return self.values(self._direct(ids.unsqueeze(-1), places), of_rows).squeeze(-1)

    def give(self, result: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of its own, where and in the dtype in which the real one would be."""
        result = result.to(device=self.x.device, dtype=dtype, copy=True)
        if result.requires_grad:
            for hook in self.x.backward_hooks():
                result.register_hook(hook)
        return result

    def _checked(self, ids: torch.Tensor) -> torch.Tensor:
        ids, vocab_size = ids.to(self.x._hidden.device), self.x.shape[-1]
        is_class = ((ids >= 0) & (ids < vocab_size)).all()
        if ids.device.type != "cpu":
            message = f"ids of classes do not lie in [0, {vocab_size})"
            torch._assert_async(is_class, message)  # pyright: ignore[reportPrivateImportUsage]
        elif not is_class:
            raise Unanswered  # torch says what is wrong
        return ids

    def _direct(self, ids: torch.Tensor, places: Any) -> torch.Tensor:
        # Beside that of log Z the gradient of a few rows of the weight may be sparse.
        sparse = self.with_grad and self.read.form is not None
        shape = self.x._hidden.shape[:-1]

        def compute(hidden: torch.Tensor, head: Head) -> torch.Tensor:
            hidden = hidden.view(*shape, -1)[places]
            hidden = hidden.reshape(-1, hidden.shape[-1])
            return logits_at(head, hidden, ids.reshape(len(hidden), -1), sparse_grad=sparse)

        return self._inside(self.x._rows, compute).view(ids.shape)

    def _stream(
        self, rows: Rows, wanted: Wanted, ids: torch.Tensor | None = None
    ) -> tuple[Found, torch.Tensor | None]:
        """Entropy is nearly free beside log Z, unless log Z of a frozen head finds its gradient in
        the same stream."""

        def compute(hidden: torch.Tensor, head: Head) -> tuple[torch.Tensor | None, ...]:
            finds_gradient = self.with_grad and not head.requires_grad()
            got = row_reductions(
                head,
                hidden,
                ids=None if ids is None else ids.reshape(len(hidden), -1),
                entropy=wanted.entropy or not finds_gradient,
                logit_sum=wanted.logit_sum,
                top_k=wanted.top_k,
            )
            found = (got.log_partition, got.entropy, got.logit_sum, *(got.top or (None, None)))
            return *found, got.logits_at

        shape = rows.hidden.shape[:-1]
        log_partition, *others = (
            None if part is None else part.view(*shape, -1) for part in self._inside(rows, compute)
        )
        assert log_partition is not None
        return Found(log_partition, *others[:-1]), others[-1]

    def _inside(self, rows: Rows, compute: Callable[[torch.Tensor, Head], Any]) -> Any:
        """``compute`` of ``[N, d + r]`` rows and the head, inside the head's own call."""
        x, post, source = self.x, self.read.post, self.x._source
        source.check_unchanged()

        def run(hidden: torch.Tensor, head: Head) -> Any:
            if isinstance(head.weight, DTensor):
                return None
            if head.low_rank is not None:
                hidden = rows.factors(self.with_grad, hidden)
            head = head._replace(bias=x.with_added_bias(head.bias), post=post)
            with torch.autocast(hidden.device.type, enabled=False):
                return compute(hidden.reshape(-1, hidden.shape[-1]), head)

        with source.modes.restored(), torch.set_grad_enabled(self.with_grad):
            result = call_inside(source.head, run, rows.hidden)
        if result is None:  # a head that is spread over ranks
            raise Unanswered
        return result

    def _key(self, with_grad: bool | None = None) -> Any:
        """Of the logits and their gradients in the cache of their rows."""
        return *self.x.logits_key, self.with_grad if with_grad is None else with_grad
