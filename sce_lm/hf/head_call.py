"""What an output head multiplies, and how to compute something else inside its call.

A head gives ``hidden @ [weight | low_rank].T + bias``. Of a plain layer ``low_rank`` is None. PEFT
wraps the layer, and then

    LoRA                hidden = [h, s·A h],            low_rank = B          s the adapter's scale
    trainable tokens    hidden = [h, (T - W[ids]) h],   low_rank = onehot(ids)    T the new rows

so that neither ``W + s·B A`` nor a copy of W with other rows is formed, and gradients reach A, B
and T through what autograd knows of these columns. Several adapters stand side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sce_lm.ops.head import Head

Compute = Callable[[torch.Tensor, Head], Any]
"""Of ``[..., d + r]`` hidden states and the head whose result is their product."""


def base_layer(head: Any) -> Any:
    """The layer that adapters are hung around, or what answers for it; ``head`` without any."""
    if _is_lora(head):
        return head.base_layer
    return head.original_module if _is_trainable_tokens(head) else head


def vocab_size(head: Any) -> int:
    """Rows of its weight, which a sharding engine may keep flat or empty between its uses."""
    layer = base_layer(head)
    return layer.weight.shape[0] if layer.weight.dim() == 2 else layer.out_features


def check_linear(head: Any) -> None:
    """Raise one sentence unless ``head(x)``, adapters aside, is a product with a
    :class:`~sce_lm.ops.head.Head`."""
    for part in _parts(head):
        if other_adapter(part) is not None:
            continue
        layer = part.base_layer if _is_adapted(part) else part
        # The weight of a Linear may be flat or empty between its uses: ZeRO-3 shards it so.
        is_linear = type(layer).forward is nn.Linear.forward or _acts_as_linear(layer)
        if not (is_linear and layer.weight.is_floating_point()):
            raise ValueError(
                f"the output head is a {type(layer).__name__}, and apply_sce needs a linear layer "
                "(2-D weight [vocab_size, hidden_size], optional bias, no more than their product)."
            )


def other_adapter(head: Any) -> str | None:
    """The kind of an adapter with which ``head(x)`` is no product with a
    :class:`~sce_lm.ops.head.Head`, or None.

    Of LoRA's variants (DoRA, ...) one that is switched off or merged does not count.
    """
    for part in _parts(head):
        if not _is_adapted(part):
            continue
        if not (_is_lora(part) or _has_tokens(part)):
            return _kind(part)
        if _is_adapted(part.base_layer):  # one adapter around another
            return f"{_kind(part.base_layer)} under a {_kind(part)}"
        if _is_lora(part) and not (part.disable_adapters or part.merged):
            for name in _lora_names(part):
                if name in part.lora_variant:
                    return type(part.lora_variant[name]).__name__.removesuffix("LinearVariant")
    return None


def merged_adapters(head: Any) -> list[str]:
    """Adapters that are merged into the head's weight, which PEFT writes without a new version."""
    return [name for part in _parts(head) for name in getattr(part, "merged_adapters", ())]


def is_plain(head: Any) -> bool:
    """Whether calling ``head``, which is linear, does nothing but use its weight and bias.

    A wrapper (PEFT), hooks (FSDP, accelerate) and shards need the head's own call.
    """
    hooks = (
        head._forward_hooks,
        head._forward_pre_hooks,
        head._backward_hooks,
        head._backward_pre_hooks,
    )
    return (
        not hasattr(type(head), "adapter_layer_names")
        and not any(len(each) for each in hooks)
        and "forward" not in head.__dict__
        and type(head.weight) is nn.Parameter
        and head.weight.dim() == 2
    )


