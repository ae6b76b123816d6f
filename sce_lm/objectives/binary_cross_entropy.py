"""Binary cross-entropy with k negatives (SASRec, Kang & McAuley 2018) and gBCE (gSASRec, Petrov &
Macdonald, RecSys 2023).

    loss_t = -( log sigmoid(s_ty)^beta + sum_{k negatives} log(1 - sigmoid(s_tj)) ) / (1 + k)
    beta = alpha·(t·(1 - 1/alpha) + 1/alpha) = 1 - t·(1 - alpha),       alpha = k / (V - 1)

BCE has beta = 1 (t = 0). Sampled negatives make BCE overconfident, since it sees too few of them;
t = 1 calibrates it fully. The published code maps the positive logit through
``log(1 / (sigmoid(s)^-beta - 1))`` in fp64 and then takes binary cross-entropy; that is
``beta·softplus(-s)``, which needs neither. Negatives are uniform for each position, as published;
one that hits the label, which the code keeps as a negative, has no term. These losses rank, they
have no partition function: the likelihood of such a model under a softmax says little.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sce_lm.candidates.proposals import Uniform
from sce_lm.config import ObjectiveConfig, check_choice, check_count, check_share
from sce_lm.objectives.base import Statistics
from sce_lm.objectives.call import Call
from sce_lm.objectives.sampled_objective import SampledObjective
from sce_lm.ops.head import Head
from sce_lm.ops.position_cross_entropy import PositionCandidates, position_binary_cross_entropy
from sce_lm.ops.positions import Positions


@dataclass(frozen=True)
class BCEConfig(ObjectiveConfig):
    """Configuration of BCE. Raises ValueError for a value out of range."""

    num_negatives: int = 1
    """k, negatives of a position; SASRec has 1."""

    shared: bool = False
    """One sample for all positions of a call, which is much cheaper, or one for each."""

    sparse_grad: bool = False
    """Return a row-sparse gradient of the weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "num_negatives")
        check_choice(self, "shared", True, False)
        check_choice(self, "sparse_grad", True, False)

    def positive_weight(self, vocab_size: int) -> float:
        """beta."""
        return 1.0


@dataclass(frozen=True)
class GBCEConfig(BCEConfig):
    """Configuration of gBCE. Raises ValueError for a value out of range."""

    num_negatives: int = 256
    """k, negatives of a position."""

    t: float = 0.75
    """Calibration, in [0, 1]: 0 is BCE, 1 makes sampled probabilities those of full BCE."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "t")

    def positive_weight(self, vocab_size: int) -> float:
        """beta; more negatives than other classes count as all of them (beta = 1)."""
        alpha = min(1.0, self.num_negatives / max(vocab_size - 1, 1))
        return 1.0 - self.t * (1.0 - alpha)


class BCE(SampledObjective):
    """Binary cross-entropy with sampled negatives by a :class:`BCEConfig`."""

    name = "bce"
    config_class = BCEConfig
    config: BCEConfig

    def has_static_shapes(self, head: Head) -> bool:
        return True

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        config = self.config
        lists = 1 if config.shared else len(positions)
        places = Uniform(head.num_classes).draw(
            (lists, config.num_negatives), call.stream("negatives")
        )
        ids = head.named(places)
        even = torch.zeros_like(ids[:1], dtype=torch.float32)
        loss = position_binary_cross_entropy(
            head,
            positions,
            PositionCandidates(ids, even, sparse_grad=config.sparse_grad),
            positive_weight=config.positive_weight(head.num_classes),
            backend=call.backend,
        )
        return loss, self.statistics(positions, call, float(config.num_negatives), ids=[ids])


class GBCE(BCE):
    """Generalised binary cross-entropy by a :class:`GBCEConfig`."""

    name = "gbce"
    config_class = GBCEConfig
    config: GBCEConfig
