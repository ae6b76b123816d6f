"""What is known of logits that are not there yet: the head, its input, and what was done since.

:class:`RecordedLogits` is the record, and says what it amounts to. Two classes keep one:
:class:`~sce_lm.hf.lazy_logits.LazyLogits` in eager code and
:class:`~sce_lm.hf.traced_logits.TracedLogits` while a compiler traces. What is added to a record,
and by which functions, is in :mod:`sce_lm.hf.logit_operations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sce_lm.hf.head_call import call_inside
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform


@dataclass(frozen=True, slots=True)
class Modes:
    """The modes under which the head would have run."""

    device_type: str
    autocast: torch.dtype | None
    grad: bool
    inference: bool

    @classmethod
    def current(cls, device_type: str) -> Modes:
        available = torch.amp.is_autocast_available(device_type)
        autocast = available and torch.is_autocast_enabled(device_type)
        return cls(
            device_type,
            torch.get_autocast_dtype(device_type) if autocast else None,
            torch.is_grad_enabled(),
            not torch.compiler.is_compiling() and torch.is_inference_mode_enabled(),
        )

    def head_dtype(self, hidden_states: torch.Tensor) -> torch.dtype:
        """The dtype of what a linear layer makes of them."""
        dtype = hidden_states.dtype
        return dtype if self.autocast is None or dtype == torch.float64 else self.autocast

    def restored(self) -> ExitStack:
        """A context in which they hold again."""
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(self.inference))
        stack.enter_context(torch.set_grad_enabled(self.grad))
        if torch.amp.is_autocast_available(self.device_type):
            stack.enter_context(
                torch.autocast(
                    self.device_type, dtype=self.autocast, enabled=self.autocast is not None
                )
            )
        return stack


CrossEntropy = Callable[["RecordedLogits", torch.Tensor, int, str], Any]
"""``(logits [n, V], labels [n], ignore_index, reduction)`` -> loss, or NotImplemented."""

LabelTerms = Callable[[torch.Tensor, Head, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``(hidden [n, d + r], head, labels [n])`` -> ``[n]`` log Z - s_y by an objective, and the mean
logit."""


@dataclass(frozen=True, slots=True)
class Source:
    """Head and modes, shared by all that is derived from one call of the head."""

    head: nn.Linear  # or what acts as one
    hidden_states: torch.Tensor
    device: torch.device
    """Where the head would leave its result."""
    modes: Modes
    versions: tuple[tuple[torch.Tensor, int | None], ...]
    """The head's parameters and their versions at its call."""
    cross_entropy: CrossEntropy | None
    label_terms: LabelTerms | None = None
    """Finds log Z of log-probabilities that are asked, with gradients, for one class of each row;
    None: it is exact."""

    def check_unchanged(self) -> None:
        """Raise one sentence if the head's weights are not those of its call any more."""
        now = self.head.parameters()
        if any(p is q and version(p) != v for p, (q, v) in zip(now, self.versions)):
            raise RuntimeError(
                "the logits of a forward pass were asked for after the output head's weights had "
                "changed (an optimizer step?); read outputs.logits before that."
            )

    def logits(self, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """What the head gives, of all hidden states or of these rows of them."""
        self.check_unchanged()
        with self.modes.restored():
            return self.head(self.hidden_states if hidden_states is None else hidden_states)

    def now(self) -> Source:
        """The same, of which a result is derived in the present gradient mode."""
        if not self.modes.grad or torch.is_grad_enabled():
            return self
        return replace(self, modes=replace(self.modes, grad=False))


Step = tuple[str, Any]
"""What is done to logits (a key of ``APPLY``) and with what: a number, an index, a shape, ..."""

Place = Callable[[torch.Tensor], torch.Tensor]
"""Where rows lie among others: ``[..., k]`` of all rows -> ``[..., k]`` of these rows."""


class RecordedLogits(torch.Tensor):
    """A record of logits that are not there yet: the head, its input, and what was done since.

    ``_hidden`` has the rows that slices left over, where the head's input was; the device of the
    record itself is where the logits would be by now.
    """

    _source: Source
    _hidden: torch.Tensor
    _steps: tuple[Step, ...]
    _view_of: tuple[RecordedLogits, Step] | None
    _has_views: bool
    _real: torch.Tensor | None
    has_hooks = False
    """Whether somebody waits for the gradient of the logits themselves."""

    @classmethod
    def _make(
        cls,
        hidden: torch.Tensor,
        steps: tuple[Step, ...],
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        view_of: tuple[RecordedLogits, Step] | None = None,
    ) -> Any:
        raise NotImplementedError

    def _keep_hook(self, hook: Callable) -> Any:
        """Keep what ``register_hook`` was given for the real logits, or NotImplemented."""
        return NotImplemented

    def materialise(self) -> torch.Tensor:
        """The real logits: computed by the head at the first call, the same tensor afterwards."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Linear:
        """The module that would compute them."""
        return self._source.head

    @property
    def hidden_states(self) -> torch.Tensor:
        """``[..., d]``, one row for each row of the logits."""
        return self._hidden

    @property
    def is_materialised(self) -> bool:
        """Whether the real logits exist; the record is not valid any more then."""
        return self._root()._real is not None or self._real is not None

    @property
    def transform(self) -> LogitTransform | None:
        """What was recorded, as a LogitTransform; None if it is none or the logits exist."""
        read = self.reading
        return read.post if read is not None and read.are_logits else None

    @property
    def reading(self) -> Reading | None:
        """What was recorded; None if that is nothing known or the logits exist."""
        return None if self.is_materialised else Reading.of_steps(self._steps)

    def with_added_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The head's own bias and what the model added to its result, ``[V]`` or None."""
        for kind, value in self._steps:
            if kind == "add":
                bias = value.flatten() if bias is None else bias + value.flatten()
        return bias

    def parts(self) -> tuple[torch.Tensor, Head]:
        """What the logits are made of, for code that wants no ``[..., V]``: hidden states
        ``[..., d + r]``, after the slicing of positions that the model did on its logits, and the
        head (no copy) with what the model did to the raw logits.

        Raises:
            ValueError: the model did something that is no LogitTransform, or already formed them.
        """
        post = self.transform
        if post is None:
            done = "were formed already" if self.is_materialised else f"went through {self._steps}"
            raise ValueError(
                f"these logits {done}, which no LogitTransform (scale, soft cap) describes; use "
                "them as an ordinary tensor."
            )
        with self._source.modes.restored():
            hidden, head = call_inside(self.head, lambda *product: product, self._hidden)
        return hidden, head._replace(bias=self.with_added_bias(head.bias), post=post)

    def _root(self) -> Any:
        return self if self._view_of is None else self._view_of[0]._root()

    def _record(
        self,
        step: Step,
        dtype: torch.dtype,
        place: Place | None = None,
        device: torch.device | None = None,
    ) -> Any:
        source, hidden = self._source.now(), place(self._hidden) if place else self._hidden
        return self._make(hidden, (*self._steps, step), source, dtype, device or self.device)

    def _record_in_place(self, step: Step) -> Any:
        # A view and its base share memory: what one of them does the other must see.
        # Without gradients torch would change its values and not its history.
        if self._view_of is not None or self._has_views or self._source.now() is not self._source:
            return None
        self._steps = (*self._steps, step)
        return self

    def _view(self, step: Step, place: Place | None = None, together: bool = False) -> Any:
        """``together``: the views are likely to be asked the same, one after the other."""
        self._has_views = True
        steps, source = (*self._steps, step), self._source.now()
        hidden = place(self._hidden) if place else self._hidden
        return self._make(hidden, steps, source, self.dtype, self.device, (self, step))


APPLY: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "add": lambda x, value: x + value,
    "mul": lambda x, value: x * value,
    "div": lambda x, value: x / value,
    "tanh": lambda x, _: torch.tanh(x),
    "log_softmax": lambda x, dtype: torch.log_softmax(x, -1, dtype=dtype),
    "softmax": lambda x, dtype: torch.softmax(x, -1, dtype=dtype),
    "exp": lambda x, dtype: x.to(dtype).exp(),
    "times": lambda x, other: x * other.materialise(),
    "to": lambda x, to: x.to(*to),
    "getitem": lambda x, index: x[index],
    "view": lambda x, shape: x.view(shape),
    "reshape": lambda x, shape: x.reshape(shape),
    "clone": lambda x, _: x.clone(),
    "contiguous": lambda x, _: x.contiguous(),
    "detach": lambda x, _: x.detach(),
}
"""Every step that is recorded, and how it is done to real logits."""

