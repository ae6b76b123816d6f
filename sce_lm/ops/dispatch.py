"""Which implementation of an operation runs: PyTorch's, or Triton kernels on a GPU.

The kernels are written for some devices, dtypes and layouts; a predicate beside each of them says
why it cannot take its inputs. The choice is made here, by each operation, at each call.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch

Backend = Literal["auto", "torch", "triton"]
"""Triton kernels where they can run on a GPU, and PyTorch elsewhere; always PyTorch; always the
kernels."""

MODULES = {
    "candidate_cross_entropy": "candidate_cross_entropy",
    "catalogue_topk": "catalogue_scan",
    "chunk_cross_entropy": "chunk_cross_entropy",
    "exact_cross_entropy": "exact_cross_entropy",
    "priority_sample": "priority_sample",
    "row_reductions": "row_reductions",
}
"""Operations that have kernels, and the module of :mod:`sce_lm.ops.triton` that holds them."""


def kernels(
    operation: str, backend: Backend, device: torch.device, *inputs: Any
) -> Callable[..., Any] | None:
    """The operation by Triton kernels, or None where PyTorch is to run it.

    Args:
        operation: its name in PyTorch.
        backend: what was asked for.
        device: of the inputs.
        inputs: what the operation's predicate looks at.

    Raises:
        ValueError: backend "triton", and the kernels cannot run.
    """
    if backend == "torch" or (backend == "auto" and device.type == "cpu"):
        return None
    reason, found = _find(operation, *inputs)
    if reason is not None and backend == "triton":
        raise ValueError(
            f'{operation} cannot run with backend="triton": {reason}; use backend="auto", which '
            "takes PyTorch there."
        )
    return found if reason is None else None


def _find(operation: str, *inputs: Any) -> tuple[str | None, Callable[..., Any] | None]:
    """Why the kernels cannot run, and the function that runs them."""
    if operation not in MODULES:
        return "it has no kernels", None
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed", None
    module = importlib.import_module(f"sce_lm.ops.triton.{MODULES[operation]}")
    return getattr(module, f"{operation}_supported")(*inputs), getattr(module, operation)
