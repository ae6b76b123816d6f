"""Cross-entropy over a union of chunks against its straight line, on drawn chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import equal_chunks, gradients, make_problem, relative_error

import sce_lm.ops.chunk_cross_entropy as core
from sce_lm import LogitTransform
from sce_lm.objectives.reference import rece_reference

POSTS = [LogitTransform(), LogitTransform(scale=-0.3), LogitTransform(1.5, 2.0)]


@st.composite
def problems(draw):
    """Ragged sizes."""
    n, v, d = draw(st.integers(1, 30)), draw(st.integers(2, 70)), draw(st.integers(1, 9))
    rounds, count = draw(st.integers(1, 4)), draw(st.integers(1, min(n, v, 8)))
    seed = draw(st.integers(0, 2**31))
    problem = make_problem(n, v, d, with_bias=draw(st.booleans()), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    chunks = core.Chunks(
        *(equal_chunks(rounds, size, count, generator) for size in (n, v)),
        count,
        draw(st.integers(0, 2)),
    )
    return problem, chunks, draw(st.sampled_from(POSTS))


@settings(max_examples=80)
@given(problems(), st.sampled_from([1, 64, 2**22]))
def test_equals_the_reference(case, block_elements):
    problem, chunks, post = case
    head = problem.head(post)
    expected = rece_reference(
        head, problem.positions(), chunks.of_position, chunks.of_class, chunks.reach
    )
    weights = torch.linspace(0.5, 1.5, len(expected), dtype=expected.dtype)
    kept, core.BLOCK_ELEMENTS = core.BLOCK_ELEMENTS, block_elements
    try:
        loss = core.chunk_cross_entropy(head, problem.positions(), chunks)
        share = torch.tensor(0.3, dtype=torch.float64)
        total = core.chunk_cross_entropy(head, problem.positions(share), chunks)
        cases = ((loss * weights).sum(), (expected * weights).sum()), (total, 0.3 * expected.sum())
        for actual, wanted in cases:
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
            want = torch.autograd.grad(wanted, problem.parameters, retain_graph=True)
            for mine, theirs in zip(gradients(actual, problem), want):
                torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8)
    finally:
        core.BLOCK_ELEMENTS = kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_its_inputs(dtype):
    n, v, d = 120, 300, 130
    low = [t.detach().to(dtype) for t in make_problem(n, v, d, with_bias=False, spread=2.0)[:2]]
    problem = make_problem(n, v, d, with_bias=False)._replace(
        hidden=low[0].double().requires_grad_(), weight=low[1].double().requires_grad_()
    )
    generator = torch.Generator().manual_seed(0)
    chunks = core.Chunks(*(equal_chunks(2, size, 7, generator) for size in (n, v)), 7, 1)
    expected = rece_reference(
        problem.head(), problem.positions(), chunks.of_position, chunks.of_class, 1
    ).mean()
    cast = problem._replace(hidden=low[0].requires_grad_(), weight=low[1].requires_grad_())
    positions = cast.positions(torch.tensor(1.0 / n))
    loss = core.chunk_cross_entropy(cast.head(), positions, chunks)
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < 1e-6
    for mine, want in zip(gradients(loss, cast), gradients(expected, problem)):
        assert mine.dtype == dtype
        assert relative_error(mine, want) < torch.finfo(dtype).eps + 2e-6
