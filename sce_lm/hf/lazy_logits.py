"""Logits that are computed only if somebody looks at them.

A :class:`LazyLogits` stands where a causal LM expects the result of its output head. It holds the
hidden states and the head, and writes down the few things models do next: add a bias, multiply or
divide by a number, tanh, change the dtype, slice or flatten positions. A loss that knows it reads
that record (:meth:`LazyLogits.parts`) and never forms ``[..., V]``; ``cross_entropy`` asks whoever
made the logits for such a loss first. Whatever else touches it - argmax, a vocabulary crop, numpy,
a custom loss - gets the real logits, computed once by the head itself under the autocast and
gradient modes of the forward pass, and autograd goes on through them as usual.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from sce_lm.hf.head import base_layer, call_inside
from sce_lm.ops.logits import LogitTransform


@dataclass(frozen=True, slots=True)
class HeadParts:
    """What unformed logits are made of: ``post(hidden_states @ [weight | low_rank].T + bias)``."""

    hidden_states: torch.Tensor
    """``[..., d + r]``, after the slicing of positions that the model did on its logits."""
    weight: torch.Tensor
    """``[V, d]``, the head's own (no copy)."""
    low_rank: torch.Tensor | None
    """``[V, r]`` of adapters on the head (module :mod:`sce_lm.hf.head`), or None with r = 0."""
    bias: torch.Tensor | None
    """``[V]`` or None."""
    post: LogitTransform
    """What the model did to the raw logits."""


@dataclass(frozen=True, slots=True)
class Modes:
    """The modes under which the head would have run."""

    device_type: str
    autocast: torch.dtype | None
    grad: bool
    inference: bool

    @classmethod
    def current(cls, device_type: str) -> Modes:
        available = torch.amp.is_autocast_available(device_type)
        autocast = available and torch.is_autocast_enabled(device_type)
        return cls(
            device_type,
            torch.get_autocast_dtype(device_type) if autocast else None,
            torch.is_grad_enabled(),
            not torch.compiler.is_compiling() and torch.is_inference_mode_enabled(),
        )

    def head_dtype(self, hidden_states: torch.Tensor) -> torch.dtype:
        """The dtype of what a linear layer makes of them."""
        dtype = hidden_states.dtype
        return dtype if self.autocast is None or dtype == torch.float64 else self.autocast

    def restored(self) -> ExitStack:
        """A context in which they hold again."""
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(self.inference))
        stack.enter_context(torch.set_grad_enabled(self.grad))
        if torch.amp.is_autocast_available(self.device_type):
            stack.enter_context(
                torch.autocast(
                    self.device_type, dtype=self.autocast, enabled=self.autocast is not None
                )
            )
        return stack


CrossEntropy = Callable[["RecordedLogits", torch.Tensor, int, str], Any]
"""``(logits [n, V], labels [n], ignore_index, reduction)`` -> loss, or NotImplemented."""


@dataclass(frozen=True, slots=True)
class Source:
    """Head and modes, shared by all that is derived from one call of the head."""

    head: nn.Linear  # or what acts as one
    hidden_states: torch.Tensor
    modes: Modes
    versions: tuple[tuple[torch.Tensor, int | None], ...]
    """The head's parameters and their versions at its call."""
    cross_entropy: CrossEntropy | None

    def logits(self) -> torch.Tensor:
        """What the head gives."""
        now = self.head.parameters()
        if any(p is q and _version(p) != v for p, (q, v) in zip(now, self.versions)):
            raise RuntimeError(
                "the logits of a forward pass were asked for after the output head's weights had "
                "changed (an optimizer step?); read outputs.logits before that."
            )
        with self.modes.restored():
            return self.head(self.hidden_states)


Step = tuple[str, Any]
"""What is done to logits (a key of ``APPLY``) and with what: a number, a dtype, an index, ..."""


