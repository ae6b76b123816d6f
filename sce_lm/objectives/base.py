"""What every objective shares: the call, its checks, ignored labels, reductions and statistics."""

from __future__ import annotations

import dataclasses
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from sce_lm.candidates.masks import is_masked, masks_nothing, within_reach
from sce_lm.candidates.state import SCEState
from sce_lm.config import ObjectiveConfig
from sce_lm.objectives.call import Call
from sce_lm.objectives.chosen_sizes import Choice, table
from sce_lm.objectives.compile_operator import can_trace, head_loss, outside_graphs, register
from sce_lm.objectives.labels import valid_mask, valid_positions
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.mean_logits import mean_logits
from sce_lm.ops.positions import Positions
from sce_lm.ops.static_shapes import needs_static_shapes

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a call saw, for logs and for judging whether there were enough candidates."""

    num_valid: int
    """Positions whose label is not ``ignore_index``."""
    coverage: float = 1.0
    """Share of the valid positions that were trained; below 1 only for published SCE."""
    products_per_position: float = 0.0
    """Inner products of width d in the forward pass, per valid position (scan included)."""
    covered: torch.Tensor | None = None
    """Bool, the shape of ``labels``: positions that were trained. None: all valid ones."""
    relative_error: torch.Tensor | None = None
    """Estimated standard deviation of Zhat over Zhat, the shape of ``labels``, 0 where ignored.
    None where it is not estimated. Mass that was never drawn is not seen."""
    correct: torch.Tensor | None = None
    """Bool, the shape of ``labels``: the label has the largest logit of all. Exact loss only."""
    confidence: torch.Tensor | None = None
    """Largest probability of all classes, the shape of ``labels``, 0 where ignored. Exact loss
    only."""
    candidates: torch.Tensor | None = None
    """Ids of the classes that some position was compared with, ascending; its label, where that is
    no candidate, aside. Only where statistics were asked for; None: all classes."""


class Objective(ABC):
    """A training loss over a linear head, called as :func:`sce_lm.sce_loss` is.

    A subclass implements :meth:`compute`, on positions that all have a label unless it says that
    its shapes can be static.
    """

    name: str
    """Its name in :func:`sce_lm.objectives.get`."""
    config_class: type[ObjectiveConfig]
    """The dataclass of its options."""
    config: ObjectiveConfig
    """Its frozen configuration."""
    state: SCEState | None = None
    """What it remembers between calls, or None."""
    vocab_size: int | None = None
    """V, where a call's ``weight`` holds only some of the rows; None: it holds them all."""

    def __init__(self, config: Any = None) -> None:
        self.config = self.config_class() if config is None else config

    @abstractmethod
    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        """The weighted sum of losses (or ``[N]`` losses), the smoothing's mean logit aside, and
        statistics with ``[N]`` fields."""

    def mean_logits(self, head: Head, positions: Positions) -> torch.Tensor:
        """``[N]`` mean logit over all classes, which label smoothing takes its share of.

        Raises:
            ValueError: it cannot be had at a bearable cost.
        """
        return mean_logits(head, positions)

    def nothing(self, head: Head, positions: Positions, call: Call) -> torch.Tensor:
        """The loss where no position has a label (N = 0): a zero that is connected to the graph."""
        is_sparse = getattr(self.config, "sparse_grad", False)
        return connected_zero(head, positions.hidden, is_sparse)

    def begin(
        self, call: Call, head: Head, positions: Positions, generator: torch.Generator | None
    ) -> Call:
        """The call once its labels are known: with a seed, and counted, if there is a state."""
        if self.state is None:
            return call
        labels, is_valid = positions.labels, positions.is_valid
        return call.begin(self.state, labels, head.vocab_size, generator, is_valid)

    def has_static_shapes(self, head: Head) -> bool:
        """Whether :meth:`compute` can depend on data in no shape and no branch, and takes positions
        some of which have no label; else they are left out, and a device is waited for."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Name and options as JSON-able values; ``objectives.from_dict(d)`` builds it again."""
        return {"name": self.name, **dataclasses.asdict(self.config)}

    def sizes_chosen(self) -> dict[str, Choice]:
        """What "auto" chose for the latest call, and why, by the name of the option; empty where
        nothing is chosen."""
        return {}

    def __str__(self) -> str:
        chosen = self.sizes_chosen()
        if not chosen:
            return f"{self.name}: {self.config!r}"
        return f"{self.name}, as in its latest call:\n{table(chosen)}"

    def largest_of(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of this and what other holders of the head's rows have; here there are
        none."""
        return x

    def advice(self) -> str | None:
        """One sentence on what should be changed, by the calls so far, or None."""
        return None

    def end_step(self, device: torch.device) -> None:  # noqa: B027 (nothing to share by default)
        """Called once an optimiser step on every process, with labels or without: the place for
        what processes share, in a number of collectives that does not depend on data."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        low_rank: torch.Tensor | None = None,
        post: LogitTransform = LogitTransform(),
        generator: torch.Generator | None = None,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        num_items_in_batch: torch.Tensor | int | None = None,
        token_weights: torch.Tensor | None = None,
        return_stats: bool = False,
    ) -> Any:
        """The loss of ``softmax(post(hidden_states @ weight.T + bias))`` against ``labels``.

        Args:
            hidden_states: ``[..., d]``; fp16, bf16, fp32 or fp64. ``[..., d + r]`` with
                ``low_rank``.
            weight: ``[V, d]``; its own dtype may differ from that of ``hidden_states``.
            labels: ``[...]`` int64, aligned with ``hidden_states`` (no shift is made here).
            bias: ``[V]`` or None.
            low_rank: ``[V, r]`` or None: B of a head ``weight + scale·B @ A`` that is never formed.
                Beside the d hidden states then stand the r numbers that meet B,
                ``torch.cat([h, scale * h @ A.T], -1)``, and gradients reach A through them. The
                gradient of B is dense.
            post: what the model does to its raw logits.
            generator: CPU generator that gives the seed of this call's draws; None: torch's own.
            reduction: "mean" over valid positions, "sum", or "none" (``[...]``, 0 where ignored).
            ignore_index: label of positions that are left out.
            num_items_in_batch: the sum is divided by this instead, as transformers does over
                accumulated batches; goes with reduction "mean" or "sum".
            token_weights: ``[...]`` factors on the positions' losses, finite and not negative, as
                ``labels`` aligned; no gradient goes to them. "mean" and ``num_items_in_batch``
                count positions whatever they weigh; for a weighted mean pass
                ``num_items_in_batch=token_weights.sum()``.
            return_stats: also return :class:`Statistics`.

        Returns:
            The loss in fp32 (fp64 for fp64 inputs), or loss and statistics. If every label is
            ignored: zeros that are connected to the graph.

        Raises:
            ValueError: shapes that do not fit, a label outside ``[0, V)``, a weight that is
                negative or not finite, an unknown reduction.
            TypeError: labels that are not integers.
        """
        options: dict[str, Any] = {
            "reduction": reduction,
            "ignore_index": ignore_index,
            "num_items_in_batch": num_items_in_batch,
            "token_weights": token_weights,
        }
        traceable = low_rank is None and can_trace(self.config, generator, return_stats)
        if torch.compiler.is_compiling() and traceable:
            options |= {"bias": bias, "post": post}
            return head_loss(_number_of(self), hidden_states, weight, labels, **options)
        options |= {"generator": generator, "return_stats": return_stats}
        head = Head(weight, low_rank, bias, post)
        return self._call_eagerly(head, hidden_states, labels, **options)

    @outside_graphs
    def _call_eagerly(
        self,
        head: Head,
        hidden_states: torch.Tensor,
        labels: torch.Tensor,
        *,
        generator: torch.Generator | None,
        reduction: Reduction,
        ignore_index: int,
        num_items_in_batch: torch.Tensor | int | None,
        token_weights: torch.Tensor | None,
        return_stats: bool,
    ) -> Any:
        """The call in eager code."""
        check_inputs(hidden_states, head, labels, reduction, token_weights)
        vocab_size = self.vocab_size or head.vocab_size
        dtype = compute_dtype(hidden_states, head.weight)
        flat_labels = labels.reshape(-1).long()
        is_out = None
        if head.bias is not None and self.state is not None:  # without a state nothing is drawn
            bias = within_reach(head.bias, head.post)
            head = head._replace(bias=bias)
            is_out = is_masked(bias, head.post, self.largest_of)
        factors = None
        if token_weights is not None:
            factors = token_weights.detach().reshape(-1).to(dtype)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        call = Call(self.config.backend, return_stats)
        is_static = needs_static_shapes(hidden.device) and self.has_static_shapes(head)
        if is_static and is_out is not None:
            assert head.bias is not None
            is_static = masks_nothing(head.bias, is_out)
        is_valid, num_masked = None, 0
        if is_static and len(flat_labels):
            is_valid = valid_mask(flat_labels, ignore_index, vocab_size, factors)
            hidden = hidden.masked_fill(~is_valid.unsqueeze(1), 0)
            flat_labels = flat_labels.masked_fill(~is_valid, 0)
            num_valid, place = is_valid.sum(), is_valid
        else:
            place, num_masked = valid_positions(
                flat_labels, ignore_index, vocab_size, is_out, factors
            )
            num_valid = place.numel()
            if num_valid == 0:
                loss = self.nothing(head, Positions(hidden[:0], place), call).to(dtype)
                if reduction == "none":
                    loss = loss + hidden_states.new_zeros(labels.shape, dtype=dtype)
                return (loss, Statistics(num_valid=0)) if return_stats else loss
            if num_valid < flat_labels.numel():
                hidden, flat_labels = hidden[place], flat_labels[place]
                factors = None if factors is None else factors[place]

        positions = Positions(hidden, flat_labels, None, self.config.terms(), is_valid)
        factors = None if factors is None else positions.valid(factors)
        if reduction != "none":
            denominator = 1 if reduction == "sum" else num_valid
            if num_items_in_batch is not None:
                denominator = num_items_in_batch
            of_each = weight_of_each(positions, denominator, factors, dtype)
            positions = replace(positions, weight=of_each)
        # A head whose classes are all masked has a loss of NaN, and is left to it.
        if is_out is not None and 0 < num_masked < vocab_size:
            order = torch.argsort(is_out, stable=True)
            kept, masked = order.tensor_split([len(order) - num_masked])
            head = head._replace(masked=masked, kept=kept)
        call = self.begin(call, head, positions, generator)
        # Autocast would round the logits; the losses choose their own dtype.
        with torch.autocast(hidden.device.type, enabled=False):
            loss, statistics = self.compute(head, positions, call)
            smoothing = positions.terms.label_smoothing
            if smoothing:
                mean = self.mean_logits(head, positions)
                loss = loss - smoothing * positions.reduce(mean)
        if reduction == "none":
            loss = loss if factors is None else loss * factors
            loss = scatter_to(labels, place, loss)
        if not return_stats:
            return loss
        fields = {
            name: None if value is None else scatter_to(labels, place, positions.valid(value))
            for name in ("covered", "relative_error", "correct", "confidence")
            for value in (getattr(statistics, name),)
        }
        return loss, replace(statistics, num_valid=int(num_valid), **fields)


