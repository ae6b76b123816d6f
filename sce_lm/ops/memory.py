"""Memory for gradients of the size of the head, and the one full read of it."""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch.nn.functional import one_hot
from torch.utils.weak import WeakTensorKeyDictionary

TILE_ELEMENTS = 2**22
"""Elements of the weight summed at a time."""

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


def row_sum(weight: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of the rows of ``weight [V, d]``, or of those at ``ids [M]``, fp64 ``[d]``."""
    if ids is None:
        return _tiled_product(weight, weight.new_ones(1, 1).expand(1, len(weight)))[0]
    total = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    for some in ids.split(max(1, TILE_ELEMENTS // weight.shape[1])):
        total += row_sum(weight.detach().index_select(0, some))
    return total


def row_sums(weight: torch.Tensor, stratum_of: torch.Tensor, num_strata: int) -> torch.Tensor:
    """:func:`row_sum` of each stratum, fp64 ``[num_strata, d]``; ``stratum_of [V]`` is int64."""
    return _tiled_product(weight, one_hot(stratum_of, num_strata).to(weight.dtype).T)


def _tiled_product(weight: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """``members [S, V] @ weight`` in fp64. Tiles are products in fp32 (fp64 for an fp64 weight),
    which read memory faster than a reduction does."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    tile = max(1, min(len(weight), TILE_ELEMENTS // weight.shape[1]))
    total = weight.new_zeros(len(members), weight.shape[1], dtype=torch.float64)
    for rows, of in zip(weight.detach().split(tile), members.split(tile, dim=1)):
        total += of.to(dtype) @ rows.to(dtype)
    return total
