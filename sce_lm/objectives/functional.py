"""SCE as one function call."""

from __future__ import annotations

from typing import Any

import torch

from sce_lm.candidates.state import SCEState
from sce_lm.config import SCEConfig
from sce_lm.objectives.base import Reduction
from sce_lm.objectives.sce import SCE
from sce_lm.ops.logits import LogitTransform


def sce_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    post: LogitTransform = LogitTransform(),
    config: SCEConfig = SCEConfig(),
    state: SCEState | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    num_items_in_batch: torch.Tensor | int | None = None,
    return_stats: bool = False,
) -> Any:
    """Scalable Cross-Entropy of ``softmax(post(hidden_states @ weight.T + bias))``.

    Args:
        hidden_states: ``[..., d]``; fp16, bf16, fp32 or fp64.
        weight: ``[V, d]``.
        labels: ``[...]`` int64, ALIGNED with ``hidden_states``: no shift is made here.
        config: corrected SCE by default; ``SCEConfig.published()`` for the published form.
        state: label counts and running averages kept between calls. None: the prior comes from
            this call's labels and the uniform floor.

    The other arguments, the result and the errors are those of
    :meth:`sce_lm.objectives.Objective.__call__`.
    """
    return SCE(config, state)(
        hidden_states,
        weight,
        labels,
        bias=bias,
        post=post,
        generator=generator,
        reduction=reduction,
        ignore_index=ignore_index,
        num_items_in_batch=num_items_in_batch,
        return_stats=return_stats,
    )
