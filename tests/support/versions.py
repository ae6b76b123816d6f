"""Tests of what older versions lack, skipped with the reason."""

import pytest
import transformers

from sce_lm.objectives import compile_operator

one_graph = pytest.mark.skipif(
    not compile_operator.ONE_GRAPH,
    reason="before torch 2.13 a compiler breaks its graph at the loss, which stays eager code",
)

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