@torch.compiler.assume_constant_result
def _number_of(objective: Objective) -> int:
    return register(weakref.ref(objective))


def weight_of_each(
    positions: Positions,
    denominator: torch.Tensor | int,
    factors: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What the positions' losses weigh in a sum over ``denominator``, times ``[N]`` factors: 0-dim,
    or ``[N]`` where they do not weigh the same."""
    hidden = positions.hidden
    if torch.is_tensor(denominator):
        denominator = denominator.to(hidden.device, dtype)
    weight = hidden.new_ones((), dtype=dtype) / denominator
    weight = weight if factors is None else factors * weight
    if positions.is_valid is None:
        return weight
    return positions.valid(weight.expand(len(positions)))  # where there is none, of 0 / 0 too


def scatter_to(labels: torch.Tensor, place: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``[N]`` values at their places in the shape of ``labels``, 0 elsewhere."""
    if place.numel() == labels.numel():
        return values.reshape(labels.shape)
    full = values.new_zeros(labels.numel())
    return full.index_copy(0, place, values).reshape(labels.shape)


def connected_zero(head: Head, hidden: torch.Tensor, is_sparse: bool) -> torch.Tensor:
    """0 that depends on every input, so that ranks without labels still join the backward pass;
    ``is_sparse`` keeps the gradient of the weight row-sparse."""
    weight, *others = head.tensors
    nothing = torch.empty(0, dtype=torch.int64, device=weight.device)
    rows = torch.nn.functional.embedding(nothing, weight, sparse=is_sparse)
    parts = [hidden[:0], rows, *(part[:0] for part in others if part is not None)]
    return torch.stack([part.sum().float() for part in parts]).sum()


def check_inputs(hidden_states, head: Head, labels, reduction, token_weights=None) -> None:
    """Raise one sentence for inputs that do not fit together."""
    weight, low_rank, bias = head.tensors
    if weight.dim() != 2:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; the output head's [vocab_size, hidden_size] "
            "matrix is needed."
        )
    num_rows, width = weight.shape
    if low_rank is not None:
        if low_rank.dim() != 2 or len(low_rank) != num_rows:
            raise ValueError(
                f"low_rank has shape {tuple(low_rank.shape)}; [{num_rows}, r], a row for each "
                "row of weight, is needed."
            )
        width += low_rank.shape[1]
    if hidden_states.dim() < 1 or hidden_states.shape[-1] != width:
        beside = "" if low_rank is None else f" and low_rank {tuple(low_rank.shape)}"
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)} and weight "
            f"{tuple(weight.shape)}{beside}; their last dimensions must be equal, so pass the "
            "hidden states that enter this head."
        )
    if labels.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} but hidden_states has "
            f"{tuple(hidden_states.shape)}; pass one label for each position, already shifted."
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels has dtype {labels.dtype}; pass integer class ids (int64).")
    if bias is not None and bias.shape != (num_rows,):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; [{num_rows}], one number for each row of "
            "weight, is needed."
        )
    if token_weights is not None and token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights has shape {tuple(token_weights.shape)} but labels has "
            f"{tuple(labels.shape)}; pass one weight for each label, already shifted."
        )
    named = {"weight": weight, "low_rank": low_rank, "bias": bias, "labels": labels}
    named |= {"token_weights": token_weights}
    for name, tensor in named.items():
        if tensor is not None and tensor.device != hidden_states.device:
            raise ValueError(
                f"{name} is on {tensor.device} and hidden_states is on {hidden_states.device}; "
                "move them to one device."
            )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is {reduction!r}; choose "mean", "sum" or "none".')
