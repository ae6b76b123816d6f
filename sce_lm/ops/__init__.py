"""The numeric core: losses over a linear head. Nothing here imports the rest of the package."""

from sce_lm.ops.logits import LogitTransform

__all__ = ["LogitTransform"]
