"""The kernels of row reductions against the PyTorch path in fp64."""

import pytest
import torch
from support.problems import make_problem, relative_error

import sce_lm.ops.triton.backward_pass as backward_pass
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.row_reductions import row_reductions

TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3}
EVERYTHING = {"entropy": True, "expected_logit": True, "logit_sum": True, "top_k": 1}


def flat(found) -> list:
    return [*found[:5], None if found.top is None else found.top.values]


def check(n, v, d, *, dtype=torch.float32, bias=False, post=LogitTransform(), ids=2, masked=None,
          **asked):  # fmt: skip
    problem = make_problem(n, v, d, with_bias=bias, dtype=dtype, spread=2.0)
    if masked is not None:
        with torch.no_grad():
            problem.bias[:masked] = -torch.inf
    double = [t if t is None else t.detach().double().requires_grad_() for t in
              (problem.hidden, problem.weight, problem.bias)]  # fmt: skip
    wanted_ids = torch.stack([problem.labels, problem.labels.flip(0)], dim=1)[:, :ids]
    options = {"ids": wanted_ids if ids else None, **asked}
    found = row_reductions(problem.head(post), problem.hidden, backend="triton", **options)
    wanted = row_reductions(
        Head(double[1], None, double[2], post), double[0], backend="torch", **options
    )
    mine, theirs = flat(found), flat(wanted)
    factors = []
    for actual, want in zip(mine, theirs):
        assert (actual is None) == (want is None)
        if want is not None:
            assert actual.dtype == torch.float32
            at = want.isfinite()
            assert torch.equal(actual.isfinite(), at)
            assert relative_error(actual[at], want[at]) < TOLERANCE[dtype]
            factors.append(torch.linspace(-1, 2, want.numel()).view(want.shape) / 64)
    if wanted.top is not None:
        assert torch.equal(found.top.indices, wanted.top.indices)
    got, want = (
        torch.autograd.grad([r for r in results if r is not None], inputs, cotangents)
        for results, inputs, cotangents in (
            (mine, problem.parameters, factors),
            (theirs, [t for t in double if t is not None], [f.double() for f in factors]),
        )
    )
    for actual, expected in zip(got, want):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "options",
    [
        {"entropy": True},
        {"bias": True, "post": LogitTransform(1.5, 2.0), **EVERYTHING},
        {"dtype": torch.float16, "post": LogitTransform(-0.3), "ids": 0, "expected_logit": True},
        {"ids": 0, "top_k": 1, "logit_sum": True},
    ],
    ids=["entropy", "everything", "fp16", "no ids"],
)
def test_equals_torch(options):
    check(37, 110, 70, **options)


def test_masked_classes_and_pieces(monkeypatch):
    """The first tiles and the first split have no class that counts."""
    monkeypatch.setattr("sce_lm.ops.triton.candidate_forward.MAX_SPLITS", 3)
    monkeypatch.setattr(backward_pass, "WORKSPACE_ELEMENTS", 1)
    check(18, 120, 10, bias=True, masked=50, entropy=True, expected_logit=True)


def test_what_they_cannot_take_is_named():
    head, hidden = Head(torch.zeros(50, 4)), torch.zeros(3, 4)
    ids = torch.zeros(3, 33, dtype=torch.int64)
    for options, reason in (({"top_k": 2}, "top_k is 2"), ({"ids": ids}, "33 ids a position")):
        with pytest.raises(ValueError, match=reason):
            row_reductions(head, hidden, backend="triton", **options)
    with pytest.raises(ValueError, match="there is no position"):
        row_reductions(head, hidden[:0], backend="triton")
