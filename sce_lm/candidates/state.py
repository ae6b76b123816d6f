"""`SCEState`: what an objective remembers between calls, and how it is saved.

It is no module and no part of the model: label counts (the tail's prior and the frequent list;
8 bytes a class, and 4 more for a catalogue that is sampled by :mod:`weight classes
<sce_lm.candidates.weight_classes>`),
running averages that choose the control variate and feed the logs, and what else a method learns
over its calls (``memory``). It is local to a process.

A call under gradient checkpointing runs twice, and the second run must see the counts of the
first. The state keeps the labels of the latest calls, keyed by their seed, and takes later calls'
labels out again when a seed comes back; what a call read from ``memory`` it keeps through
:meth:`once`. Calls without gradients do not count.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sce_lm.candidates.tracked_row_sum import RowSum
from sce_lm.candidates.weight_classes import WeightClasses
from sce_lm.files import replacing
from sce_lm.ops.static_shapes import needs_static_shapes

REMEMBERED_CALLS = 64
"""Calls that can be replayed: a backward pass comes at most this many calls after its forward."""
AVERAGE_DECAY = 0.9
"""Weight of the past in the running averages, once there is enough of it."""
_MEMORY = "memory."
"""Prefix of the memory's tensors in a saved file."""
_AVERAGES = (
    "variance_plain",
    "variance_control",
    "coverage",
    "products_per_position",
    "distinct_cached",
    "candidates_per_position",
    "relative_error_p95",
)

T = TypeVar("T")


@dataclass(frozen=True)
class _Call:
    labels: torch.Tensor
    is_valid: torch.Tensor | None
    prefer_control_variate: bool
    counted: bool
    read: dict[str, object] = field(default_factory=dict)


