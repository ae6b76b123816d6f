"""What the objectives that draw candidates share: configuration, state, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sce_lm.candidates.state import SCEState
from sce_lm.objectives.base import Objective, Statistics
from sce_lm.objectives.call import Call
from sce_lm.ops.positions import Positions


class SampledObjective(Objective):
    """An objective by a frozen configuration (by default its class's own), with a state."""

    def __init__(self, config: Any = None, state: SCEState | None = None) -> None:
        super().__init__(config)
        self.state: SCEState = SCEState() if state is None else state

    def statistics(
        self,
        positions: Positions,
        call: Call,
        products: float,
        *,
        ids: Sequence[torch.Tensor] | None,
        candidates: float | None = None,
        relative_error: torch.Tensor | None = None,
        **averages: float | torch.Tensor,
    ) -> Statistics:
        """A call's :class:`Statistics`; the state's running averages follow if it counted.

        Args:
            ids: of the candidates, in any shapes and number, -1 for none; None: all classes.
            candidates: of a position; None: ``products``, where choosing them takes none.
        """
        if call.counted:
            self.state.average(
                coverage=1.0,
                candidates_per_position=products if candidates is None else candidates,
                products_per_position=products,
                **averages,
            )
        met = None
        if call.want_statistics and ids is not None:
            met = torch.unique(torch.cat([part.reshape(-1) for part in ids]))
            met = met[met >= 0]
        return Statistics(
            num_valid=len(positions),
            products_per_position=products,
            relative_error=relative_error,
            candidates=met,
        )