class RecordedLogits(torch.Tensor):
    """A record of logits that are not there yet: the head, its input, and what was done since.

    :class:`LazyLogits` keeps it in eager code, :class:`~sce_lm.hf.traced_logits.TracedLogits` while
    a compiler traces.
    """

    _source: Source
    _hidden: torch.Tensor
    _steps: tuple[Step, ...]
    _view_of: tuple[RecordedLogits, Step] | None
    _has_views: bool
    _real: torch.Tensor | None

    @classmethod
    def _make(
        cls,
        hidden: torch.Tensor,
        steps: tuple[Step, ...],
        source: Source,
        dtype: torch.dtype,
        view_of: tuple[RecordedLogits, Step] | None = None,
    ) -> Any:
        raise NotImplementedError

    def materialise(self) -> torch.Tensor:
        """The real logits: computed by the head at the first call, the same tensor afterwards."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Linear:
        """The module that would compute them."""
        return self._source.head

    @property
    def hidden_states(self) -> torch.Tensor:
        """``[..., d]``, one row for each row of the logits."""
        return self._hidden

    @property
    def is_materialised(self) -> bool:
        """Whether the real logits exist; the record is not valid any more then."""
        return self._root()._real is not None or self._real is not None

    @property
    def transform(self) -> LogitTransform | None:
        """What was recorded, as a LogitTransform; None if it is none or the logits exist."""
        return None if self.is_materialised else _as_transform(self._steps)

    def with_added_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The head's own bias and what the model added to its result, ``[V]`` or None."""
        for kind, value in self._steps:
            if kind == "add":
                bias = value.flatten() if bias is None else bias + value.flatten()
        return bias

    def parts(self) -> HeadParts:
        """Hidden states, weight, bias and transform, for code that wants no ``[..., V]``.

        Raises:
            ValueError: the model did something that is no LogitTransform, or already formed them.
        """
        post = self.transform
        if post is None:
            done = "were formed already" if self.is_materialised else f"went through {self._steps}"
            raise ValueError(
                f"these logits {done}, which no LogitTransform (scale, soft cap) describes; use "
                "them as an ordinary tensor."
            )
        with self._source.modes.restored():
            product = call_inside(self.head, lambda product: product, self._hidden)
        hidden, weight, low_rank, bias = product
        return HeadParts(hidden, weight, low_rank, self.with_added_bias(bias), post)

    def _root(self) -> Any:
        return self if self._view_of is None else self._view_of[0]._root()

    def _record(self, step: Step, dtype: torch.dtype, hidden: torch.Tensor | None = None) -> Any:
        source = self._source
        if source.modes.grad and not torch.is_grad_enabled():
            source = replace(source, modes=replace(source.modes, grad=False))
        hidden = self._hidden if hidden is None else hidden
        return self._make(hidden, (*self._steps, step), source, dtype)

    def _record_in_place(self, step: Step) -> Any:
        # A view and its base share memory: what one of them does the other must see.
        if self._view_of is not None or self._has_views or not self._tracks_gradients():
            return None
        self._steps = (*self._steps, step)
        return self

    def _tracks_gradients(self) -> bool:
        """False where torch would let a result share memory with this but not its history."""
        return torch.is_grad_enabled() or not self._source.modes.grad

    def _view(self, step: Step, hidden: torch.Tensor) -> Any:
        self._has_views = True
        steps = (*self._steps, step)
        return self._make(hidden, steps, self._source, self.dtype, view_of=(self, step))


