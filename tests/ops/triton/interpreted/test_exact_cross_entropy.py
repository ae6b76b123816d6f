"""The kernels of exact cross-entropy against fp64 straight-line code."""

import pytest
import torch
from support.problems import Problem, make_problem, relative_error

import sce_lm.ops.triton.backward_pass as backward_pass
from sce_lm.objectives.reference import exact_reference, raw_logits
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import Positions
from sce_lm.ops.triton.exact_cross_entropy import exact_cross_entropy

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}


def check(n, v, d, *, dtype=torch.float32, bias=False, post=LogitTransform(), pieces=False):
    problem = make_problem(n, v, d, with_bias=bias, dtype=dtype, spread=2.0)
    tensors = [t if t is None else t.detach().double() for t in problem]
    double = Problem(tensors[0], tensors[1], problem.labels, tensors[3])
    for tensor in double.parameters:
        tensor.requires_grad_()
    head, positions = double.head(post), double.positions()
    expected = exact_reference(head, positions)
    weights = torch.linspace(0.5, 1.5, n) / 64
    kept = backward_pass.WORKSPACE_ELEMENTS
    backward_pass.WORKSPACE_ELEMENTS = 1 if pieces else kept
    try:
        result = exact_cross_entropy(problem.head(post), problem.positions(weights))
        found = torch.autograd.grad(result.loss, problem.parameters)
    finally:
        backward_pass.WORKSPACE_ELEMENTS = kept
    limit = TOLERANCE[dtype]
    assert relative_error(result.loss, (expected * weights).sum()) < limit
    s = post(raw_logits(head, double.hidden))
    assert torch.equal(result.correct, s.argmax(dim=1) == problem.labels)
    assert relative_error(result.confidence, s.softmax(dim=1).amax(dim=1)) < limit
    wanted = torch.autograd.grad((expected * weights).sum(), double.parameters)
    for actual, want in zip(found, wanted):
        assert actual.dtype == dtype
        assert relative_error(actual, want) < limit


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "post": LogitTransform(1.5, 2.0), "pieces": True},
        {"dtype": torch.float16, "post": LogitTransform(-0.3), "bias": True},
    ],
    ids=["plain", "pieces", "fp16"],
)
def test_equals_the_reference(options):
    check(37, 110, 70, **options)


def test_one_position_and_even_width():
    check(1, 33, 64)


def test_splits_of_many_tiles(monkeypatch):
    """A program walks over several tiles of columns."""
    monkeypatch.setattr("sce_lm.ops.triton.candidate_forward.MAX_SPLITS", 3)
    check(20, 200, 10)


def test_of_several_largest_logits_the_first_one_counts():
    weight = torch.zeros(70, 5)
    weight[[20, 50, 60]] = 1.0
    hidden = torch.ones(3, 5)
    result = exact_cross_entropy(Head(weight), Positions(hidden, torch.tensor([20, 50, 60])))
    assert result.correct.tolist() == [True, False, False]


def test_loss_per_position_and_frozen_tensors():
    problem = make_problem(20, 40, 8, with_bias=True, dtype=torch.float32)
    problem.weight.requires_grad_(False)
    head, positions = problem.head(), problem.positions()
    loss = exact_cross_entropy(head, positions).loss
    assert loss.shape == (20,)
    wanted = exact_reference(head, positions)
    torch.testing.assert_close(loss, wanted)
    inputs = (problem.hidden, problem.bias)
    for actual, want in zip(
        torch.autograd.grad(loss.sum(), inputs), torch.autograd.grad(wanted.sum(), inputs)
    ):
        torch.testing.assert_close(actual, want)
