"""Lazy logits while `torch.compile` traces a model.

:class:`LazyLogits` decides at run time, in code that no compiler follows. A compiler traces Python
once, and what a model does to its head's result is known then. So while it traces, the head gives
:class:`TracedLogits`: the same record, kept by the same handlers, made of what a compiler follows,
a tensor subclass with ``__torch_function__`` and attributes. What is not recorded forms the logits
inside the graph.

The memory behind one is a single NaN, expanded to the shape of the logits. Shape, dtype and device
are right everywhere, and code that bypasses ``__torch_function__`` gets NaN, which nobody takes for
a result. Outside the compiled code the first touch makes LazyLogits of it, differentiable through
the hidden states, which are another output of the graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from sce_lm.hf.lazy_logits import LazyLogits
from sce_lm.hf.logit_operations import record
from sce_lm.hf.recorded_logits import APPLY, CrossEntropy, Modes, RecordedLogits, Source, Step


class TracedLogits(RecordedLogits):
    """``[..., V]`` logits of a forward pass that a compiler traces."""

    _lazy: LazyLogits | None

    @classmethod
    def _make(
        cls,
        hidden: torch.Tensor,
        steps: tuple[Step, ...],
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        view_of: tuple[RecordedLogits, Step] | None = None,
    ) -> TracedLogits:
        nan = hidden.new_full((), math.nan, dtype=dtype, device=device)
        self = TracedLogits(nan.expand(*hidden.shape[:-1], source.head.weight.shape[0]))
        self._source, self._hidden, self._steps = source, hidden, steps
        self._view_of, self._has_views, self._real, self._lazy = view_of, False, None, None
        return self

    @classmethod
    def from_head(
        cls, head: nn.Linear, hidden_states: torch.Tensor, cross_entropy: CrossEntropy
    ) -> TracedLogits:
        """As :meth:`LazyLogits.from_head`, for a head that is plain."""
        device = hidden_states.device
        modes = Modes.current(device.type)
        versions = tuple((p, p._version) for p in head.parameters())
        source = Source(head, hidden_states, device, modes, versions, cross_entropy)
        return cls._make(hidden_states, (), source, modes.head_dtype(hidden_states), device)

    @property
    def is_materialised(self) -> bool:
        """Whether the real logits exist; the record is not valid any more then."""
        if self._lazy is not None:
            return self._lazy.is_materialised
        return self._root()._real is not None or self._real is not None

    def materialise(self) -> torch.Tensor:
        """The real logits, a part of the graph while tracing."""
        if not torch.compiler.is_compiling():
            lazy = self.lazy()
            return lazy.materialise() if isinstance(lazy, LazyLogits) else lazy
        if self._real is None:
            self._real = self._traced()
        return self._real

    def _traced(self) -> torch.Tensor:
        modes = self._source.modes
        autocast = torch.autocast(
            modes.device_type, dtype=modes.autocast, enabled=modes.autocast is not None
        )
        with torch.set_grad_enabled(modes.grad), autocast:
            if self._view_of is not None:
                base, (kind, value) = self._view_of
                return APPLY[kind](base.materialise(), value)
            real = self._source.head(self._source.hidden_states)
            for kind, value in self._steps:
                real = APPLY[kind](real, value)
            return real

    def lazy(self) -> LazyLogits | torch.Tensor:
        """Outside the compiled code: what eager code would have here."""
        if self._real is not None:
            return self._real
        if self._lazy is None:
            source = self._source
            with torch._C.DisableTorchFunctionSubclass():
                dtype = self.dtype
            self._lazy = LazyLogits._make(self._hidden, self._steps, source, dtype, source.device)
        return self._lazy

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            result = record(func, args, kwargs)
            if result is not NotImplemented:
                return result
            return func(*_real(args), **_real(kwargs))
        if func in _MEMORY:  # asked by compilers of what enters another graph
            return super().__torch_function__(func, types, args, kwargs)
        args, kwargs = tree_map_only(TracedLogits, TracedLogits.lazy, (args, kwargs))
        return func(*args, **kwargs)


_MEMORY = {torch.Tensor.stride, torch.Tensor.storage_offset, torch.Tensor.untyped_storage}


def _real(tree: Any) -> Any:
    """``tree`` with the logits formed. Written out, since compilers shorten ``tree_map``."""
    if isinstance(tree, RecordedLogits):
        return tree.materialise()
    if isinstance(tree, (tuple, list)):
        return [_real(x) for x in tree]
    if isinstance(tree, dict):
        return {key: _real(x) for key, x in tree.items()}
    return tree