SHAPING = {"to", "getitem", "view", "reshape", "clone", "contiguous", "detach"}
"""Steps that leave the value of every logit as it is."""


def full_index(entries: tuple, dim: int) -> tuple | None:
    """An entry for each of ``dim`` dimensions, or None; each entry takes one up."""
    ellipses = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    missing = dim - (len(entries) - len(ellipses))
    if missing < 0 or len(ellipses) > 1:
        return None
    at = ellipses[0] if ellipses else len(entries)
    return (*entries[:at], *[slice(None)] * missing, *entries[at + 1 :])


@dataclass(frozen=True, slots=True)
class Reading:
    """What steps amount to: ``factor · form(post(x + bias)) · times``, with x the head's result."""

    post: LogitTransform
    form: str | None = None
    """None, "log_softmax" or "softmax"; without one, factor is in post."""
    factor: float = 1.0
    times: RecordedLogits | None = None

    @classmethod
    def of_steps(cls, steps: tuple[Step, ...]) -> Reading | None:
        """None where they are not of this kind."""
        steps = tuple(step for step in steps if step[0] not in SHAPING and step[0] != "add")
        kinds = [kind for kind, _ in steps]
        at = next((i for i, kind in enumerate(kinds) if kind in FORMS), len(steps))
        post = _as_transform(steps[:at])
        form, rest, times = "".join(kinds[at : at + 1]) or None, steps[at + 1 :], None
        if form == "log_softmax" and kinds[at + 1 : at + 2] == ["exp"]:
            form, rest = "softmax", rest[1:]
        if rest and rest[-1][0] == "times":
            times, rest = rest[-1][1], rest[:-1]
        factor = _as_transform(rest)
        if post is None or factor is None or factor.soft_cap is not None:
            return None
        return cls(post, form, factor.scale, times)

    @property
    def are_logits(self) -> bool:
        """Whether nothing was done that a LogitTransform does not describe."""
        return self.form is None and self.times is None


FORMS = ("log_softmax", "softmax")
"""Steps after which the record is of log-probabilities or probabilities."""


def _as_transform(steps: tuple[Step, ...]) -> LogitTransform | None:
    """``after · tanh(before · (x + bias))`` has soft_cap = after, scale = before · after."""
    before, after, capped = 1.0, 1.0, False
    for kind, value in steps:
        if kind == "tanh":
            if capped:
                return None
            capped, before, after = True, after, 1.0
        elif kind == "mul":
            after *= float(value)
        elif kind == "div":
            divisor = float(value)
            after = after / divisor if divisor else math.nan
        else:
            return None
    scale = before * after
    if not math.isfinite(scale) or scale == 0.0:
        return None
    return LogitTransform(scale=scale, soft_cap=abs(after) if capped else None)


def version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
