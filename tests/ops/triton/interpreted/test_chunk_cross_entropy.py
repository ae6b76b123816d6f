"""Chunks as bucket lists: the kernels against the PyTorch twin."""

import pytest
import torch
from support.problems import equal_chunks, gradients, make_problem

from sce_lm.ops.chunk_cross_entropy import Chunks, chunk_cross_entropy
from sce_lm.ops.logits import LogitTransform


@pytest.mark.parametrize("reach", [0, 1])
def test_equals_the_plain_one(reach):
    problem = make_problem(40, 90, 33, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    chunks = Chunks(*(equal_chunks(1, size, 7, generator) for size in (40, 90)), 7, reach)
    head, positions = problem.head(LogitTransform(1.5, 2.0)), problem.positions()
    found, expected = (
        chunk_cross_entropy(head, positions, chunks, backend=backend)
        for backend in ("triton", "torch")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for actual, want in zip(gradients(found.sum(), problem), gradients(expected.sum(), problem)):
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-5)


def test_several_rounds_are_refused():
    problem = make_problem(6, 10, 4, dtype=torch.float32)
    chunks = Chunks(torch.zeros(2, 6).long(), torch.zeros(2, 10).long(), 1, 0)
    with pytest.raises(ValueError, match="2 rounds, and the kernels take one"):
        chunk_cross_entropy(problem.head(), problem.positions(), chunks, backend="triton")
