"""Chunks as bucket lists: the kernels against the PyTorch twin."""

import pytest
import torch
from support.problems import gradients, make_problem

from sce_lm.ops.chunk_cross_entropy import Chunks, chunk_cross_entropy
from sce_lm.ops.logits import LogitTransform


@pytest.mark.parametrize("reach", [0, 1])
def test_equals_the_plain_one(reach):
    """Chunks of any size, one of them without classes and one without positions."""
    problem = make_problem(40, 90, 33, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    of_position = torch.randint(1, 5, (1, 40), generator=generator)
    of_class = torch.randint(0, 4, (1, 90), generator=generator)
    chunks = Chunks(of_position, of_class, 5, reach)
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