def result_device(head: Any, hidden_states: torch.Tensor) -> torch.device:
    """Where calling ``head`` leaves its result. A model that accelerate spread over devices sends
    the input of each layer to where that layer is."""
    parts = _parts(head)
    for layer in (*map(base_layer, parts), *parts, head):
        hook = getattr(layer, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None and not getattr(each, "io_same_device", False):
                return torch.empty(0, device=device).device
    return hidden_states.device


def call_inside(head: nn.Module, compute: Compute, hidden_states: torch.Tensor) -> Any:
    """``compute`` in place of the forward of the layers that ``head`` calls, so that everything
    hung around those calls (gathering, casting, offloading) happens.

    FSDP also casts what a head gives (``output_dtype``). That is meant for logits: a loss that was
    computed here keeps its dtype.
    """
    computed: list[Any] = []

    def keep(hidden: torch.Tensor, product: Head) -> Any:
        computed.append(compute(hidden, product))
        return computed[-1]

    with ExitStack() as stack:
        for part in _parts(head):
            stack.enter_context(_forward(part, _inside(part, keep)))
        result = head(hidden_states)
    return _as_computed(result, computed[-1])


def _as_computed(result: Any, computed: Any) -> Any:
    if type(computed) is tuple:
        return tuple(map(_as_computed, result, computed))
    if isinstance(computed, torch.Tensor) and result.dtype != computed.dtype:
        return computed.to(result.device)
    return result


def _inside(part: Any, compute: Compute) -> Callable[..., Any]:
    def forward(hidden: torch.Tensor, adapter_names: Any = None, **for_variants: Any) -> Any:
        if adapter_names is not None:
            raise ValueError(
                "adapter_names mixes several adapters in one batch, which a loss of apply_sce does "
                "not; compute the loss of each adapter's rows by itself, or pass no labels."
            )
        if _is_lora(part):
            return _lora(part, hidden, compute)
        if _has_tokens(part):
            return _trainable_tokens(part, hidden, compute)
        return compute(hidden, Head(part.weight, None, part.bias))

    return forward


def _lora(layer: Any, hidden: torch.Tensor, compute: Compute) -> Any:
    names = _active_lora(layer)
    low = []
    for name in names:
        a = layer.lora_A[name]
        x = layer.lora_dropout[name](hidden.to(a.weight.dtype))
        low.append(a(x) * layer.scaling[name])
    base, factors = layer.base_layer, [layer.lora_B[name] for name in names]

    def product(h: torch.Tensor, *u: torch.Tensor) -> Any:
        bias = base.bias
        for b, name in zip(factors, names):
            if b.bias is not None:
                extra = b.bias * layer.scaling[name]
                bias = extra if bias is None else bias + extra
        low_rank = _side_by_side([b.weight for b in factors])
        hidden = torch.cat([h, *u], dim=-1) if u else h
        return compute(hidden, Head(base.weight, low_rank, bias))

    return _call_all([(base, hidden), *zip(factors, low)], product)


def _active_lora(layer: Any) -> list[str]:
    """Names of the adapters that take part in ``layer(x)``."""
    if layer.disable_adapters or layer.merged:
        if layer.disable_adapters and layer.merged:
            layer.unmerge()  # as its own forward does
        return []
    return _lora_names(layer)


def _lora_names(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _trainable_tokens(layer: Any, hidden: torch.Tensor, compute: Compute) -> Any:
    base, names = layer.base_layer, layer.active_adapters
    is_off = layer.disable_adapters or not names
    if is_off and layer.merged:
        layer.unmerge()  # as its own forward does

    def product(h: torch.Tensor) -> Any:
        weight = base.weight
        if is_off or layer.merged:
            return compute(h, Head(weight, None, base.bias))
        # PEFT leaves the bias out of a head with trainable tokens.
        ids = torch.cat([torch.tensor(layer.token_indices[name]) for name in names])
        ids = ids.to(weight.device)
        if len(ids) >= weight.shape[1]:  # more columns than the weight itself has
            return compute(h, Head(layer.get_merged_weights(names)))
        rows = torch.cat([layer.trainable_tokens_delta[name] for name in names])
        one_hot = weight.new_zeros(len(weight), len(ids))
        one_hot[ids, torch.arange(len(ids), device=ids.device)] = 1.0
        with torch.autocast(h.device.type, enabled=False):
            u = h.float() @ (rows.float() - weight[ids].float()).T
        return compute(torch.cat([h, u.to(_wider(h))], dim=-1), Head(weight, one_hot))

    return _call_all([(base, hidden)], product)


def _wider(h: torch.Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def _side_by_side(tensors: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.cat(tensors, dim=1) if len(tensors) > 1 else next(iter(tensors), None)


def _call_all(
    calls: list[tuple[Any, torch.Tensor]], compute: Callable[..., Any], *seen: torch.Tensor
) -> Any:
    """``compute(*inputs)`` inside the nested calls of all layers, with what each of them got."""
    if not calls:
        return compute(*seen)
    (layer, x), *others = calls
    with _forward(layer, lambda x: _call_all(others, compute, *seen, x)):
        return layer(x)


@contextmanager
def _forward(layer: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling ``layer`` runs ``forward`` between its hooks."""
    # accelerate's device hooks replace `forward` themselves and keep the layer's own here.
    slot = "_old_forward" if "_old_forward" in layer.__dict__ else "forward"
    before = layer.__dict__.get(slot)
    layer.__dict__[slot] = forward
    try:
        yield
    finally:
        if before is None:
            del layer.__dict__[slot]
        else:
            layer.__dict__[slot] = before


# Layers of PEFT are told by their parts: it is not imported for models that have none.


def _parts(head: Any) -> list[Any]:
    """The layers of which calling ``head`` calls exactly one.

    PEFT's ModulesToSaveWrapper holds the original layer and a trained one for each adapter.
    """
    if _is_adapted(head) and "modules_to_save" in head._modules:
        return [head.original_module, *head.modules_to_save.values()]
    return [head.token_adapter] if _is_trainable_tokens(head) else [head]


def _is_adapted(layer: Any) -> bool:
    return hasattr(type(layer), "adapter_layer_names")


def _is_lora(layer: Any) -> bool:
    # AdaLoRA keeps bare parameters under this name, of another product.
    return _is_adapted(layer) and isinstance(layer._modules.get("lora_A"), nn.ModuleDict)


def _is_trainable_tokens(head: Any) -> bool:
    return _is_adapted(head) and "token_adapter" in head._modules


def _has_tokens(layer: Any) -> bool:
    return "trainable_tokens_delta" in getattr(layer, "_modules", {})


def _kind(layer: Any) -> str:
    """The method of an adapter's layer. PEFT has about forty layers named Linear, each in a package
    that is named by its method."""
    return type(layer).__module__.removeprefix("peft.tuners.").split(".")[0]


def _acts_as_linear(part: Any) -> bool:
    """Whether a head of another class gives what nn.Linear gives, on a few random inputs."""
    weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or weight.is_meta:
        return False
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[1], generator=noise).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            got = part(x)
        except (RuntimeError, TypeError, ValueError):
            return False
        want = nn.functional.linear(x, weight, bias)
    return got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-5)
