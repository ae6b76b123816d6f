"""Losses over each position's own candidates against their straight lines, on drawn shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import gradients, make_problem, relative_error

import sce_lm.ops.position_cross_entropy as core
from sce_lm import LogitTransform
from sce_lm.objectives.reference import binary_reference, position_reference
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions

POSTS = [LogitTransform(), LogitTransform(scale=-0.3), LogitTransform(1.5, 2.0)]


@st.composite
def problems(draw):
    """A problem with ragged sizes, repeated ids, labels among them and empty slots."""
    n, v, d = draw(st.integers(1, 30)), draw(st.integers(2, 70)), draw(st.integers(1, 9))
    k, seed = draw(st.integers(0, 40)), draw(st.integers(0, 2**31))
    problem = make_problem(n, v, d, with_bias=draw(st.booleans()), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lists = draw(st.sampled_from([1, n]))
    ids = torch.randint(0, v, (lists, k), generator=generator)
    rows = draw(st.sampled_from([1, n]))
    c = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    c[torch.rand(rows, k, generator=generator) < 0.2] = -torch.inf
    candidates = core.PositionCandidates(ids, c, keep_label=draw(st.booleans()))
    return problem, candidates, draw(st.sampled_from(POSTS))


def compare(loss_of, expected, problem):
    """Loss and gradients, for a loss per position and for a weighted sum."""
    weights = torch.linspace(0.5, 1.5, len(expected), dtype=expected.dtype)
    wanted = gradients((expected * weights).sum(), problem)
    for position_weight in (None, weights):
        loss = loss_of(position_weight)
        loss = loss if position_weight is not None else (loss * weights).sum()
        torch.testing.assert_close(loss, (expected * weights).sum(), rtol=1e-9, atol=1e-9)
        for actual, want in zip(gradients(loss, problem), wanted):
            torch.testing.assert_close(actual, want, rtol=1e-7, atol=1e-8)


@settings(max_examples=100)
@given(problems(), st.sampled_from([1, 200, 2**22]))
def test_softmax_equals_the_reference(case, block_elements):
    problem, candidates, post = case
    rows = (len(problem.labels), -1)
    head = problem.head(post)
    expected = position_reference(
        head,
        problem.positions(),
        candidates.ids.expand(rows),
        candidates.log_weights.expand(rows),
        keep_label=candidates.keep_label,
    )

    def loss_of(position_weight):
        positions = problem.positions(position_weight)
        return core.position_cross_entropy(head, positions, candidates).loss

    kept, core.BLOCK_ELEMENTS = core.BLOCK_ELEMENTS, block_elements
    try:
        compare(loss_of, expected, problem)
    finally:
        core.BLOCK_ELEMENTS = kept


@settings(max_examples=50)
@given(problems(), st.floats(0.01, 2.0))
def test_binary_equals_the_reference(case, beta):
    problem, candidates, post = case
    candidates = core.PositionCandidates(
        candidates.ids, torch.zeros(1, candidates.ids.shape[1], dtype=torch.float64)
    )
    ids = candidates.ids.expand(len(problem.labels), -1)
    head = problem.head(post)
    expected = binary_reference(head, problem.positions(), ids, beta=beta)

    def loss_of(position_weight):
        positions = problem.positions(position_weight)
        return core.position_binary_cross_entropy(head, positions, candidates, positive_weight=beta)

    compare(loss_of, expected, problem)


def test_binary_is_stable_where_the_formula_is_not():
    """A calibrated positive far out: sigmoid(s)^-beta - 1 underflows, softplus does not."""
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = torch.tensor([[120.0], [-120.0], [0.0]], requires_grad=True)
    candidates = core.PositionCandidates(torch.tensor([[2]]), torch.zeros(1, 1))
    positions = Positions(hidden, torch.tensor([0, 1]))
    loss = core.position_binary_cross_entropy(
        Head(weight), positions, candidates, positive_weight=1e-3
    )
    log2 = torch.tensor(2.0).log()
    torch.testing.assert_close(loss, torch.stack([log2 / 2, (0.12 + log2) / 2]))
    loss.sum().backward()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [False, True])
def test_low_precision_is_as_good_as_its_inputs(dtype, shared):
    n, v, d, k = 200, 500, 130, 70
    low = [t.detach().to(dtype) for t in make_problem(n, v, d, with_bias=False, spread=2.0)[:2]]
    ids = torch.randint(0, v, (1 if shared else n, k), generator=torch.Generator().manual_seed(0))
    c = torch.full((1, k), 0.7)
    problem = make_problem(n, v, d, with_bias=False)._replace(
        hidden=low[0].double().requires_grad_(), weight=low[1].double().requires_grad_()
    )
    expected = position_reference(
        problem.head(), problem.positions(), ids.expand(n, -1), c.double()
    ).mean()
    cast = problem._replace(hidden=low[0].requires_grad_(), weight=low[1].requires_grad_())
    positions = cast.positions(torch.tensor(1.0 / n))
    loss = core.position_cross_entropy(cast.head(), positions, core.PositionCandidates(ids, c)).loss
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < 1e-6
    for mine, want in zip(gradients(loss, cast), gradients(expected, problem)):
        assert mine.dtype == dtype
        assert relative_error(mine, want) < torch.finfo(dtype).eps + 2e-6


def test_sparse_gradient_is_the_dense_one():
    problem = make_problem(20, 60, 4)
    ids = torch.arange(20).reshape(20, 1) + torch.arange(5)
    found = []
    for sparse in (False, True):
        candidates = core.PositionCandidates(ids, torch.zeros(1, 5), sparse_grad=sparse)
        loss = core.position_cross_entropy(problem.head(), problem.positions(), candidates).loss
        loss = loss.sum()
        found.append(torch.autograd.grad(loss, problem.weight)[0])
    assert found[1].is_sparse
    touched = torch.unique(torch.cat([ids.flatten(), problem.labels]))
    assert torch.equal(found[1].indices()[0], touched)
    torch.testing.assert_close(found[1].to_dense(), found[0])


@pytest.mark.parametrize("needs", ["hidden", "weight", "bias"])
def test_only_what_is_needed(needs):
    problem = make_problem(10, 30, 4)
    whole = core.PositionCandidates(torch.arange(30)[None], torch.zeros(1, 30))
    loss = core.position_cross_entropy(problem.head(), problem.positions(), whole).loss.sum()
    wanted = torch.autograd.grad(loss, getattr(problem, needs))[0]
    frozen = problem._replace(
        **{
            name: t.detach()
            for name, t in problem._asdict().items()
            if name not in ("labels", needs)
        }
    )
    positions = frozen.positions(torch.tensor(1.0))
    loss = core.position_cross_entropy(frozen.head(), positions, whole).loss
    torch.testing.assert_close(torch.autograd.grad(loss, getattr(problem, needs))[0], wanted)


def test_neither_rows_nor_logits_are_kept_for_the_backward_pass():
    n, v, d, k = 400, 900, 24, 50
    problem = make_problem(n, v, d, with_bias=False, dtype=torch.float32)
    candidates = core.PositionCandidates(torch.randint(0, v, (n, k)), torch.zeros(1, k))
    saved: list[torch.Tensor] = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    for position_weight in (None, torch.tensor(1.0)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            positions = problem.positions(position_weight)
            loss = core.position_cross_entropy(problem.head(), positions, candidates).loss
        held = sum(t.numel() for t in saved)
        if position_weight is not None:
            held += sum(t.numel() for t in loss.grad_fn.gradients if torch.is_tensor(t))
        assert held < n * k * d / 5
