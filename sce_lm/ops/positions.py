"""The positions of a call that have a label."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Positions:
    """N positions that all have a label, and what each one's loss weighs."""

    hidden: torch.Tensor
    """``[N, d]``, fp16, bf16, fp32 or fp64; ``[N, d + r]`` for a head with a low-rank operand,
    ``torch.cat([h, u], -1)``."""
    labels: torch.Tensor
    """``[N]`` int64 in ``[0, V)``; of a head that is cut by rows, -1 where the label's row is
    elsewhere."""
    weight: torch.Tensor | None = None
    """0-dim or ``[N]``: the loss is the sum of the positions' losses times this. None: a loss for
    each position, ``[N]``."""

    def __len__(self) -> int:
        return len(self.labels)

    def reduce(self, losses: torch.Tensor) -> torch.Tensor:
        """What is asked of ``[N]`` losses: their weighted sum, or themselves."""
        return losses if self.weight is None else (losses * self.weight).sum()