class LazyLogits(RecordedLogits):
    """``[..., V]`` logits that are not there yet; a Tensor to everybody else.

    Shape, dtype, device and ``requires_grad`` are answered without computing anything, and so are a
    bias, scaling, tanh, casts, copies, slices and views of the leading dimensions. ``grad_fn`` and
    ``_base`` are None until the logits exist: DDP and FSDP ask every output of a model for them.
    """

    _hooks: OrderedDict[int, Callable]

    @classmethod
    def _make(
        cls,
        hidden: torch.Tensor,
        steps: tuple[Step, ...],
        source: Source,
        dtype: torch.dtype,
        view_of: tuple[RecordedLogits, Step] | None = None,
    ) -> LazyLogits:
        # A sharding engine may keep the weight flat or empty between its uses.
        layer = base_layer(source.head)
        vocab_size = layer.weight.shape[0] if layer.weight.dim() == 2 else layer.out_features
        weights_need = any(p.requires_grad for p in source.head.parameters())
        needs_grad = source.modes.grad and (hidden.requires_grad or weights_need)
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            (*hidden.shape[:-1], vocab_size),
            dtype=dtype,
            device=hidden.device,
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
        modes = Modes.current(hidden_states.device.type)
        versions = tuple((p, _version(p)) for p in head.parameters())
        source = Source(head, hidden_states, modes, versions, cross_entropy)
        return cls._make(hidden_states, (), source, modes.head_dtype(hidden_states))

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


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _refuse_gradient(grad: torch.Tensor | None) -> None:
    if grad is None:  # such an operation got them but only its other results were used
        return
    raise RuntimeError(
        "a gradient arrived at lazy logits from an operation that bypasses __torch_function__ (a "
        "torch.autograd.Function?); give that operation outputs.logits.materialise() instead."
    )


APPLY: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "add": lambda x, value: x + value,
    "mul": lambda x, value: x * value,
    "div": lambda x, value: x / value,
    "tanh": lambda x, _: torch.tanh(x),
    "to": lambda x, dtype: x.to(dtype),
    "getitem": lambda x, index: x[index],
    "view": lambda x, shape: x.view(shape),
    "reshape": lambda x, shape: x.reshape(shape),
    "clone": lambda x, _: x.clone(),
    "contiguous": lambda x, _: x.contiguous(),
}


_SHAPING = {"to", "getitem", "view", "reshape", "clone", "contiguous"}
"""Steps that leave the value of every logit as it is."""


def _as_transform(steps: tuple[Step, ...]) -> LogitTransform | None:
    """``after · tanh(before · (x + bias))`` has soft_cap = after, scale = before · after."""
    before, after, capped = 1.0, 1.0, False
    for kind, value in steps:
        if kind == "tanh":
            if capped:
                return None
            capped, before, after = True, after, 1.0
        elif kind == "mul":
            after *= float(value)
        elif kind == "div":
            divisor = float(value)
            after = after / divisor if divisor else math.nan
    scale = before * after
    if not math.isfinite(scale) or scale == 0.0:
        return None
    return LogitTransform(scale=scale, soft_cap=abs(after) if capped else None)


# ------------------------------------------------------------- what is answered without computing
# A handler gets (func, args, kwargs) and returns NotImplemented where the logits are needed.


