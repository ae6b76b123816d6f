"""Objectives under `torch.compile`: one operator in the graph, and eager code inside it.

An objective counts labels, draws seeds and picks candidates of data-dependent number, which no
compiler can trace. A traced call becomes the operator ``sce_lm::head_loss``, whose kernel runs the
objective as always, on the values that the graph has computed by then. Numbers, memory and state
are those of eager code.

A kernel runs below autograd. This one turns autograd on again, on detached inputs, so that the
objective records its own graph, which the backward operator goes through. That graph lives as long
as the *ticket*, a second result of 8 bytes that autograd saves: its memory is the Python object
that holds the graph. What the graph has saved of the inputs is replaced by what the backward
operator gets: the compiler may have used the memory of the forward pass for something else.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.logits import LogitTransform

ONE_GRAPH = torch.__version__ >= "2.13"
"""Whether this torch's compiler takes an objective as a constant of its graph. An older one breaks
its graph at the loss, which is then eager code: the same numbers, state and memory."""

outside_graphs: Any = torch.compiler.disable
"""Decorates code that a compiler leaves as it is, breaking its graph there."""

Loss = Callable[..., torch.Tensor]
"""Called as an objective is, without ``generator`` and ``return_stats``."""

_losses: dict[int, Callable[[], Loss | None]] = {}


def refuse_export() -> None:
    """Raise one sentence if ``torch.export`` is tracing."""
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "torch.export met a loss of sce_lm, which is Python code with a state and cannot be "
            "part of an exported program; export the model without labels, or after "
            "remove_sce(model)."
        )


def can_trace(
    config: Any, generator: torch.Generator | None = None, return_stats: bool = False
) -> bool:
    """Whether a call can be an operator: generators, statistics and sparse gradients cannot go
    through one, and such a call is made outside the graph."""
    is_sparse = getattr(config, "sparse_grad", False)
    return ONE_GRAPH and generator is None and not (is_sparse or return_stats)


def register(get_loss: Callable[[], Loss | None]) -> int:
    """The number by which operators find a loss: ``get_loss`` gives it at each call, and should
    hold what has state weakly."""
    number = len(_losses)
    _losses[number] = get_loss
    return number


def head_loss(
    number: int,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    post: LogitTransform = LogitTransform(),
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items_in_batch: torch.Tensor | int | None = None,
    token_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss registered under ``number``, as one operator of the graph that is being traced.

    Raises:
        RuntimeError: ``torch.export`` is tracing.
    """
    refuse_export()
    if num_items_in_batch is not None:
        num_items_in_batch = torch.as_tensor(num_items_in_batch)
    inputs = (hidden_states, weight, bias)
    with_grad = torch.is_grad_enabled()
    needs = [with_grad and t is not None and t.requires_grad for t in inputs]
    return _head_loss(
        hidden_states,
        weight,
        bias,
        labels,
        num_items_in_batch,
        token_weights,
        needs,
        number,
        post.scale,
        post.soft_cap,
        reduction,
        ignore_index,
    )[0]


Inputs = list[torch.Tensor | None]


class _Call(bytearray):
    """A forward pass that awaits its backward pass; its 8 bytes hold its number."""

    number = itertools.count()

    def __init__(self, loss: torch.Tensor, leaves: Inputs, saved: Inputs) -> None:
        number = next(_Call.number)
        super().__init__(number.to_bytes(8, sys.byteorder))
        self.loss = loss
        self.leaves = [x for x in leaves if x is not None and x.requires_grad]
        self.saved = saved
        """Filled for as long as a backward pass runs."""
        _calls[number] = self

    def ticket(self) -> torch.Tensor:
        """``[1]`` int64 whose memory is this object, so that it lives as long as the tensor."""
        return torch.frombuffer(self, dtype=torch.int64)


_calls: weakref.WeakValueDictionary[int, _Call] = weakref.WeakValueDictionary()


@torch.library.custom_op(
    "sce_lm::head_loss",
    mutates_args=(),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe),
)
def _head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    num_items: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    needs: list[bool],
    number: int,
    scale: float,
    soft_cap: float | None,
    reduction: str,
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    # The state may keep labels for longer than the graph keeps their memory.
    labels = labels.clone()
    token_weights = None if token_weights is None else token_weights.clone()
    inputs = _contiguous(hidden, weight, bias)
    replaced: Inputs = []

    def pack(saved: torch.Tensor) -> Any:
        for i, x in enumerate(inputs):
            if x is not None and _share_memory(saved, x):
                offset = saved.storage_offset() - x.storage_offset()
                return i, saved.size(), saved.stride(), offset
        return saved

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        i, size, stride, offset = packed
        x = replaced[i]
        assert x is not None
        return x.as_strided(size, stride, offset + x.storage_offset())

    # Leaving inference mode brings back the autograd that a kernel is run without.
    with torch.inference_mode(False), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        leaves = [x if x is None else x.detach() for x in inputs]
        for x, need in zip(leaves, needs):
            if x is not None:
                x.requires_grad_(need)
        loss_of = _losses[number]()
        assert loss_of is not None  # the graph is guarded by it
        with torch.set_grad_enabled(any(needs)):
            loss = loss_of(
                leaves[0],
                leaves[1],
                labels,
                bias=leaves[2],
                post=LogitTransform(scale, soft_cap),
                reduction=reduction,
                ignore_index=ignore_index,
                num_items_in_batch=num_items,
                token_weights=token_weights,
            )
    return loss.detach(), _Call(loss, leaves, replaced).ticket()


@_head_loss.register_fake
def _(hidden, weight, bias, labels, *options):
    reduction = options[-2]
    shape = labels.shape if reduction == "none" else ()
    loss = hidden.new_empty(shape, dtype=compute_dtype(hidden, weight))
    return loss, torch.empty(1, dtype=torch.int64, device="cpu")


@torch.library.custom_op("sce_lm::head_loss_backward", mutates_args=())
def _head_loss_backward(
    grad: torch.Tensor,
    ticket: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    needs: list[bool],
) -> list[torch.Tensor]:
    call = _calls[int(ticket)]
    call.saved.extend(_contiguous(hidden, weight, bias))
    try:
        # Kept, so that a second backward pass works where it does in eager code.
        found = torch.autograd.grad(
            call.loss, call.leaves, grad, retain_graph=True, materialize_grads=True
        )
    finally:
        call.saved.clear()
    return [g.contiguous() for g in found]


@_head_loss_backward.register_fake
def _(grad, ticket, hidden, weight, bias, needs):
    return [x.new_empty(x.shape) for x, need in zip((hidden, weight, bias), needs) if need]


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, _, _, _, needs, *_ = inputs
    ctx.needs = needs
    ctx.save_for_backward(output[1], hidden, weight, bias)


def _backward(ctx, grad, _):
    found = iter(_head_loss_backward(grad, *ctx.saved_tensors, ctx.needs))
    gradients = [next(found) if need else None for need in ctx.needs]
    return *gradients, *[None] * 9


_head_loss.register_autograd(_backward, setup_context=_setup_context)


def _contiguous(*tensors: torch.Tensor | None) -> Inputs:
    return [x if x is None else x.contiguous() for x in tensors]


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() > 0 and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
