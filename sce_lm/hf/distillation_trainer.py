"""`DistillationTrainer`: the Trainer of transformers with a teacher beside the model.

    loss = alpha · distillation_loss(student, teacher) + (1 - alpha) · the model's own loss

Neither model forms its logits: both return lazy ones, whose hidden states and heads go to
:func:`sce_lm.distillation.distillation_loss`. Without a teacher model the data have its best
classes, in the columns ``teacher_ids`` and ``teacher_log_probs``. The model's own loss is the
objective that :func:`~sce_lm.apply_sce` gave it. Evaluation is the model's own, exact
cross-entropy.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer

from sce_lm import objectives
from sce_lm.candidates.state import SCEState
from sce_lm.config import SCEConfig
from sce_lm.distillation import STORED_COLUMNS, HeadScores, StoredTopK, distillation_loss
from sce_lm.hf.adapter import apply_sce, lazy_logits, objective_of
from sce_lm.ops.divergence import Kind
from sce_lm.ops.teachers import Rest


class DistillationTrainer(Trainer):
    """``Trainer`` for a causal model that :func:`~sce_lm.apply_sce` patched, with a teacher.

    Args:
        args: those of ``Trainer``, the model first.
        teacher: a causal model of transformers over the same vocabulary. It is patched too, put in
            ``eval()`` and moved to the device of training. None: batches hold ``teacher_ids`` and
            ``teacher_log_probs``, ``[batch, length, k]``, at each position those of the token after
            it, computed at ``temperature``; set ``remove_unused_columns=False`` to keep them.
        rest: of :class:`~sce_lm.distillation.StoredTopK`, for such columns.
        alpha: the distillation's share of the loss, in [0, 1]. At 1 the model's own loss is not
            computed.
        divergence: of :func:`~sce_lm.distillation.distillation_loss`, as ``temperature`` and
            ``beta``.
        distill: "exact", or an :class:`~sce_lm.SCEConfig` for a sampled divergence, which keeps an
            SCEState of its own.
        options: those of ``Trainer``.

    Raises:
        ValueError: the model is not patched, alpha is outside [0, 1], the teacher has no linear
            head, or there is none and the Trainer drops its columns.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        rest: Rest = "ghost",
        alpha: float = 0.5,
        divergence: Kind = "forward_kl",
        temperature: float = 1.0,
        beta: float = 0.5,
        distill: Literal["exact"] | SCEConfig = "exact",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        model: Any = self.model
        if objective_of(model) is None:
            raise ValueError(
                f"this {type(model).__name__} has no objective; call apply_sce(model, ...) first "
                "and pass that model."
            )
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha is {alpha}; give the distillation's share, in [0, 1].")
        if teacher is None and self.args.remove_unused_columns:
            raise ValueError(
                "there is no teacher, and remove_unused_columns drops the columns teacher_ids and "
                "teacher_log_probs that could stand for one; set it to False, or pass a teacher."
            )
        self.teacher = None if teacher is None else self._placed(teacher)
        self.rest: Rest = rest
        self.alpha = alpha
        self.distill: dict[str, Any] = {
            "divergence": divergence,
            "temperature": temperature,
            "beta": beta,
            "objective": distill,
            "state": SCEState(),
        }

    def _placed(self, teacher: nn.Module) -> nn.Module:
        if objective_of(teacher) is None:
            apply_sce(teacher, objectives.get("exact"))
        # With a device map the teacher is where it should be.
        if not hasattr(teacher, "hf_device_map"):
            teacher.to(self.args.device)
        return teacher.eval()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Both losses in training, the model's own in evaluation."""
        trainer: Any = super()
        stored = {name: inputs.pop(name) for name in STORED_COLUMNS if name in inputs}
        if not model.training:
            return trainer.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        theirs = self._scores(unlabelled, stored)
        if self.alpha < 1.0:
            own, outputs = trainer.compute_loss(model, inputs, True, num_items_in_batch)
        else:
            with lazy_logits(model):
                own, outputs = 0.0, model(**unlabelled)
        distilled = self._distil(outputs.logits, theirs, labels, num_items_in_batch)
        loss = self.alpha * distilled + (1.0 - self.alpha) * own
        return (loss, outputs) if return_outputs else loss

    def _scores(
        self, inputs: dict[str, Any], stored: dict[str, torch.Tensor]
    ) -> HeadScores | StoredTopK:
        """The teacher's, of each position that has a next one."""
        if self.teacher is not None:
            with torch.no_grad(), lazy_logits(self.teacher):
                return HeadScores.of(self.teacher(**inputs).logits[:, :-1])
        if len(stored) < len(STORED_COLUMNS):
            raise ValueError(
                f"there is no teacher, and the batch has the columns {', '.join(inputs)}; give it "
                f"{' and '.join(STORED_COLUMNS)}, or pass a teacher."
            )
        ids, log_probs = (stored[name][:, :-1] for name in STORED_COLUMNS)
        return StoredTopK(ids, log_probs, self.rest, self.distill["temperature"])

    def _distil(
        self, ours: Any, theirs: Any, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The distillation's part, normalised as the Trainer normalises the model's own loss."""
        if not self.model_accepts_loss_kwargs:
            num_items = None
        loss = distillation_loss(
            HeadScores.of(ours[:, :-1]),
            theirs,
            labels[:, 1:],
            num_items_in_batch=num_items,
            **self.distill,
        )
        if self.args.average_tokens_across_devices and num_items is not None:
            loss = loss * self.accelerator.num_processes
        return loss