def answer(func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives if nothing need be computed for it, else NotImplemented."""
    handler = _HANDLERS.get(func)
    return NotImplemented if handler is None else handler(func, args, kwargs)


def _lazy(x: Any) -> bool:
    return isinstance(x, RecordedLogits) and not x.is_materialised


def _scalar(value: Any, like: RecordedLogits) -> Any:
    """A number to be recorded, or None: a Python number or a one-element tensor without grad."""
    if isinstance(value, (int, float)):
        return value
    if (
        isinstance(value, torch.Tensor)
        and not isinstance(value, RecordedLogits)
        and value.numel() == 1
        and value.dim() <= like.dim()
        and not value.requires_grad
        and not value.is_complex()
        and not torch.compiler.is_compiling()  # its value is not known yet
    ):
        return value.detach().clone()
    return None


def _scale(kind: str, in_place: bool, func, args, kwargs):
    if kwargs or len(args) != 2:
        return NotImplemented
    x, value = args
    if kind == "mul" and not in_place and not isinstance(x, RecordedLogits):
        x, value = value, x
    if not _lazy(x) or (value := _scalar(value, x)) is None:
        return NotImplemented
    dtype = x.dtype
    if isinstance(value, torch.Tensor):
        dtype = torch.result_type(torch.empty(1, dtype=dtype), _on_cpu(value))
    if in_place:
        recorded = x._record_in_place((kind, value)) if dtype == x.dtype else None
        return NotImplemented if recorded is None else recorded
    return x._record((kind, value), dtype)


def _on_cpu(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype)


def _tanh(in_place: bool, func, args, kwargs):
    if kwargs or len(args) != 1 or not _lazy(args[0]):
        return NotImplemented
    if in_place:
        recorded = args[0]._record_in_place(("tanh", None))
        return NotImplemented if recorded is None else recorded
    return args[0]._record(("tanh", None), args[0].dtype)


def _cast(dtype: torch.dtype | None, func, args, kwargs):
    """``x.float()`` and the like, ``x.to(dtype)``, ``x.to(same device)``, ``x.type(dtype)``."""
    x, *rest = args
    if not _lazy(x) or kwargs.keys() - {"dtype"}:
        return NotImplemented
    wanted = [*rest, *kwargs.values()]
    if dtype is None:
        if len(wanted) != 1:
            return NotImplemented
        dtype = wanted[0]
        if isinstance(dtype, (str, torch.device, int)):
            same = func is torch.Tensor.to and torch.device(dtype) == x.device
            return x if same else NotImplemented
        if isinstance(dtype, torch.Tensor) and dtype.device == x.device:
            dtype = dtype.dtype
        if not isinstance(dtype, torch.dtype):
            return NotImplemented
    elif wanted:
        return NotImplemented
    if not dtype.is_floating_point:
        return NotImplemented
    return x if dtype == x.dtype else x._record(("to", dtype), dtype)


def _copy(kind: str, func, args, kwargs):
    """``contiguous`` of a view, and ``clone``, which DDP does to the outputs of a model."""
    if kwargs or len(args) != 1 or not _lazy(args[0]):
        return NotImplemented
    x = args[0]
    if kind == "contiguous" and x._view_of is None:
        return x
    return x._record((kind, None), x.dtype)


def _getitem(func, args, kwargs):
    """Integers, slices and a mask of positions; they leave the vocabulary whole."""
    x, index = args
    if not _lazy(x) or not x._tracks_gradients():
        return NotImplemented
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool and 0 < index.dim() < x.dim():
        # Unlike a slice the result is a copy.
        return x._record(("getitem", index.clone()), x.dtype, x._hidden[index])
    entries = index if isinstance(index, tuple) else (index,)
    for entry in entries:
        is_number = isinstance(entry, int) and not isinstance(entry, bool)
        if not (entry is Ellipsis or isinstance(entry, slice) or is_number):
            return NotImplemented
    ellipses = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    missing = x.dim() - (len(entries) - len(ellipses))
    if missing < 0 or len(ellipses) > 1:
        return NotImplemented
    at = ellipses[0] if ellipses else len(entries)
    by_dimension = (*entries[:at], *[slice(None)] * missing, *entries[at + 1 :])
    if by_dimension[-1] != slice(None):
        return NotImplemented
    return x._view(("getitem", index), x._hidden[index])


def _reshape(func, args, kwargs):
    """``view`` and ``reshape`` that leave the vocabulary whole."""
    x, *shape = args
    if kwargs or not _lazy(x) or not x._tracks_gradients():
        return NotImplemented
    kind = "view" if func is torch.Tensor.view else "reshape"
    if kind == "view" and x._view_of is not None:  # which fails for some strides
        return NotImplemented
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = list(shape[0])
    if not shape or not all(isinstance(size, int) for size in shape):
        return NotImplemented
    *leading, last = torch.empty(x.shape, device="meta").view(shape).shape
    if last != x.shape[-1]:
        return NotImplemented
    return x._view((kind, (*leading, last)), x._hidden.reshape(*leading, x._hidden.shape[-1]))


def _add_bias(func, args, kwargs):
    """A number for each class, before anything but casts and slices was done."""
    if kwargs or len(args) != 2:
        return NotImplemented
    x, value = args if isinstance(args[0], RecordedLogits) else reversed(args)
    if not _lazy(x) or any(kind not in _SHAPING for kind, _ in x._steps):
        return NotImplemented
    is_bias = (
        isinstance(value, torch.Tensor)
        and not isinstance(value, RecordedLogits)
        and 0 < value.dim() <= x.dim()
        and value.numel() == value.shape[-1] == x.shape[-1]
        and value.is_floating_point()
        and not value.requires_grad
    )
    if not is_bias:
        return NotImplemented
    return x._record(("add", value.clone()), torch.promote_types(x.dtype, value.dtype))


def _cross_entropy(func, args, kwargs):
    """``torch.nn.functional.cross_entropy`` of ``[n, V]`` with plain options."""
    return _cross_entropy_of(*args, **kwargs)


def _cross_entropy_of(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    x, labels = input, target
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    if (
        not _lazy(x)
        or x.transform is None
        or x._source.cross_entropy is None
        or x.dim() != 2
        or labels.dim() != 1
        or len(labels) != len(x)
        or labels.is_floating_point()
        or not plain
    ):
        return NotImplemented
    return x._source.cross_entropy(x, labels, ignore_index, reduction)


def _metadata(func, args, kwargs):
    if not _lazy(args[0]):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _none_yet(func, args, kwargs):
    return None if _lazy(args[0]) else NotImplemented


def _register_hook(func, args, kwargs):
    """Kept for the real logits: FSDP hangs hooks on every output, which must not form them."""
    if not (isinstance(args[0], LazyLogits) and _lazy(args[0])):
        return NotImplemented
    x, hook = args
    handle = RemovableHandle(x._hooks)
    x._hooks[handle.id] = hook
    return handle


def _named(*names: str) -> list[Callable]:
    places = (torch, torch.Tensor)
    return [getattr(place, name) for name in names for place in places if hasattr(place, name)]


def _handlers() -> dict[Callable, Callable]:
    table: dict[Callable, Callable] = {}

    def put(handler: Callable, functions: list[Callable]) -> None:
        table.update(dict.fromkeys(functions, handler))

    put(partial(_scale, "mul", False), _named("mul", "multiply", "__mul__", "__rmul__"))
    put(partial(_scale, "mul", True), _named("mul_", "multiply_", "__imul__"))
    divisions = _named("div", "divide", "true_divide", "__truediv__", "__div__")
    put(partial(_scale, "div", False), divisions)
    divisions_in_place = _named("div_", "divide_", "true_divide_", "__itruediv__", "__idiv__")
    put(partial(_scale, "div", True), divisions_in_place)
    put(partial(_tanh, False), _named("tanh"))
    put(partial(_tanh, True), _named("tanh_"))
    casts = {"float": torch.float32, "double": torch.float64, "half": torch.float16}
    for name, dtype in {**casts, "bfloat16": torch.bfloat16}.items():
        put(partial(_cast, dtype), [getattr(torch.Tensor, name)])
    put(partial(_cast, None), [torch.Tensor.to, torch.Tensor.type, torch.Tensor.type_as])
    put(partial(_copy, "clone"), _named("clone"))
    put(partial(_copy, "contiguous"), [torch.Tensor.contiguous])
    put(_getitem, [torch.Tensor.__getitem__])
    put(_reshape, [torch.Tensor.view, torch.Tensor.reshape, torch.reshape])
    put(_add_bias, _named("add", "__add__", "__radd__"))
    put(_cross_entropy, [nn.functional.cross_entropy])
    put(_register_hook, [torch.Tensor.register_hook])
    attributes = "shape dtype device ndim requires_grad layout is_cuda is_cpu is_meta itemsize"
    put(_metadata, [getattr(torch.Tensor, name).__get__ for name in attributes.split()])
    for name in ("grad_fn", "_base"):
        put(_none_yet, [vars(torch._C.TensorBase)[name].__get__])
    put(_metadata, _named("size", "dim", "ndimension", "numel", "nelement", "get_device"))
    put(_metadata, _named("is_floating_point", "is_complex", "element_size", "__len__"))
    return table


_HANDLERS = _handlers()
