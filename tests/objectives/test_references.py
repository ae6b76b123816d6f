"""In fp32 every objective is its straight line over the candidates that it chose: loss and
gradients to 1e-5 of the same sums in fp64. That it chooses and weighs them rightly is for the other
tests."""

import sys

import pytest
import torch
from support.problems import gradients, make_problem, relative_error

from sce_lm import LogitTransform, objectives
from sce_lm.objectives.reference import (
    binary_reference,
    candidate_reference,
    exact_reference,
    position_reference,
    rece_reference,
)

N, V, D = 40, 300, 12
CORES = ("candidate_cross_entropy", "position_cross_entropy", "position_binary_cross_entropy")
CASES = [
    ("exact", {}),
    ("sce", {"num_buckets": 3, "bucket_candidates": 30, "shared_frequent": 20}),
    ("sce", {"tail_candidates": 60, "control_variate": True}),
    ("sce", {"tail_candidates": 60, "prior": {"labels": 1, "uniform": 1, "gradient": 1}}),
    ("sce", {"num_buckets": 3, "bucket_candidates": 60, "bucket_sampling": "priority"}),
    ("sampled_softmax", {"num_negatives": 70}),
    ("sampled_softmax", {"num_negatives": 70, "shared": False, "sampling": "distinct"}),
    ("in_batch", {}),
    ("bce", {}),
    ("gbce", {"num_negatives": 30}),
    ("bir", {"num_negatives": 20}),
    ("bir", {"num_negatives": 20, "correction": "importance"}),
    ("xir", {"num_negatives": 20, "cache_size": 50, "cache_weight": 0.2}),
    ("xir", {"num_negatives": 20, "cache_size": 50, "correction": "importance"}),
    ("kernel", {"num_negatives": 40}),
    ("kernel", {"num_negatives": 40, "kernel": "quartic", "alpha": 0.05}),
    ("kernel", {"num_negatives": 40, "shared": True, "alpha": "auto"}),
    ("rece", {"num_buckets": 20, "rounds": 2}),
]


def test_all_are_here():
    assert {name for name, _ in CASES} == set(objectives.names())


def spy(monkeypatch, objective):
    """What each later call of the objective hands to the numeric core."""
    calls = []
    module = sys.modules[type(objective).__module__]
    for name in (*CORES, "chunk_cross_entropy"):
        core = getattr(module, name, None)
        if core is None:
            continue

        def spied(head, positions, candidates, core=core, name=name, **fields):
            calls.append((name, candidates, fields))
            return core(head, positions, candidates, **fields)

        monkeypatch.setattr(module, name, spied)
    return calls


def straight_line(call, problem, post):
    """``[N]`` losses of one call of the core."""
    name, candidates, fields = call
    head, positions = problem.head(post), problem.positions()
    if name == "candidate_cross_entropy":
        return candidate_reference(head, positions, candidates)
    if name == "chunk_cross_entropy":
        chunks = candidates
        return rece_reference(head, positions, chunks.of_position, chunks.of_class, chunks.reach)
    ids = candidates.ids.expand(N, -1)
    if name == "position_binary_cross_entropy":
        return binary_reference(head, positions, ids, beta=fields["positive_weight"])
    weights = candidates.log_weights.double().expand(N, -1)
    return position_reference(head, positions, ids, weights, keep_label=candidates.keep_label)


@pytest.mark.parametrize("post", [LogitTransform(), LogitTransform(1.2, 6.0)], ids=["", "cap"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value)[:60])
def test_fp32_is_the_straight_line(name, options, post, monkeypatch):
    problem = make_problem(N, V, D, dtype=torch.float32)
    wide = problem._replace(
        **{
            k: t.detach().double().requires_grad_()
            for k, t in problem._asdict().items()
            if k != "labels"
        }
    )
    objective = objectives.get(name, **options)
    calls = spy(monkeypatch, objective)
    loss = objective(*problem[:3], bias=problem.bias, post=post)
    if name == "exact":
        expected = exact_reference(wide.head(post), wide.positions()).mean()
    else:
        lines = [straight_line(call, wide, post).mean() for call in calls]
        shares = [0.8, 0.2] if len(lines) == 2 else [1.0]
        expected = sum(share * line for share, line in zip(shares, lines, strict=True))
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < 1e-5
    for mine, want in zip(gradients(loss, problem), gradients(expected, wide)):
        assert relative_error(mine, want) < 1e-5
