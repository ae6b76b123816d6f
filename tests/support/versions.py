"""Tests of what older versions lack, skipped with the reason."""

import pytest

from sce_lm.objectives import compiled

one_graph = pytest.mark.skipif(
    not compiled.ONE_GRAPH,
    reason="before torch 2.13 a compiler breaks its graph at the loss, which stays eager code",
)
