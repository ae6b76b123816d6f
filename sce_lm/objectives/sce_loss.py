"""SCE as one function call."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from sce_lm.candidates.state import SCEState
from sce_lm.config import PublishedSCEConfig, SCEConfig
from sce_lm.objectives.base import Reduction
from sce_lm.objectives.compile_operator import can_trace, head_loss, outside_graphs, register
from sce_lm.objectives.published_sce import PublishedSCE
from sce_lm.objectives.sce import SCE
from sce_lm.ops.logits import LogitTransform


def sce_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    post: LogitTransform = LogitTransform(),
    config: SCEConfig | PublishedSCEConfig = SCEConfig(),
    state: SCEState | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    num_items_in_batch: torch.Tensor | int | None = None,
    token_weights: torch.Tensor | None = None,
    return_stats: bool = False,
) -> Any:
    """Scalable Cross-Entropy of ``softmax(post(hidden_states @ weight.T + bias))``.

    Args:
        hidden_states: ``[..., d]``; fp16, bf16, fp32 or fp64.
        weight: ``[V, d]``.
        labels: ``[...]`` int64, ALIGNED with ``hidden_states``: no shift is made here.
        config: SCE (default) as it is; ``SCEConfig.published()`` for the published form.
        state: label counts and running averages kept between calls. None: the prior comes from
            this call's labels and the uniform floor.

    The other arguments, the result and the errors are those of
    :meth:`sce_lm.objectives.Objective.__call__`.
    """
    options: dict[str, Any] = {
        "bias": bias,
        "post": post,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "num_items_in_batch": num_items_in_batch,
        "token_weights": token_weights,
    }
    if torch.compiler.is_compiling() and can_trace(config, generator, return_stats):
        return head_loss(_number_of(config, state), hidden_states, weight, labels, **options)
    options |= {"generator": generator, "return_stats": return_stats}
    return _eagerly(config, state, hidden_states, weight, labels, **options)


@outside_graphs
def _eagerly(
    config: SCEConfig | PublishedSCEConfig,
    state: SCEState | None,
    *inputs: Any,
    **options: Any,
) -> Any:
    return _objective(config, state)(*inputs, **options)


def _objective(
    config: SCEConfig | PublishedSCEConfig, state: SCEState | None
) -> SCE | PublishedSCE:
    if isinstance(config, PublishedSCEConfig):
        return PublishedSCE(config, state)
    return SCE(config, state)


@torch.compiler.assume_constant_result
def _number_of(config: SCEConfig | PublishedSCEConfig, state: SCEState | None) -> int:
    if state is None:
        return register(lambda: _objective(config, None))
    owner = weakref.ref(state)
    return register(lambda: _objective(config, owner()))
