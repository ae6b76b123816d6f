"""Which inputs the kernels take."""

from __future__ import annotations

import torch
from triton import knobs

from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.triton.configurations import DTYPES, architecture_of


def device_supported(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None if they can.

    They run on CUDA and ROCm devices of the architectures in
    :mod:`~sce_lm.ops.triton.configurations`, and on the CPU under ``TRITON_INTERPRET=1``.
    """
    if architecture_of(device) is not None or (device.type == "cpu" and knobs.runtime.interpret):
        return None
    if device.type == "cuda":
        return "this device has no launch configurations"
    return f"tensors on {device.type!r} need a GPU, or TRITON_INTERPRET=1"


def losses_supported(head: Head, positions: Positions) -> str | None:
    """Why the kernels cannot take an output head and positions; None if they can."""
    return products_supported(head, positions.hidden)


def products_supported(head: Head, hidden: torch.Tensor) -> str | None:
    """Why the kernels cannot multiply an output head and ``[N, d]`` vectors; None if they can.

    The operands of a product have one dtype: hidden states are widened to that of the weight.
    """
    weight, low_rank, bias = head.tensors
    reason = device_supported(hidden.device)
    if reason is not None:
        return reason
    if low_rank is not None:
        return "the head has a low-rank operand, which they do not take"
    if weight.device != hidden.device:
        return f"hidden states are on {hidden.device} and the weight is on {weight.device}"
    if weight.dtype not in DTYPES:
        return f"a weight of {weight.dtype} is not one of " + ", ".join(map(str, DTYPES))
    if torch.promote_types(hidden.dtype, weight.dtype) != weight.dtype:
        return f"hidden states are {hidden.dtype} and the weight is {weight.dtype}"
    if bias is not None and bias.dtype not in DTYPES:
        return f"a bias of {bias.dtype} is not one of " + ", ".join(map(str, DTYPES))
    if hidden.stride(-1) != 1 or weight.stride(-1) != 1:
        return "the rows of hidden states and weight must be contiguous"
    if len(weight) >= 2**31:
        return f"{len(weight)} classes do not fit an int32 id"
    return None


def contiguous(*tensors: torch.Tensor | None) -> list:
    """Lists and vectors as the kernels read them, which know no stride of theirs."""
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]
