"""Logits that are computed only if somebody looks at them.

A :class:`LazyLogits` stands where a causal LM expects the result of its output head. It holds the
hidden states and the head, and writes down the few things that models and the libraries around them
do next: add a bias, multiply or divide by a number, tanh, change dtype or device, slice or flatten
positions. A loss that knows it reads that record (:meth:`LazyLogits.parts`) and never forms
``[..., V]``; ``cross_entropy`` asks whoever made the logits for such a loss first. Whatever else
touches it - argmax, a vocabulary crop, numpy, a custom loss - gets the real logits, computed once
by the head itself under the autocast and gradient modes of the forward pass, and autograd goes on
through them as usual.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from sce_lm.hf.head_call import result_device, vocab_size
from sce_lm.hf.logit_operations import answer
from sce_lm.hf.recorded_logits import (
    APPLY,
    CrossEntropy,
    Modes,
    RecordedLogits,
    Source,
    Step,
    version,
)

__all__ = ["LazyLogits"]


class LazyLogits(RecordedLogits):
    """``[..., V]`` logits that are not there yet; a Tensor to everybody else.

    Shape, dtype, device and ``requires_grad`` are answered without computing anything, and so are a
    bias, scaling, tanh, casts, moves, copies, slices and views of the leading dimensions.
    ``grad_fn`` and ``_base`` are None until the logits exist: DDP and FSDP ask every output of a
    model for them.
    """

    _hooks: OrderedDict[int, Callable]

    @classmethod
    def _make(
        cls,
        hidden: torch.Tensor,
        steps: tuple[Step, ...],
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        view_of: tuple[RecordedLogits, Step] | None = None,
    ) -> LazyLogits:
        weights_need = any(p.requires_grad for p in source.head.parameters())
        needs_grad = source.modes.grad and (hidden.requires_grad or weights_need)
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            (*hidden.shape[:-1], vocab_size(source.head)),
            dtype=dtype,
            device=device,
            requires_grad=needs_grad,
        )
        self._source, self._hidden, self._steps = source, hidden, steps
        self._view_of, self._has_views, self._real = view_of, False, None
        self._hooks = OrderedDict()
        if needs_grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_refuse_gradient)
        return self

    @classmethod
    def from_head(
        cls, head: nn.Linear, hidden_states: torch.Tensor, cross_entropy: CrossEntropy | None = None
    ) -> LazyLogits:
        """The lazy form of ``head(hidden_states)``; ``head`` has nn.Linear's weight and bias.

        ``cross_entropy`` may answer ``torch.nn.functional.cross_entropy`` of ``[n, V]`` of them.
        """
        device = result_device(head, hidden_states)
        modes = Modes.current(device.type)
        versions = tuple((p, version(p)) for p in head.parameters())
        source = Source(head, hidden_states, device, modes, versions, cross_entropy)
        return cls._make(hidden_states, (), source, modes.head_dtype(hidden_states), device)

    def materialise(self) -> torch.Tensor:
        """The real logits: computed by the head at the first call, the same tensor afterwards."""
        if self._real is None:
            if self._view_of is not None:
                base, (kind, value) = self._view_of
                with self._source.modes.restored():
                    real = APPLY[kind](base.materialise(), value)
            else:
                real = self._source.logits()
                with self._source.modes.restored():
                    for kind, value in self._steps:
                        real = APPLY[kind](real, value)
            for hook in self._hooks.values():
                real.register_hook(hook)
            self._real = real
        return self._real

    def _keep_hook(self, hook: Callable) -> Any:
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        if self._real is not None:
            return repr(self._real)
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, not computed yet)"

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = answer(func, args, kwargs)
        if result is not NotImplemented:
            return result
        return func(*_real(args), **_real(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # Reached from C++ only. Autograd is above this point and has seen the wrapper, a leaf whose
        # hook refuses a gradient: values are right here, and a gradient cannot be lost silently.
        detached = tree_map_only(LazyLogits, lambda x: x.materialise().detach(), (args, kwargs))
        return func(*detached[0], **(detached[1] or {}))


def _real(tree: Any) -> Any:
    return tree_map_only(LazyLogits, lambda x: x.materialise(), tree)


def _refuse_gradient(grad: torch.Tensor | None) -> None:
    if grad is None:  # such an operation got them but only its other results were used
        return
    raise RuntimeError(
        "a gradient arrived at lazy logits from an operation that bypasses __torch_function__ (a "
        "torch.autograd.Function?); give that operation outputs.logits.materialise() instead."
    )
