"""What a model does to its raw logits after the output head: a scale, a soft cap, or nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """The map g from raw logits ``x = h·w + b`` to the logits ``s`` that enter the softmax.

        g(x) = scale · x                                    without a soft cap
        g(x) = soft_cap · tanh(scale · x / soft_cap)        with one (Gemma 2)

    It is applied element by element; ``scale`` alone covers Cohere and Granite.
    """

    scale: float = 1.0
    """Factor on the raw logits; finite and not zero."""
    soft_cap: float | None = None
    """Bound on the absolute value of the result; positive, or None for no bound."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(
                f"LogitTransform got scale={self.scale}; a finite number other than 0 is needed."
            )
        if self.soft_cap is not None and not (math.isfinite(self.soft_cap) and self.soft_cap > 0):
            raise ValueError(
                f"LogitTransform got soft_cap={self.soft_cap}; give a positive number, "
                "or None for no cap."
            )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """g(x), the same shape and dtype as ``x``."""
        if self.soft_cap is None:
            return x if self.scale == 1.0 else x * self.scale
        return self.soft_cap * torch.tanh(x * (self.scale / self.soft_cap))

    def apply_(self, x: torch.Tensor) -> torch.Tensor:
        """g(x), written over ``x``."""
        if self.soft_cap is None:
            return x if self.scale == 1.0 else x.mul_(self.scale)
        return x.mul_(self.scale / self.soft_cap).tanh_().mul_(self.soft_cap)

    def slope(self, s: torch.Tensor) -> torch.Tensor | float:
        """g'(x), written in terms of the result ``s = g(x)``: ``scale · (1 - (s / soft_cap)²)``."""
        if self.soft_cap is None:
            return self.scale
        return self.scale * (1.0 - (s / self.soft_cap).square())

    def curvature(self, s: torch.Tensor) -> torch.Tensor | float:
        """g''(x), in terms of ``s = g(x)``: ``-2 s (scale / soft_cap)² (1 - (s / soft_cap)²)``."""
        if self.soft_cap is None:
            return 0.0
        ratio = s / self.soft_cap
        return (-2.0 * self.scale**2 / self.soft_cap) * ratio * (1.0 - ratio.square())
