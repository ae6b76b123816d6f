"""The kernels of candidate cross-entropy against fp64 straight-line code."""

from dataclasses import replace

import pytest
import torch
from support.problems import relative_error
from support.triton_cases import CASES, Case, draw

import sce_lm.ops.triton.backward_pass as backward_pass
import sce_lm.ops.triton.configurations as configurations
from sce_lm.objectives.reference import candidate_reference, raw_logits
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import LossTerms, Positions
from sce_lm.ops.triton.candidate_cross_entropy import (
    candidate_cross_entropy,
    candidate_cross_entropy_supported,
)

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}


def check(case: Case, terms: LossTerms | None = None) -> None:
    """Loss and gradients of weighted losses."""
    problem, double, candidates = draw(case)
    weights = torch.linspace(0.5, 1.5, case.positions) / 64
    head = problem.head(case.post)
    positions = replace(problem.positions(weights), terms=terms or LossTerms())
    assert candidate_cross_entropy_supported(head, positions) is None
    expected = candidate_reference(double.head(case.post), double.positions(), candidates)
    if terms:
        logits = case.post(raw_logits(double.head(), double.hidden))
        label = logits.gather(1, double.labels[:, None]).squeeze(1)
        log_z = expected + label
        expected = log_z + terms.z_loss * log_z**2 - (1 - terms.label_smoothing) * label
    result = candidate_cross_entropy(head, positions, candidates)
    limit = TOLERANCE[case.dtype]
    wanted_loss = (expected * weights).sum()
    torch.testing.assert_close(result.loss.double(), wanted_loss, rtol=limit, atol=limit)
    inputs = [t for t in problem.parameters if t.requires_grad]
    wanted = [t for t in double.parameters if t.requires_grad]
    found = torch.autograd.grad(result.loss, inputs)
    for actual, want, like in zip(found, torch.autograd.grad(wanted_loss, wanted), inputs):
        assert actual.dtype == like.dtype
        if actual.is_sparse:
            actual = actual.coalesce()
            ids = actual.indices()[0]
            touched = torch.cat([candidates.shared, candidates.tail, problem.labels])
            assert torch.equal(ids, torch.unique(touched))
            if not case.control:
                assert relative_error(actual.to_dense(), want) < limit
                continue
            # The part through the mean is the same vector in every row of the rest.
            missing = want[ids] - actual.values().double()
            is_rest = ~torch.isin(ids, candidates.shared)
            one = missing[is_rest][:1]
            assert relative_error(missing[is_rest], one.expand(int(is_rest.sum()), -1)) < 1e-3
            assert missing[~is_rest].abs().max() < limit * want.abs().max()
        else:
            assert (actual.double() - want).norm() < limit * want.norm() + 1e-7


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case):
    check(case)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("soft cap", "weighted buckets")], ids=str
)
def test_other_terms_of_the_loss(case):
    check(case, LossTerms(z_loss=0.1, label_smoothing=0.2))


@pytest.mark.parametrize(
    ("width", "dtype"),
    [
        (64, torch.float16),
        (300, torch.float32),
        (300, torch.float16),
        (520, torch.float32),
        (896, torch.float32),
        (2304, torch.float16),
    ],
)
def test_widths(width, dtype, monkeypatch):
    tile = configurations.Configuration(16, 16, 128 if width < 600 else 512, 1, 1)
    monkeypatch.setattr(configurations, "INTERPRETER", tile)
    small = Case("width", dtype, 20, 40, width, shared=17, tail=10, control=True, bias=True)
    check(small)


def test_a_small_workspace_gives_the_same(monkeypatch):
    """Lists cut into pieces of a tile of columns each."""
    monkeypatch.setattr(backward_pass, "WORKSPACE_ELEMENTS", 1)
    check(Case("pieces", buckets=2, bias=True, control=True, width=33))


def test_clamped_positions():
    """A capped phi that would swallow Zhat: only the terms seen are left, as in the core's test."""
    x = torch.full((40,), -6.0)
    x[:20] = 6.0
    hidden = torch.ones(2, 1, requires_grad=True)
    weight = x[:, None].clone().requires_grad_()
    labels = torch.tensor([39, 3])
    candidates = Candidates(
        torch.arange(0), torch.tensor([0, 1]), torch.tensor([4.0, 4.0]), control_variate=True
    )
    post = LogitTransform(1.0, 1.0)
    result = candidate_cross_entropy(Head(weight, post=post), Positions(hidden, labels), candidates)
    assert result.num_clamped == 2
    double = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = candidate_reference(
        Head(double[1], post=post), Positions(double[0], labels), candidates
    )
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(result.loss.sum(), (hidden, weight))
    for actual, want in zip(found, torch.autograd.grad(expected.sum(), double)):
        # 1 - tanh² near 1 is a difference of fp32 numbers.
        torch.testing.assert_close(actual.double(), want, rtol=1e-5, atol=3e-6)


def test_large_deltas_stay_finite():
    """exp(95) overflows fp32; the shifted sums do not."""
    problem, _, candidates = draw(Case("large", width=3, shared=30, tail=20, control=True))
    first = problem.hidden[0].detach()
    weight = problem.weight.detach().clone()
    weight[candidates.tail[0]] = first * 95.0 / first.norm() ** 2
    double = weight.double().requires_grad_()
    head, positions = Head(weight.requires_grad_()), problem.positions()
    loss = candidate_cross_entropy(head, positions, candidates).loss
    wide = Positions(problem.hidden.double(), problem.labels)
    expected = candidate_reference(Head(double), wide, candidates)
    assert relative_error(loss, expected) < 1e-6
    found = torch.autograd.grad(loss.sum(), weight)[0]
    assert relative_error(found, torch.autograd.grad(expected.sum(), double)[0]) < 1e-5


def test_the_same_bits_every_time():
    problem, _, candidates = draw(Case("repeat", buckets=2, bias=True, control=True))
    runs = []
    for _ in range(2):
        loss = candidate_cross_entropy(problem.head(), problem.positions(), candidates).loss
        assert loss.shape == problem.labels.shape
        runs.append([loss, *torch.autograd.grad(loss.sum(), problem.parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_narrow_hidden_states_are_widened():
    """As under autocast, which leaves the weight in fp32."""
    problem, _, candidates = draw(Case("mixed", buckets=2, control=True))
    half = problem.hidden.detach().half().requires_grad_()
    wide = half.detach().float().requires_grad_()
    found, expected = (
        candidate_cross_entropy(problem.head(), Positions(h, problem.labels), candidates).loss
        for h in (half, wide)
    )
    assert torch.equal(found, expected)
    (actual,) = torch.autograd.grad(found.sum(), half)
    (want,) = torch.autograd.grad(expected.sum(), wide)
    assert torch.equal(actual, want.half())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h, w: (h.double(), w), "float64"),
        (lambda h, w: (h, w.double()), "a weight of torch.float64"),
        (lambda h, w: (h, w.half()), "float32 and the weight is torch.float16"),
        (lambda h, w: (h, w.T.contiguous().T), "contiguous"),
        (lambda h, w: (h.to("meta"), w), "meta"),
    ],
    ids=["fp64", "fp64 weight", "mixed", "strides", "device"],
)
def test_unsupported_inputs_are_named(change, reason):
    problem = draw(Case("unsupported")).problem
    hidden, weight = change(problem.hidden.detach(), problem.weight.detach())
    positions = Positions(hidden, problem.labels)
    assert reason in candidate_cross_entropy_supported(Head(weight), positions)
