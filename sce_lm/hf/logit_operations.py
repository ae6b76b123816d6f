"""What is done to logits that are not there yet without computing them, and so is recorded.

The table of handlers is all that decides it. What is not in there, or what a handler declines, is
answered (:mod:`sce_lm.hf.lazy_answers`) or forms the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from sce_lm.hf.recorded_logits import SHAPING, RecordedLogits, full_index

# A handler gets (func, args, kwargs) and returns NotImplemented where the logits are needed.


def record(func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives if nothing need be computed for it, else NotImplemented."""
    handler = _HANDLERS.get(func)
    return NotImplemented if handler is None else handler(func, args, kwargs)


def is_lazy(x: Any) -> bool:
    """Whether ``x`` is a record whose logits do not exist."""
    return isinstance(x, RecordedLogits) and not x.is_materialised


def _lazy(x: Any) -> bool:
    return is_lazy(x) and (torch.compiler.is_compiling() or not x.has_hooks)


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
    if kind == "mul" and not in_place:
        if _lazy(x) and _lazy(value):
            return _product(x, value)
        if not isinstance(x, RecordedLogits):
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


def _product(x: Any, y: Any):
    """``p · log p`` and ``p · s`` of the same rows, whose sums are known."""
    if torch.compiler.is_compiling():
        return NotImplemented
    a, b = x.reading, y.reading
    if (
        a is None
        or b is None
        or a.times is not None
        or b.times is not None
        or {a.form, b.form} not in ({"softmax", "log_softmax"}, {"softmax", None})
        or not x.has_logits_of(y)
        or (x.shape, x.device, x.requires_grad) != (y.shape, y.device, y.requires_grad)
    ):
        return NotImplemented
    copy = y._record(("clone", None), y.dtype)
    return x._record(("times", copy), torch.promote_types(x.dtype, y.dtype))


def _negative(func, args, kwargs):
    return NotImplemented if kwargs else _scale("mul", False, func, (*args, -1), {})


def _form(kind: str, func, args, kwargs):
    """``log_softmax`` and ``softmax`` over the classes, by each of their names."""
    return _form_of(kind, *args, **kwargs)


def _form_of(kind: str, input, dim=None, _stacklevel=3, dtype=None):
    x = input
    if isinstance(_stacklevel, torch.dtype):  # third argument of torch's own functions
        dtype = _stacklevel
    if torch.compiler.is_compiling() or not _lazy(x) or x.transform is None:
        return NotImplemented
    if dim not in (-1, x.dim() - 1):
        return NotImplemented
    dtype = dtype or result_dtype(getattr(torch, kind), x, -1)
    return x._record((kind, dtype), dtype) if dtype.is_floating_point else NotImplemented


def _exp(func, args, kwargs):
    """Of log-probabilities."""
    x = args[0]
    if kwargs or len(args) != 1 or not _lazy(x):
        return NotImplemented
    read = x.reading
    if read is None or (read.form, read.factor, read.times) != ("log_softmax", 1.0, None):
        return NotImplemented
    dtype = result_dtype(torch.exp, x)
    return x._record(("exp", dtype), dtype)


def result_dtype(func: Callable, x: torch.Tensor, *options: Any) -> torch.dtype:
    """Of what ``func`` makes of such a tensor, which depends on autocast."""
    kind = x.device.type
    autocast = None
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        autocast = torch.get_autocast_dtype(kind)
    return _result_dtype(func, x.dtype, x.device, options, autocast)


@cache
def _result_dtype(func, dtype, device, options, autocast) -> torch.dtype:
    return func(torch.zeros(1, 2, dtype=dtype, device=device), *options).dtype


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
    if not _lazy(x):
        return NotImplemented
    if isinstance(index, torch.Tensor) and index.dtype == torch.bool and 0 < index.dim() < x.dim():
        # Unlike a slice the result is a copy.
        index = index.clone()
        mask = index.to(x._hidden.device)
        return x._record(("getitem", index), x.dtype, lambda rows: rows[mask])
    entries = index if isinstance(index, tuple) else (index,)
    for entry in entries:
        is_number = isinstance(entry, int) and not isinstance(entry, bool)
        if not (entry is Ellipsis or isinstance(entry, slice) or is_number):
            return NotImplemented
    by_dimension = full_index(entries, x.dim())
    if by_dimension is None or by_dimension[-1] != slice(None):
        return NotImplemented
    return x._view(("getitem", index), lambda rows: rows[by_dimension])


def _index_select(func, args, kwargs):
    """Rows at indices along a leading dimension, a copy."""
    return _index_select_of(*args, **kwargs)


def _index_select_of(input, dim, index):
    if torch.compiler.is_compiling() or not _lazy(input) or index.dim() != 1:
        return NotImplemented
    dim = dim + input.dim() if dim < 0 else dim
    if not 0 <= dim < input.dim() - 1:
        return NotImplemented
    step = ("getitem", (*[slice(None)] * dim, index.clone()))
    at = index.to(input._hidden.device, copy=True)
    return input._record(step, input.dtype, lambda rows: rows.index_select(dim, at))


def _pieces(func, args, kwargs):
    """``unbind`` (which iteration calls), ``split`` and ``chunk`` over leading dimensions."""
    return _pieces_of(func, *args, **kwargs)


