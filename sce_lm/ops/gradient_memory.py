"""Memory for gradients of the size of the head, and the one full read of it."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

TILE_ELEMENTS, DEVICE_TILE_ELEMENTS = 2**22, 2**26
"""Elements of the weight that are worked on at a time; a device needs few launches."""

_kept = WeakTensorKeyDictionary()
"""Weight to the ``np.ndarray`` that holds its last gradient. NumPy's memory, because its arrays
count their references, and because it asks for huge pages."""


def _references() -> int:
    """References to an array that one local name holds, as this interpreter counts them."""
    memory = np.empty(0)
    return sys.getrefcount(memory)


_UNSHARED = _references()


def gradient_memory(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised tensor in the shape of ``weight``, for its gradient.

    On a CPU most of the time of writing a dense gradient goes into page faults: 640 MiB take 0.15 s
    in new memory and 0.04 s in memory that was used before (up to 0.8 s where a virtual machine has
    handed free pages back to its host meanwhile). So the memory of the last gradient of a weight is
    kept with the weight, and taken again as soon as no tensor holds it any more, that is, after
    ``zero_grad()``. It is freed with the weight.
    """
    if weight.device.type != "cpu":
        return torch.empty(weight.shape, dtype=dtype, device=weight.device)
    size = weight.numel() * dtype.itemsize
    memory = _kept.pop(weight, None)
    # A tensor that was made of the array holds a reference to it for as long as it lives.
    if memory is None or memory.nbytes != size or sys.getrefcount(memory) > _UNSHARED:
        memory = np.empty(size, dtype=np.uint8)
    _kept[weight] = memory
    return torch.from_numpy(memory).view(dtype).view(weight.shape)


def tile_rows(elements: int, width: int, device: torch.device) -> int:
    """Rows of a tile of so many elements, or on a device of ``DEVICE_TILE_ELEMENTS``."""
    elements = elements if device.type == "cpu" else DEVICE_TILE_ELEMENTS
    return max(1, elements // max(1, width))


def add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``out += left.T @ right`` in place, rounded once to the dtype of ``out``.

    Args:
        out: ``[V, d]`` or ``[V]``.
        left, right: ``[C, V]`` and ``[C, d]`` or ``[C]``, in one dtype.
    """
    out, right = out.view(len(out), -1), right.reshape(len(right), -1)
    if out.dtype == left.dtype:
        out.addmm_(left.T, right)
        return
    step = tile_rows(TILE_ELEMENTS, out.shape[1], out.device)
    for start in range(0, len(out), step):
        out[start : start + step].add_(left[:, start : start + step].T @ right)


def row_sum(weight: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of the rows of ``weight [V, d]``, or of those at ``ids [M]``, fp64 ``[d]``.

    Tiles are products in fp32 (fp64 for an fp64 weight), which read memory faster than a reduction
    does.
    """
    weight, width = weight.detach(), weight.shape[1]
    tile = max(1, TILE_ELEMENTS // width)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = weight.new_zeros(1, width, dtype=torch.float64)
    if ids is None:
        parts = weight.split(tile)
    else:
        parts = (weight.index_select(0, some) for some in ids.split(tile))
    for rows in parts:
        total += rows.new_ones(1, len(rows), dtype=dtype) @ rows.to(dtype)
    return total[0]
