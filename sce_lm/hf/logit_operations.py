"""What is done to logits that are not there yet without computing them: recorded, or answered.

The table of handlers is all that decides it. What is not in there, or what a handler declines,
forms the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sce_lm.hf.recorded_logits import SHAPING, RecordedLogits

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


def _to(func, args, kwargs):
    """``x.to(...)``, ``x.float()`` and the like: another dtype, another device, or a copy.

    accelerate moves every output of a model that it dispatched, mostly to where it is already.
    """
    x, *rest = args
    kwargs = dict(kwargs)
    if not _lazy(x) or kwargs.pop("memory_format", torch.preserve_format) not in _PLAIN_FORMATS:
        return NotImplemented
    # What comes out is what comes out of a tensor without elements.
    like = torch.empty(0, dtype=x.dtype, device=x.device)
    moved = func(like, *rest, **kwargs)
    if moved is like:
        return x
    if not (isinstance(moved, torch.Tensor) and moved.is_floating_point()):
        return NotImplemented
    device, dtype = moved.device, moved.dtype
    if (device, dtype) == (like.device, like.dtype):
        return x._record(("clone", None), dtype)
    if torch.compiler.is_compiling() and device != like.device:
        return NotImplemented
    return x._record(("to", (device, dtype)), dtype, device=device)


_PLAIN_FORMATS = (torch.preserve_format, torch.contiguous_format)


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
        hidden = x._hidden[index.to(x._hidden.device)]
        return x._record(("getitem", index.clone()), x.dtype, hidden)
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
    if not _lazy(x) or any(kind not in SHAPING for kind, _ in x._steps):
        return NotImplemented
    is_bias = (
        isinstance(value, torch.Tensor)
        and not isinstance(value, RecordedLogits)
        and 0 < value.dim() <= x.dim()
        and value.numel() == value.shape[-1] == x.shape[-1]
        and value.is_floating_point()
        and not value.requires_grad
        and value.device == x.device == x._source.device
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
    return args[0]._keep_hook(args[1]) if _lazy(args[0]) else NotImplemented


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
    casts = _named("to", "type", "type_as", "float", "double", "half", "bfloat16")
    put(_to, [f for f in casts if isinstance(f, type(torch.Tensor.to))])
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
