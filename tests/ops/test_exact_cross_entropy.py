"""The exact loss against its reference, in blocks and tiles of every size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.problems import gradients, make_problem, relative_error

import sce_lm.ops.exact_cross_entropy as core
from sce_lm import LogitTransform
from sce_lm.objectives.reference import exact_reference, raw_logits


@given(
    st.integers(1, 40),
    st.integers(2, 90),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([LogitTransform(), LogitTransform(0.3), LogitTransform(1.5, 2.0)]),
    st.sampled_from([1, 100, 2**24]),
    st.integers(0, 10**6),
)
def test_equals_the_reference(n, v, d, with_bias, post, block_elements, seed):
    problem = make_problem(n, v, d, with_bias=with_bias, seed=seed)
    expected = exact_reference(*problem[:3], bias=problem.bias, post=post)
    wanted = gradients(expected.mean(), problem)
    s = post(raw_logits(problem.hidden, problem.weight, problem.bias))
    kept, core.BLOCK_ELEMENTS = core.BLOCK_ELEMENTS, block_elements
    try:
        for position_weight in (None, torch.tensor(1.0 / n, dtype=torch.float64)):
            result = core.exact_cross_entropy(
                *problem[:3], bias=problem.bias, post=post, position_weight=position_weight
            )
            loss = result.loss.mean() if position_weight is None else result.loss
            torch.testing.assert_close(loss, expected.mean())
            assert torch.equal(result.correct, s.argmax(1) == problem.labels)
            for actual, want in zip(gradients(loss, problem), wanted):
                torch.testing.assert_close(actual, want)
    finally:
        core.BLOCK_ELEMENTS = kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_stock(dtype, monkeypatch):
    """Error against fp64 at most that of stock cross-entropy, with many tiles and blocks."""
    monkeypatch.setattr(core, "TILE_ELEMENTS", 130 * 101)
    monkeypatch.setattr(core, "BLOCK_ELEMENTS", 700 * 37)
    drawn = make_problem(300, 700, 130, with_bias=False, spread=2.0)
    low = [t.detach().to(dtype) for t in drawn[:2]]
    problem = drawn._replace(
        hidden=low[0].double().requires_grad_(), weight=low[1].double().requires_grad_()
    )
    expected = exact_reference(*problem[:3]).mean()
    wanted = gradients(expected, problem)
    cast = drawn._replace(hidden=low[0].requires_grad_(), weight=low[1].requires_grad_())
    ours = core.exact_cross_entropy(*cast[:3], position_weight=torch.tensor(1 / 300)).loss
    stock = torch.nn.functional.cross_entropy((cast.hidden @ cast.weight.T).float(), cast.labels)
    assert ours.dtype == torch.float32
    assert relative_error(ours, expected) <= relative_error(stock, expected) + 2e-6
    for mine, theirs, want in zip(gradients(ours, cast), gradients(stock, cast), wanted):
        assert mine.dtype == dtype
        limit = max(relative_error(theirs, want), torch.finfo(dtype).eps)
        assert relative_error(mine, want) <= limit + 2e-6
