"""The exact loss against its reference, in blocks and tiles of every size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.problems import gradients, make_problem, relative_error

import sce_lm.ops.exact_cross_entropy as core
import sce_lm.ops.logit_stream as stream
from sce_lm import LogitTransform
from sce_lm.objectives.reference import exact_reference, raw_logits
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions


@given(
    st.integers(1, 40),
    st.integers(2, 90),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([LogitTransform(), LogitTransform(0.3), LogitTransform(1.5, 2.0)]),
    st.sampled_from([{"BLOCK_ELEMENTS": 0}, {}, {"BLOCK_ELEMENTS": 300, "MIN_BLOCK": 1}]),
    st.sampled_from([{}, {"TILE_CLASSES": 7, "TILE_POSITIONS": 5}]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_equals_the_reference(n, v, d, with_bias, post, blocks, tiles, is_frozen, seed):
    problem = make_problem(n, v, d, with_bias=with_bias, seed=seed)
    if is_frozen:
        problem = problem._replace(weight=problem.weight.detach())
    inputs = [t for t in problem[:2] + problem[3:] if t is not None and t.requires_grad]
    weights = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    head = problem.head(post)
    expected = exact_reference(head, problem.positions())
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    s = post(raw_logits(head, problem.hidden))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in blocks.items():
            patch.setattr(core, name, value)
        for name, value in tiles.items():
            patch.setattr(stream, name, value)
        for position_weight in (None, weights):
            result = core.exact_cross_entropy(head, problem.positions(position_weight))
            loss = (result.loss * weights).sum() if position_weight is None else result.loss
            torch.testing.assert_close(loss, (expected * weights).sum())
            assert torch.equal(result.correct, s.argmax(1) == problem.labels)
            torch.testing.assert_close(result.confidence, s.softmax(1).amax(1))
            for _ in range(2):  # a second backward pass gives the same
                found = torch.autograd.grad(loss, inputs, retain_graph=True)
                for actual, want in zip(found, wanted):
                    torch.testing.assert_close(actual, want)
        k = min(3, v)
        scores = core.exact_scores(head, problem.positions(), top_k=k)
    torch.testing.assert_close(scores.log_probability, -expected.detach())
    assert torch.equal(scores.correct, result.correct)
    assert torch.equal(scores.top, s.topk(k, dim=1).indices)


def test_of_several_best_classes_the_first_counts():
    """At initialisation all logits may tie; that is not an accuracy of 1."""
    weight = torch.zeros(9, 4)
    positions = Positions(torch.ones(3, 4), torch.tensor([0, 4, 8]), torch.tensor(1.0))
    for needs_weight in (True, False):
        w = weight.clone().requires_grad_(needs_weight)
        result = core.exact_cross_entropy(Head(w), positions)
        assert result.correct.tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_stock(dtype, monkeypatch):
    """Error against fp64 at most that of stock cross-entropy, with many tiles and blocks."""
    monkeypatch.setattr(stream, "TILE_CLASSES", 101)
    monkeypatch.setattr(stream, "TILE_POSITIONS", 90)
    monkeypatch.setattr(core, "BLOCK_ELEMENTS", 700 * 70)
    drawn = make_problem(300, 700, 130, with_bias=False, spread=2.0)
    low = [t.detach().to(dtype) for t in drawn[:2]]
    problem = drawn._replace(
        hidden=low[0].double().requires_grad_(), weight=low[1].double().requires_grad_()
    )
    expected = exact_reference(problem.head(), problem.positions()).mean()
    wanted = gradients(expected, problem)
    cast = drawn._replace(hidden=low[0].requires_grad_(), weight=low[1].requires_grad_())
    ours = core.exact_cross_entropy(cast.head(), cast.positions(torch.tensor(1 / 300))).loss
    stock = torch.nn.functional.cross_entropy((cast.hidden @ cast.weight.T).float(), cast.labels)
    assert ours.dtype == torch.float32
    assert relative_error(ours, expected) <= relative_error(stock, expected) + 2e-6
    for mine, theirs, want in zip(gradients(ours, cast), gradients(stock, cast), wanted):
        assert mine.dtype == dtype
        limit = max(relative_error(theirs, want), torch.finfo(dtype).eps)
        assert relative_error(mine, want) <= limit + 2e-6


@pytest.mark.parametrize("with_grad_hidden", [False, True])
@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_a_whole_tile_of_masked_classes(mask, with_grad_hidden):
    """The first tile has no class that counts."""
    problem = make_problem(9, 2 * stream.TILE_CLASSES + 5, 4, dtype=torch.float32)
    bias = problem.bias.detach().clone()
    bias[: stream.TILE_CLASSES + 7] = mask
    labels = problem.labels % stream.TILE_CLASSES + stream.TILE_CLASSES + 5
    hidden, weight = problem.hidden, problem.weight.detach().requires_grad_(not with_grad_hidden)
    share = torch.tensor(0.5) if with_grad_hidden else None
    head, positions = Head(weight, bias=bias), Positions(hidden, labels, share)
    loss = core.exact_cross_entropy(head, positions).loss.sum()
    logits = hidden.double() @ weight.double().T + bias
    want = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    want = want * 0.5 if with_grad_hidden else want
    leaves = [hidden] if with_grad_hidden else [hidden, weight]
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves)):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
