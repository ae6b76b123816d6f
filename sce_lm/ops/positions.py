"""The positions of a call that have a label, and how a loss is made of what a softmax gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What a softmax's loss adds to ``log Z - s_y``, for all positions of a call.

        loss = log Z + z_loss·(log Z)² - (1 - label_smoothing)·s_y - label_smoothing·mean_j s_j

    A pass takes all of it but the mean, whose gradient is the same row everywhere and which
    :func:`sce_lm.ops.mean_logits.mean_logits` gives. As the gradient of log Z is the softmax p,

        d loss = (1 + 2·z_loss·log Z)·sum_j p_j ds_j - (1 - label_smoothing)·ds_y - ...
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __bool__(self) -> bool:
        return self.z_loss != 0.0 or self.label_smoothing != 0.0

    def losses(self, log_partition: torch.Tensor, label_logit: torch.Tensor) -> torch.Tensor:
        """``[N]`` losses, the mean logit aside."""
        if not self:
            return log_partition - label_logit
        penalty = self.z_loss * log_partition.square()
        return log_partition + penalty - (1.0 - self.label_smoothing) * label_logit

    def of_partition(self, weight: torch.Tensor, log_partition: torch.Tensor) -> torch.Tensor:
        """What the gradient of log Z is taken times, for positions of this weight."""
        return weight * (1.0 + 2.0 * self.z_loss * log_partition) if self.z_loss else weight

    def of_label(self, weight: torch.Tensor) -> torch.Tensor:
        """What the gradient of ``-s_y`` is taken times."""
        return weight * (1.0 - self.label_smoothing) if self.label_smoothing else weight


@dataclass(frozen=True, slots=True)
class Positions:
    """N positions that have a label, what each one's loss weighs, and its terms."""

    hidden: torch.Tensor
    """``[N, d]``, fp16, bf16, fp32 or fp64; ``[N, d + r]`` for a head with a low-rank operand,
    ``torch.cat([h, u], -1)``."""
    labels: torch.Tensor
    """``[N]`` int64 in ``[0, V)``; of a head that is cut by rows, -1 where the label's row is
    elsewhere."""
    weight: torch.Tensor | None = None
    """0-dim or ``[N]``: the loss is the sum of the positions' losses times this. None: a loss for
    each position, ``[N]``."""
    terms: LossTerms = LossTerms()
    """Of a softmax's loss; a binary one has none of them."""
    is_valid: torch.Tensor | None = None
    """``[N]`` bool: which positions have a label, where shapes are static
    (:mod:`sce_lm.ops.static_shapes`). The others have hidden states of 0, label 0 and weight 0, and
    are part of nothing. None: all have one."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_valid(self) -> int | torch.Tensor:
        """Positions with a label: a number, or 0-dim int64 on the device."""
        return len(self) if self.is_valid is None else self.is_valid.sum()

    def valid(self, values: torch.Tensor) -> torch.Tensor:
        """``[N]`` values, 0 where there is no label (their own may be infinite)."""
        return values if self.is_valid is None else values.masked_fill(~self.is_valid, 0)

    def reduce(self, losses: torch.Tensor) -> torch.Tensor:
        """What is asked of ``[N]`` losses: their weighted sum, or themselves."""
        losses = self.valid(losses)
        return losses if self.weight is None else (losses * self.weight).sum()