class SCEState:
    """Label counts and running averages of one objective on one process.

    It takes its size and device from the first call, so ``SCEState()`` fits every vocabulary.
    """

    def __init__(self) -> None:
        self.counts: torch.Tensor | None = None
        """``[V]`` int64: how often each class was a label."""
        self.step = 0
        """Calls that counted."""
        self.averages: dict[str, float | torch.Tensor] = {}
        """Running averages over those calls; of a device, numbers that wait there to be read."""
        self.averaged: dict[str, int] = {}
        """How many values each of them has taken in."""
        self.memory: dict[str, torch.Tensor] = {}
        """What a method learns besides, by name, for instance how often each class was drawn."""
        self.row_sum = RowSum()
        """The sum of the head's rows, for heads that are frozen or trained row by row."""
        self.num_labels: int | torch.Tensor = 0
        """Labels counted, the sum of ``counts``; 0-dim on the device where only it knows."""
        self.tail_candidates = 0
        """Size of the next tail where a target sets it; 0: the configuration's."""
        self._prefers_control = True
        self._frequent: torch.Tensor | None = None
        self._classes: WeightClasses | None = None
        self._recent: OrderedDict[int, _Call] = OrderedDict()

    @property
    def is_new(self) -> bool:
        """True until a call has counted or a saved state was loaded."""
        return self.step == 0

    @property
    def prefer_control_variate(self) -> bool:
        """Whether the control variate has had the smaller variance so far (True at the start); by
        averages that wait on a device, when :meth:`summary` last read them."""
        plain, control = (self.averages.get(name) for name in _AVERAGES[:2])
        if isinstance(plain, float) and isinstance(control, float):
            self._prefers_control = control <= plain
        return self._prefers_control

    def resize(self, vocab_size: int) -> None:
        """Go on after classes were added at the end of the vocabulary, or cut off there.

        The counts of the classes that stay are kept, and so are the averages; a new class was no
        label yet. What a method learned besides (``memory``) it learns again, and calls before this
        one can no longer be replayed.
        """
        if self.counts is None:
            return
        kept = self.counts[:vocab_size]
        self.counts = nn.functional.pad(kept, (0, vocab_size - len(kept)))
        self.num_labels = int(kept.sum())
        self.memory.clear()
        self._frequent = self._classes = None
        self.row_sum.forget()
        self.forget_calls()

    def forget_calls(self) -> None:
        """No call so far will be replayed. A run that begins where another one began draws the same
        seeds, and its calls are new ones."""
        self._recent.clear()

    def begin_call(
        self,
        labels: torch.Tensor,
        vocab_size: int,
        seed: int,
        is_valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, bool, bool]:
        """Counts ``[V]`` with this call's labels in, the control-variate choice, and whether the
        call is counted (False for a replay and under ``no_grad``).

        Args:
            labels: ``[n]`` int64 in ``[0, vocab_size)``.
            is_valid: ``[n]`` bool: which of them count; None: all.

        Raises:
            ValueError: the state belongs to another vocabulary.
        """
        if self.counts is None:
            self.counts = torch.zeros(vocab_size, dtype=torch.int64, device=labels.device)
        if self.counts.numel() != vocab_size:
            raise ValueError(
                f"this SCEState counts {self.counts.numel()} classes but weight has {vocab_size} "
                f"rows; call its resize({vocab_size}) if rows were added at the end of that "
                "vocabulary or cut off there, else give each vocabulary an SCEState of its own."
            )
        self.counts = self.counts.to(labels.device)
        if seed in self._recent:
            return *self._replay(seed), False
        prefer = self.prefer_control_variate
        counted = torch.is_grad_enabled() and not _inside_backward()
        if counted:
            self.step += 1
            self.num_labels += len(labels) if is_valid is None else is_valid.sum()
        call = _Call(labels.clone(), is_valid, prefer, counted)
        current = _add(self.counts if counted else self.counts.clone(), call, 1)
        self._recent[seed] = call
        if len(self._recent) > REMEMBERED_CALLS:
            self._recent.popitem(last=False)
        return current, prefer, counted

    def _replay(self, seed: int) -> tuple[torch.Tensor, bool]:
        """Counts and choice as the call with this seed saw them."""
        assert self.counts is not None
        counts, call = self.counts.clone(), self._recent[seed]
        for other in reversed(self._recent):
            if other == seed:
                break
            if self._recent[other].counted:
                _add(counts, self._recent[other], -1)
        if not call.counted:
            _add(counts, call, 1)
        return counts, call.prefer_control_variate

    def once(self, seed: int, name: str, read: Callable[[], T]) -> T:
        """What ``read()`` gave in the first run of the call with this seed: its replay sees the
        memory as that run saw it. After :meth:`begin_call`; the result is kept for as long as the
        call can be replayed, so it should be small."""
        found = self._recent[seed].read
        if name not in found:
            found[name] = read()
        return found[name]  # pyright: ignore[reportReturnType]

    def most_frequent(
        self,
        counts: torch.Tensor,
        labels: torch.Tensor,
        size: int,
        left_out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The ``size`` classes with the largest ``counts``, those of :meth:`begin_call`; the ids
        ``left_out`` come last.

        Only this call's labels have gained since the call before, so they and the classes that
        were frequent then are all that can be: no pass over the catalogue.
        """
        known = self._frequent
        ranked = counts if left_out is None else counts.index_fill(0, left_out, -1)
        if needs_static_shapes(counts.device):  # which has no distinct classes to look among
            return torch.topk(ranked, size).indices
        if known is None or len(known) != size:
            found = torch.topk(ranked, size).indices
        else:
            pool = torch.unique(torch.cat([known.to(labels.device), labels]))
            found = pool[torch.topk(ranked[pool], size).indices]
        if counts is self.counts:
            self._frequent = found
        return found

    def weight_classes(self, counts: torch.Tensor) -> WeightClasses:
        """The catalogue sorted by ``counts``, those of :meth:`begin_call` or of earlier calls."""
        if counts is not self.counts and self.is_new:
            return WeightClasses.build(counts, 0)
        num_labels = int(self.num_labels)
        if self._classes is None or self._classes.is_due(num_labels):
            self._classes = WeightClasses.build(counts, num_labels)
        if self._classes.order.device != counts.device:  # loaded from a file
            order = self._classes.order.to(counts.device)
            self._classes = replace(self._classes, order=order)
        return self._classes

    def average(self, **values: float | torch.Tensor) -> None:
        """Fold one call's figures into the running averages. The n-th value of a name weighs 1/n,
        as in a mean, until that is less than what it weighs from then on. A 0-dim tensor of a
        device stays there, and so does its average."""
        for name, value in values.items():
            if torch.is_tensor(value) and not needs_static_shapes(value.device):
                value = float(value)
            count = self.averaged.get(name, 0) + 1
            past, share = self.averages.get(name, 0.0), max(1.0 / count, 1.0 - AVERAGE_DECAY)
            self.averages[name] = past + share * (value - past)
            self.averaged[name] = count

    def summary(self) -> dict[str, float]:
        """Running averages for logs, empty at first.

        Coverage; candidates and products per position (the latter with all that choosing them
        costs); relative error, the standard deviation of Zhat over Zhat with the estimator in use,
        its root mean square and its 95 % quantile over positions. Waits for a device.
        """
        self.averages = {k: float(value) for k, value in self.averages.items()}
        figures = {k: float(self.averages[k]) for k in _AVERAGES[2:] if k in self.averages}
        variances = [float(self.averages[k]) for k in _AVERAGES[:2] if k in self.averages]
        if variances:
            figures["relative_error"] = min(variances) ** 0.5
        return figures

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything that goes on from here needs, on the CPU.

        The running sum of the head's rows is dropped, so that the run that goes on reads the weight
        again as one that is resumed from this state will: the two stay equal bit for bit.
        """
        self.row_sum.forget()
        counts = torch.zeros(0, dtype=torch.int64) if self.counts is None else self.counts
        averages = [float(self.averages.get(name, "nan")) for name in _AVERAGES]
        return {
            "counts": counts.cpu().contiguous(),
            "step": torch.tensor(self.step),
            "tail_candidates": torch.tensor(self.tail_candidates),
            "averages": torch.tensor(averages, dtype=torch.float64),
            "averaged": torch.tensor([self.averaged.get(name, 0) for name in _AVERAGES]),
            **{_MEMORY + name: t.cpu().contiguous() for name, t in self.memory.items()},
            **self._lists(),
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write :meth:`state_dict` to a safetensors file, complete or not at all."""
        with replacing(Path(path)) as partial:
            save_file(self.state_dict(), partial)

    def _lists(self) -> dict[str, torch.Tensor]:
        """What is derived from past counts, and would come out otherwise from today's."""
        lists = {}
        if self._frequent is not None:
            lists["frequent"] = self._frequent.cpu()
        if self._classes is not None:
            fields = vars(self._classes)
            lists |= {f"classes.{k}": torch.as_tensor(v).cpu() for k, v in fields.items()}
        return lists

    def load(self, path: str | os.PathLike) -> None:
        """Take over a saved state.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no complete saved state, or counts another vocabulary.
        """
        try:
            saved = load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a complete SCEState file ({error}); delete it to start the state "
                "anew, or restore it from another checkpoint."
            ) from error
        self._take_over(saved, path)

    def load_state_dict(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: an entry is missing, or the state counts another vocabulary.
        """
        self._take_over({name: tensor.clone() for name, tensor in saved.items()}, "the state")

    def _take_over(self, saved: Mapping[str, torch.Tensor], source: object) -> None:
        """Keep the tensors of ``saved``; messages name their ``source``."""
        missing = sorted({"counts", "step", "averages", "averaged"} - set(saved))
        if missing:
            raise ValueError(
                f"{source} is not a complete SCEState file ({', '.join(missing)} missing); delete "
                "it to start the state anew, or restore it from another checkpoint."
            )
        counts, step, averages = saved["counts"], int(saved["step"]), saved["averages"].tolist()
        if self.counts is not None and counts.numel() not in (0, self.counts.numel()):
            raise ValueError(
                f"{source} counts {counts.numel()} classes but this model has "
                f"{self.counts.numel()}; load the state that was saved with this model."
            )
        self.counts = counts if counts.numel() else None
        self.step = step
        self.tail_candidates = int(saved.get("tail_candidates", 0))
        self.averages = {k: v for k, v in zip(_AVERAGES, averages) if v == v}
        self._prefers_control = True
        self.averaged = dict(zip(_AVERAGES, saved["averaged"].tolist()))
        self.memory = {
            name.removeprefix(_MEMORY): t for name, t in saved.items() if name.startswith(_MEMORY)
        }
        self.num_labels = int(counts.sum())
        self._frequent = saved.get("frequent")
        self._classes = None
        if "classes.order" in saved:
            order, sizes, means = (saved[f"classes.{k}"] for k in ("order", "sizes", "mean_counts"))
            self._classes = WeightClasses(order, sizes, means, int(saved["classes.num_labels"]))
        self.row_sum.forget()
        self._recent.clear()


def _add(counts: torch.Tensor, call: _Call, amount: int) -> torch.Tensor:
    labels, is_valid = call.labels, call.is_valid
    one = torch.ones_like(labels) if is_valid is None else is_valid.to(labels.dtype)
    return counts.index_add_(0, labels, one, alpha=amount)


def _inside_backward() -> bool:
    """True while autograd runs a backward pass: gradient checkpointing recomputes there."""
    return torch._C._current_graph_task_id() != -1
