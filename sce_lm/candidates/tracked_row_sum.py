"""The sum of the head's rows, kept where it need not be read off the whole matrix at each call.

The control variate needs the mean of W's rows. A matrix that is trained densely changes everywhere
and is read once a call. A frozen one is read once. One whose optimiser changes only the rows that
have a gradient is read once, and its sum corrected by those rows at each step.
"""

from __future__ import annotations

from typing import Any

import torch

from sce_lm.ops.gradient_memory import row_sum
from sce_lm.ops.head import Head


class RowSum:
    """Sum of the rows of one weight, valid while its storage and version are those it was read at.

    Writes through ``weight.data`` do not change a tensor's version: call :meth:`forget` after them.
    """

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._read_at: tuple[int, int] | None = None
        self._is_followed = False

    def of(self, head: Head) -> torch.Tensor | None:
        """fp64 ``[D]``, or None for a weight that is trained densely. The narrow columns beside the
        weight's are summed at each call, and so are the masked rows, which are not in the sum."""
        weight = head.weight
        if weight.is_inference() or (weight.requires_grad and not self._is_followed):
            return None
        if self._sum is None or self._read_at != _version(weight):
            self._sum, self._read_at = row_sum(weight), _version(weight)
        return head.row_sum(self._sum)

    def forget(self) -> None:
        """Read the weight again at the next call."""
        self._sum = self._read_at = None

    def follow(self, optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> None:
        """Keep the sum up to date through the steps of a row-sparse optimiser.

        A step whose gradient is dense makes the next call read the weight again.

        Raises:
            ValueError: the optimiser does not train this weight, or moves rows that have no
                gradient (momentum or weight decay).
        """
        groups = [g for g in optimizer.param_groups if any(p is weight for p in g["params"])]
        if not groups:
            raise ValueError(
                f"{type(optimizer).__name__} does not train this weight; follow the one that does."
            )
        for name in ("momentum", "weight_decay"):
            if groups[0].get(name):
                raise ValueError(
                    f"{type(optimizer).__name__} has {name}={groups[0][name]}, which moves rows "
                    "without a gradient; set it to 0, or do not follow this optimiser."
                )
        rows: list[torch.Tensor] = []

        def before(*_: Any) -> None:
            rows.clear()
            if self._sum is None or self._read_at != _version(weight) or weight.grad is None:
                return
            if not weight.grad.is_sparse:
                self.forget()
                return
            rows.append(torch.unique(weight.grad._indices()[0]))
            self._sum = self._sum - _sum_at(weight, rows[0])

        def after(*_: Any) -> None:
            if rows and self._sum is not None:
                self._sum = self._sum + _sum_at(weight, rows[0])
                self._read_at = _version(weight)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        self._is_followed = True


def _sum_at(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return weight.detach()[rows].sum(dim=0, dtype=torch.float64)


def _version(weight: torch.Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version
