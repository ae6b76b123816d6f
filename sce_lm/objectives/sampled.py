"""What the objectives with drawn candidates share: configuration, state, checks, statistics."""

from __future__ import annotations

import math
from typing import Any

from sce_lm.candidates.state import SCEState
from sce_lm.objectives.base import Objective, Statistics


class SampledObjective(Objective):
    """An objective by a frozen configuration, with a state of its own."""

    def __init__(self, config: Any, state: SCEState | None = None) -> None:
        self.config = config
        self.state: SCEState = SCEState() if state is None else state

    def statistics(
        self, num_positions: int, products: float, *, counted: bool, **averages: float
    ) -> Statistics:
        """A call's :class:`Statistics`; the state's running averages follow if it counted."""
        if counted:
            self.state.average(coverage=1.0, products_per_position=products, **averages)
        return Statistics(num_valid=num_positions, products_per_position=products)


def check_choice(config: Any, name: str, *allowed: Any) -> None:
    """Raise one sentence unless the field is one of ``allowed``."""
    value = getattr(config, name)
    if not any(value is choice or value == choice for choice in allowed):
        raise ValueError(
            f"{type(config).__name__}.{name} is {value!r}; choose one of "
            + ", ".join(map(repr, allowed))
            + "."
        )


def check_count(config: Any, name: str, *, low: int = 1, auto: bool = False) -> None:
    """Raise one sentence unless the field is an integer from ``low`` up (or "auto")."""
    value = getattr(config, name)
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not is_count and not (auto and value == "auto"):
        raise ValueError(
            f"{type(config).__name__}.{name} is {value!r}; give an integer from {low} up"
            + (', or "auto".' if auto else ".")
        )


def check_share(config: Any, name: str, *, zero: bool = True) -> None:
    """Raise one sentence unless the field lies in [0, 1], or in (0, 1] without ``zero``."""
    value = getattr(config, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and 0 <= value <= 1 and (zero or value > 0)):
        interval = "[0, 1]" if zero else "(0, 1]"
        raise ValueError(f"{type(config).__name__}.{name} is {value!r}; give one in {interval}.")
