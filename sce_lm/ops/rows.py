"""Rows of the head and their gradient; a bias is one more column of W, met by a 1 in h."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from sce_lm.ops.memory import gradient_memory


def take_rows(
    weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor | slice, dtype: torch.dtype
) -> torch.Tensor:
    """``[n, d]`` rows of ``weight [V, d]`` in ``dtype``; ``[n, d + 1]`` with a bias."""
    # index_select is several times as fast as weight[ids] on a CPU.
    rows = weight[ids] if isinstance(ids, slice) else weight.index_select(0, ids)
    if bias is None:
        return rows.to(dtype)
    return torch.cat([rows.to(dtype), bias[ids, None].to(dtype)], dim=1)


def with_one(hidden: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Hidden states ``[N, d]`` in ``dtype``, with a 1 as one more column if there is a bias."""
    h = hidden.to(dtype)
    return h if bias is None else pad(h, (0, 1), value=1.0)


def dense_gradient(
    like: torch.Tensor,
    ids: torch.Tensor,
    rows: torch.Tensor,
    everywhere: torch.Tensor | None = None,
) -> torch.Tensor:
    """``rows`` at ``ids`` and ``everywhere`` (None: 0) at all others, cast to the dtype of ``like``
    and in its shape."""
    full = gradient_memory(like, like.dtype)
    full = full.zero_() if everywhere is None else full.copy_(everywhere)
    return full.index_copy_(0, ids, rows.to(like.dtype))


def sparse_gradient(like: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows`` at the distinct ascending ``ids`` as a coalesced sparse tensor like ``like``."""
    return torch.sparse_coo_tensor(
        ids.unsqueeze(0),
        rows.to(like.dtype),
        like.shape,
        is_coalesced=True,
        check_invariants=False,
    )
