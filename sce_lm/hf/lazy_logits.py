"""Logits that are computed only if somebody looks at them.

A :class:`LazyLogits` stands where a causal LM expects the result of its output head. It holds the
hidden states and the head, and writes down the few things that models and the libraries around
them do next (:mod:`sce_lm.hf.logit_operations`): add a bias, multiply or divide by a number, tanh,
change dtype or device, slice or flatten positions, log_softmax. A loss that knows it reads that
record (:meth:`LazyLogits.parts`) and never forms ``[..., V]``; ``cross_entropy`` asks whoever made
the logits for such a loss first. What is read off whole rows (log-probabilities of tokens,
entropies, best classes) is answered without forming them either (:mod:`sce_lm.hf.lazy_answers`).
Whatever else touches it - a vocabulary crop, numpy, a custom loss - gets the real logits, computed
once by the head itself under the autocast and gradient modes of the forward pass, and autograd goes
on through them as usual. Of a slice only its own rows are formed, unless memory is shared with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from sce_lm.hf.head_call import is_plain, result_device, vocab_size
from sce_lm.hf.lazy_answers import answer
from sce_lm.hf.logit_operations import record
from sce_lm.hf.recorded_logits import (
    APPLY,
    SHAPING,
    CrossEntropy,
    LabelTerms,
    Modes,
    Place,
    Reading,
    RecordedLogits,
    Source,
    Step,
    version,
)
from sce_lm.hf.reduced_rows import Rows

__all__ = ["LazyLogits"]


class LazyLogits(RecordedLogits):
    """``[..., V]`` logits that are not there yet; a Tensor to everybody else.

    Shape, dtype, device and ``requires_grad`` are answered without computing anything, and so are a
    bias, scaling, tanh, casts, moves, copies, slices and views of the leading dimensions.
    ``grad_fn`` and ``_base`` are None until the logits exist: DDP and FSDP ask every output of a
    model for them.
    """

    _hooks: OrderedDict[int, Callable]
    _rows: Rows
    _own: torch.Tensor | None
    """The real logits of a view that was formed by itself: nobody else has them."""

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
        self._hooks, self._rows, self._own = OrderedDict(), Rows(hidden), None
        if needs_grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_refuse_gradient)
        return self

    @classmethod
    def from_head(
        cls,
        head: nn.Linear,
        hidden_states: torch.Tensor,
        cross_entropy: CrossEntropy | None = None,
        label_terms: LabelTerms | None = None,
    ) -> LazyLogits:
        """The lazy form of ``head(hidden_states)``; ``head`` has nn.Linear's weight and bias.

        ``cross_entropy`` may answer ``torch.nn.functional.cross_entropy`` of ``[n, V]`` of them,
        and ``label_terms`` finds log Z where a log-probability of each row is gathered.
        """
        device = result_device(head, hidden_states)
        modes = Modes.current(device.type)
        versions = tuple((p, version(p)) for p in head.parameters())
        source = Source(head, hidden_states, device, modes, versions, cross_entropy, label_terms)
        return cls._make(hidden_states, (), source, modes.head_dtype(hidden_states), device)

    def materialise(self) -> torch.Tensor:
        """The real logits: computed by the head at the first call, the same tensor afterwards."""
        if self._real is None:
            if self._view_of is not None:
                base, (kind, value) = self._view_of
                with self._source.modes.restored():
                    real = APPLY[kind](base.materialise(), value)
            elif self._are_some_rows():
                real = self._own_rows()
            else:
                real = self._source.logits()
                with self._source.modes.restored():
                    for kind, value in self._steps:
                        real = APPLY[kind](real, value)
            for hook in self._hooks.values():
                real.register_hook(hook)
            self._real = real
        return self._real

    def _formed_alone(self) -> torch.Tensor:
        """The real logits of these rows, for code that neither keeps nor changes their memory."""
        if self._own is None:
            self._own = self._own_rows()
        return self._own

    def _can_be_formed_alone(self) -> bool:
        # The gradient of logits that somebody waits for is that of all of them.
        is_view = self._view_of is not None and not self.is_materialised
        return is_view and self._are_some_rows() and not any(x._hooks for x in self._bases())

    def _are_some_rows(self) -> bool:
        """Whether these are fewer than the head was called with, and none are multiplied by."""
        is_less = self._hidden.numel() < self._source.hidden_states.numel()
        return is_less and all(kind != "times" for kind, _ in self._steps)

    def _own_rows(self) -> torch.Tensor:
        """The real logits of these rows, by a product of these rows."""
        real = self._source.logits(self._hidden)
        with self._source.modes.restored():
            for kind, value in self._steps:
                if kind == "add":
                    real = real + value.flatten()
                elif kind == "to" or kind not in SHAPING:
                    real = APPLY[kind](real, value)
        return real if self.requires_grad else real.detach()

    def _bases(self) -> Iterator[LazyLogits]:
        """This, and what it is a view of."""
        each: LazyLogits | None = self
        while each is not None:
            yield each
            each = None if each._view_of is None else each._view_of[0]  # pyright: ignore

    def _keep_hook(self, hook: Callable) -> Any:
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    @property
    def has_hooks(self) -> bool:
        """Whether somebody waits for the gradient of the logits themselves."""
        return any(not _marks_backward(hook) for hook in self._hooks.values())

    def backward_hooks(self) -> list[Callable]:
        """Those that FSDP hangs on a model's outputs to learn that their backward pass begins."""
        return [hook for hook in self._hooks.values() if _marks_backward(hook)]

    @property
    def logits_key(self) -> tuple:
        """Of the logits among those of the same rows."""
        read = Reading.of_steps(self._steps)
        added = (id(value) for kind, value in self._steps if kind == "add")
        return None if read is None else read.post, *added

    def has_logits_of(self, other: LazyLogits) -> bool:
        """Whether both are made of the same logits."""
        return self._rows is other._rows and self.logits_key == other.logits_key

    def is_small(self, elements: int) -> bool:
        """Whether no more logits than this are reduced with it, and forming them is one product."""
        rows = self._rows.reduced.hidden.shape[:-1].numel()
        return rows * self.shape[-1] <= elements and is_plain(self.head)

    def _record(
        self,
        step: Step,
        dtype: torch.dtype,
        place: Place | None = None,
        device: torch.device | None = None,
    ) -> LazyLogits:
        return self._derived(super()._record(step, dtype, place, device), place)

    def _view(self, step: Step, place: Place | None = None, together: bool = False) -> LazyLogits:
        return self._derived(super()._view(step, place, together), place, together)

    def _derived(
        self, result: LazyLogits, place: Place | None, together: bool = False
    ) -> LazyLogits:
        whole = (self._rows, place) if place is not None else None
        result._rows = Rows(result._hidden, whole, together) if whole else self._rows
        for hook in self.backward_hooks():
            result._keep_hook(hook)
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        if self._real is not None:
            return repr(self._real)
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, not computed yet)"

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for how in (record, answer, _of_formed_alone):
            result = how(func, args, kwargs)
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


