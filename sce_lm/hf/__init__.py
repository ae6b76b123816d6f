"""Language models of transformers with an objective of ours in place of their loss."""

from sce_lm.hf.adapter import (
    apply_sce,
    last_statistics,
    loss_seconds,
    objective_of,
    probe_loss,
    remove_sce,
)
from sce_lm.hf.callback import SCECallback
from sce_lm.hf.lazy_logits import LazyLogits
from sce_lm.hf.saving import load_objective, save_objective

__all__ = [
    "LazyLogits",
    "SCECallback",
    "apply_sce",
    "last_statistics",
    "load_objective",
    "loss_seconds",
    "objective_of",
    "probe_loss",
    "remove_sce",
    "save_objective",
]
