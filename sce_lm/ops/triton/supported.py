"""Which inputs the kernels take."""

from __future__ import annotations

import torch
from triton import knobs

from sce_lm.ops.triton.configurations import DTYPES, architecture_of


def inputs_supported(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> str | None:
    """Why the kernels cannot take hidden states and an output head; None if they can.

    They run on CUDA and ROCm devices of the architectures in
    :mod:`~sce_lm.ops.triton.configurations`, and on the CPU under ``TRITON_INTERPRET=1``.
    """
    if hidden.device.type == "cuda":
        if architecture_of(hidden.device) is None:
            return "this device has no launch configurations"
    elif not (hidden.device.type == "cpu" and knobs.runtime.interpret):
        return f"tensors on {hidden.device.type!r} need a GPU, or TRITON_INTERPRET=1"
    if weight.device != hidden.device:
        return f"hidden states are on {hidden.device} and the weight is on {weight.device}"
    if hidden.dtype not in DTYPES:
        return f"{hidden.dtype} is not one of " + ", ".join(map(str, DTYPES))
    if weight.dtype != hidden.dtype:
        return f"hidden states are {hidden.dtype} and the weight is {weight.dtype}"
    if bias is not None and bias.dtype not in DTYPES:
        return f"a bias of {bias.dtype} is not one of " + ", ".join(map(str, DTYPES))
    if hidden.stride(-1) != 1 or weight.stride(-1) != 1:
        return "the rows of hidden states and weight must be contiguous"
    if len(weight) >= 2**31:
        return f"{len(weight)} classes do not fit an int32 id"
    return None
