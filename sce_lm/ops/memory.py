"""Memory for gradients of the size of the head, and the one full read of it."""

from __future__ import annotations

import numpy as np
import torch

TILE_ELEMENTS = 2**22
"""Elements of the weight summed at a time."""


def large_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised tensor for a result of hundreds of megabytes.

    On a CPU most of the time of writing a dense gradient goes into page faults. NumPy asks the
    kernel for huge pages where it may, which torch's own allocator does not: 519 MiB took 0.05 s
    instead of 0.125 s. Now and then the kernel has to make room for them first (0.4 s, once in
    fifteen such calls on a machine that had been busy for hours), which is less on average still.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.empty(count, dtype=np.uint8)).view(dtype).view(shape)


def row_sum(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of the rows of ``weight [V, d]``, and of ``bias [V]`` as one more number.

    Returns:
        fp64 ``[d]``, or ``[d + 1]`` with a bias. Tiles are summed as products with a row of ones,
        in fp32 (fp64 for an fp64 weight), which reads memory faster than a reduction does.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    tile = max(1, TILE_ELEMENTS // weight.shape[1])
    ones = weight.new_ones(1, tile, dtype=dtype)
    total = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    for rows in weight.detach().split(tile):
        total += (ones[:, : len(rows)] @ rows.to(dtype)).squeeze(0)
    if bias is None:
        return total
    return torch.cat([total, bias.detach().sum(dtype=torch.float64).unsqueeze(0)])