def _pieces_of(func, input, *size, dim=0, **options):
    x, size = input, (*options.values(), *size)
    if len(size) == (1 if func.__name__ == "unbind" else 2):
        *size, dim = size
    if torch.compiler.is_compiling() or not _lazy(x):
        return NotImplemented
    dim = dim + x.dim() if dim < 0 else dim
    if dim >= x.dim() - 1:
        return NotImplemented
    found, start = [], 0
    for part in func(torch.empty(x.shape[dim], device="meta"), *size):
        index: Any = start if part.dim() == 0 else slice(start, start + len(part))
        start += part.numel()
        index = (*[slice(None)] * dim, index)
        found.append(x._view(("getitem", index), lambda rows, i=index: rows[i], together=True))
    return tuple(found)


def _reshape(func, args, kwargs):
    """``view``, ``reshape`` and ``flatten`` that leave the vocabulary whole."""
    x, *shape = args
    is_flatten = func.__name__ == "flatten"
    if (kwargs and not is_flatten) or not _lazy(x):
        return NotImplemented
    kind = "view" if func is torch.Tensor.view else "reshape"
    if kind == "view" and x._view_of is not None:  # which fails for some strides
        return NotImplemented
    like = torch.empty(x.shape, device="meta")
    if is_flatten:
        shape = like.flatten(*shape, **kwargs).shape
    elif len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = list(shape[0])
    if not shape or not all(isinstance(size, int) for size in shape):
        return NotImplemented
    *leading, last = like.view(shape).shape
    if last != x.shape[-1]:
        return NotImplemented

    def reshaped(rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(*leading, rows.shape[-1])

    return x._view((kind, (*leading, last)), reshaped, together=True)


def _detach(func, args, kwargs):
    if kwargs or len(args) != 1 or not _lazy(args[0]) or torch.compiler.is_compiling():
        return NotImplemented
    with torch.no_grad():
        return args[0]._view(("detach", None))


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
    if not is_lazy(args[0]):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _none_yet(func, args, kwargs):
    return None if is_lazy(args[0]) else NotImplemented


def _register_hook(func, args, kwargs):
    """Kept for the real logits: FSDP hangs hooks on every output, which must not form them."""
    return args[0]._keep_hook(args[1]) if is_lazy(args[0]) else NotImplemented


def named(*names: str) -> list[Callable]:
    """The functions and methods of torch that have these names."""
    places = (torch, torch.Tensor)
    return [getattr(place, name) for name in names for place in places if hasattr(place, name)]


def _handlers() -> dict[Callable, Callable]:
    table: dict[Callable, Callable] = {}

    def put(handler: Callable, functions: list[Callable]) -> None:
        table.update(dict.fromkeys(functions, handler))

    put(partial(_scale, "mul", False), named("mul", "multiply", "__mul__", "__rmul__"))
    put(partial(_scale, "mul", True), named("mul_", "multiply_", "__imul__"))
    divisions = named("div", "divide", "true_divide", "__truediv__", "__div__")
    put(partial(_scale, "div", False), divisions)
    divisions_in_place = named("div_", "divide_", "true_divide_", "__itruediv__", "__idiv__")
    put(partial(_scale, "div", True), divisions_in_place)
    put(partial(_tanh, False), named("tanh"))
    put(partial(_tanh, True), named("tanh_"))
    casts = named("to", "type", "type_as", "float", "double", "half", "bfloat16")
    put(_to, [f for f in casts if isinstance(f, type(torch.Tensor.to))])
    put(partial(_copy, "clone"), named("clone"))
    put(partial(_copy, "contiguous"), [torch.Tensor.contiguous])
    put(_negative, named("neg", "negative", "__neg__"))
    functional, special = nn.functional, torch.special
    log_softmax = [functional.log_softmax, special.log_softmax, *named("log_softmax")]
    put(partial(_form, "log_softmax"), log_softmax)
    softmax = [functional.softmax, special.softmax, *named("softmax")]
    put(partial(_form, "softmax"), softmax)
    put(_exp, named("exp"))
    put(_getitem, [torch.Tensor.__getitem__])
    put(_index_select, named("index_select"))
    put(_pieces, named("unbind", "split", "chunk"))
    put(_reshape, [torch.Tensor.view, *named("reshape", "flatten")])
    put(_detach, named("detach"))
    put(_add_bias, named("add", "__add__", "__radd__"))
    put(_cross_entropy, [nn.functional.cross_entropy])
    put(_register_hook, [torch.Tensor.register_hook])
    attributes = "shape dtype device ndim requires_grad layout is_cuda is_cpu is_meta itemsize"
    attributes += " is_nested is_sparse is_quantized"
    put(_metadata, [getattr(torch.Tensor, name).__get__ for name in attributes.split()])
    for name in ("grad_fn", "_base"):
        put(_none_yet, [vars(torch._C.TensorBase)[name].__get__])
    put(_metadata, named("size", "dim", "ndimension", "numel", "nelement", "get_device"))
    put(_metadata, named("is_floating_point", "is_complex", "element_size", "__len__"))
    return table


_HANDLERS = _handlers()
