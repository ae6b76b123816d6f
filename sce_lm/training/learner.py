"""What a step of training moves, and the step.

An optimiser step sums the losses of all its positions, over accumulated batches and processes, and
divides by their number, as transformers' Trainer does: `num_items_in_batch`.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from sce_lm.candidates.state import SCEState
from sce_lm.hf.saving import state_file
from sce_lm.objectives import Objective
from sce_lm.training.distilling import Distillation
from sce_lm.training.optimizers import average_rows, clip_grad_norm_
from sce_lm.training.task import on_device, sum_over_processes


@dataclass(eq=False, repr=False)
class Learner:
    """A model with its objective, optimiser and schedule."""

    accelerator: Accelerator
    objective: Objective
    model: Any
    """As accelerate prepared it, with the objective applied."""
    optimizer: AcceleratedOptimizer
    scheduler: LRScheduler
    """Of the learning rate, a function of its step alone."""
    by_rows: Sequence[nn.Parameter]
    """What is trained by the rows that a step meets; see `optimizers`."""
    max_grad_norm: float
    """0: gradients are not clipped."""
    distillation: Distillation | None = None
    """A teacher's share of the loss."""

    def states(self, folder: Path, rank: int) -> dict[Path, SCEState]:
        """What counts of a process are kept, by their file in a checkpoint's folder."""
        states = {state_file(folder, rank): self.objective.state}
        if self.distillation is not None:
            states[teacher_state_file(folder, rank)] = self.distillation.state
        return {file: state for file, state in states.items() if state is not None}

    @property
    def plain_model(self) -> Any:
        """The model itself, not its data-parallel wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def step(self, batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One optimiser step; the figures are on the device, so nothing has waited for it."""
        device = self.accelerator.device
        # The first position of a sequence has no label: labels are shifted inside the model.
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        num_items = sum_over_processes(self.accelerator, torch.tensor(count))
        self.model.train()
        total = torch.zeros((), device=device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                loss = self._loss(on_device(batch, device), num_items.clamp(min=1))
                # Gradients are averaged over the processes, and a sum is wanted.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            total += loss.detach()
        norm = self._clip_gradients()
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.objective.end_step(device)
        return {
            "loss": sum_over_processes(self.accelerator, total),
            "grad_norm": torch.as_tensor(norm),
            "learning_rate": torch.tensor(learning_rate, dtype=torch.float64),
            "num_items": num_items,
        }

    def _loss(self, inputs: dict[str, torch.Tensor], num_items: torch.Tensor) -> torch.Tensor:
        if self.distillation is not None:
            return self.distillation(self.model, inputs, num_items)
        return self.model(**inputs, num_items_in_batch=num_items, use_cache=False).loss

    def _clip_gradients(self) -> Any:
        """Clip the gradients, averaged over the processes, and return their norm before that."""
        limit = self.max_grad_norm or math.inf
        if not self.by_rows:
            return self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        average_rows(self.by_rows, self.accelerator)
        self.accelerator.unscale_gradients()
        return clip_grad_norm_(self.model.parameters(), limit)


def teacher_state_file(folder: Path, rank: int) -> Path:
    """Where one process keeps the counts that a sampled distillation draws from."""
    return folder / f"teacher_state_rank{rank}.safetensors"
