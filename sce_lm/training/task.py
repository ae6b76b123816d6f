"""What the loop asks of a task, and the order in which a task's rows are seen.

The order is one endless stream: a fresh permutation of the rows for each epoch, one after the
other, so that every row is seen and a step may reach over the end of an epoch. A row's place in the
stream depends on the seed alone. A step takes the next rows of the stream whatever the number of
processes, and each process its share of them; so the step is the whole data position of a run, and
two processes see what one would with twice the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sce_lm.training.fingerprint import Fingerprint

HeldOut = Literal["validation", "test"]
"""What an evaluation is on: what is asked in the course of training (a recommender's validation
items; of a language model's held-out text the blocks that `eval_batches` allows), or what is asked
at the end (its test items; all of the held-out text)."""


class Task(ABC):
    """Training rows and evaluation of one kind of training."""

    tokenizer: PreTrainedTokenizerBase
    """Saved beside the model; its length is the vocabulary."""
    source: dict[str, Fingerprint]
    """What the data were when the run began: "data", and "held_out" where that is a source of its
    own."""
    num_rows: int
    """Training sequences, at least 1."""
    headline: tuple[str, ...]
    """Names of the validation figures for the progress bar; the first is also drawn as a curve."""

    higher_is_better: bool
    """The direction of the first of them."""
    separate_test: bool
    """Whether the test is on other data than the validation."""

    @abstractmethod
    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """A model's inputs for training rows, on the CPU: int64 `[len(rows), length]`, with
        `labels` (-100 where there is none)."""

    @abstractmethod
    def validation_batch(self) -> dict[str, torch.Tensor]:
        """As `batch`, of `per_device_batch_size` validation sequences, always the same."""

    @abstractmethod
    def evaluate(
        self, model: PreTrainedModel, accelerator: Accelerator, on: HeldOut
    ) -> dict[str, Any]:
        """Figures of a model in eval mode, the same on every process, with what belongs to them,
        such as their protocol.

        Args:
            model: the model itself, not its data-parallel wrapper.
            accelerator: each process takes its share; all call this together.
            on: what they are on.
        """

    def baselines(self, on: HeldOut = "test") -> dict[str, dict[str, Any]]:
        """Figures, by name, of methods that need no training; none by default."""
        return {}

    @abstractmethod
    def store(self, folder: Path) -> None:
        """Write what was derived from the data into a new folder (`stored_data`)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Sizes of the data and how they were split, for printing and JSON."""

    def model_fields(self) -> dict[str, Any]:
        """Fields that the data decide of the configuration of a model from scratch."""
        return {}

    def check_model(self, model: PreTrainedModel) -> None:  # noqa: B027 (nothing by default)
        """Raise ValueError if the model cannot train on the task's batches; most can."""


@dataclass
class DataOrder:
    """The rows that each process takes in each step."""

    num_rows: int
    batch_size: int
    accumulation: int
    seed: int
    _epoch: int = -1
    _permutation: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def step_batches(self, step: int, rank: int, processes: int) -> Iterator[list[int]]:
        """Row numbers of the accumulated batches of step `step` (0 is the first) on one process."""
        together = self.batch_size * processes
        for part in range(self.accumulation):
            place = (step * self.accumulation + part) * together + rank * self.batch_size
            yield [self._row(place + i) for i in range(self.batch_size)]

    def epoch(self, step: int, processes: int) -> float:
        """Epochs seen after `step` steps."""
        return step * self.accumulation * self.batch_size * processes / self.num_rows

    def _row(self, place: int) -> int:
        epoch, index = divmod(place, self.num_rows)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, generator.permutation(self.num_rows)
        return int(self._permutation[index])


def sum_over_processes(accelerator: Accelerator, value: torch.Tensor) -> torch.Tensor:
    """The sum of every process's tensor, on each of them."""
    total = accelerator.reduce(value.to(accelerator.device), "sum")
    assert isinstance(total, torch.Tensor)
    return total


def on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on a device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