def _of_formed_alone(func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives of slices that are formed without what they are slices of, or
    NotImplemented where it may keep or change their memory, which they share with that."""
    seen = [x for x in tree_leaves((args, kwargs)) if isinstance(x, LazyLogits)]
    alone = [x for x in seen if x._can_be_formed_alone()]
    if not alone or _has_effects(func):
        return NotImplemented
    formed = [x._formed_alone() for x in alone]
    versions = [version(x) for x in formed]
    own = dict(zip(map(id, alone), formed))
    tree = tree_map_only(LazyLogits, lambda x: own.get(id(x), x), (args, kwargs))
    result = func(*tree[0], **tree[1])
    memory = {x.untyped_storage().data_ptr() for x in formed}
    is_new = all(
        isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in memory
        for part in tree_leaves(result)
    )
    return result if is_new and versions == [version(x) for x in formed] else NotImplemented


def _has_effects(func: Callable) -> bool:
    """Whether calling ``func`` twice is not the same as calling it once."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name.startswith("__i") or name in ("__set__", "__setitem__", "__delete__")
    return name.endswith("_") or name == "backward"


def _marks_backward(hook: Callable) -> bool:
    """Whether a hook is one of torch's own wrappers, which look at no gradient."""
    module = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return module.startswith("torch.distributed")


def _refuse_gradient(grad: torch.Tensor | None) -> None:
    if grad is None:  # such an operation got them but only its other results were used
        return
    raise RuntimeError(
        "a gradient arrived at lazy logits from an operation that bypasses __torch_function__ (a "
        "torch.autograd.Function?); give that operation outputs.logits.materialise() instead."
    )
