"""Classes that a bias masks are as good as gone for the kernels too."""

import pytest
import torch
from support.masks import MASKS, OBJECTIVES, make_pair, stock_loss
from support.problems import gradients, relative_error

from sce_lm import LogitTransform, objectives

V = 70
"""Masked classes included."""
SMALL = {"positions": 13, "classes": 58}
AT_THE_END, SCATTERED = torch.arange(58, V), torch.arange(3, V, 6)
COVERING = {
    "exact": {"name": "exact"},
    "shared": {"name": "sce", "num_buckets": 0, "shared_frequent": V, "tail_candidates": 0},
    "all three": {"name": "sce", "num_buckets": 2, "bucket_candidates": 20, "shared_frequent": 5}
    | {"tail_candidates": V, "control_variate": True},
    "tail": {"name": "sce", "num_buckets": 0, "shared_frequent": 0, "shared_labels": False}
    | {"tail_candidates": V, "control_variate": True},
    "tail, sparse": {"name": "sce", "num_buckets": 0, "tail_candidates": V}
    | {"control_variate": False, "sparse_grad": True},
}
FEW = {"shared_frequent": 4, "tail_candidates": 20}
BUCKETS = {**FEW, "num_buckets": 2, "bucket_candidates": 8}
SAMPLED = {
    "control": {"name": "sce", **BUCKETS, "control_variate": True},
    "plain": {"name": "sce", **FEW, "num_buckets": 0, "control_variate": False},
    "no list": {**OBJECTIVES["sce, no list"], **BUCKETS, "shared_frequent": 0},
    "published": {**OBJECTIVES["sce, published"], "bucket_candidates": 10},
    "rece": {"name": "rece"},
    "in_batch": {"name": "in_batch"},
    "sampled_softmax": {**OBJECTIVES["sampled_softmax, priority"], "num_negatives": 20},
}


def marked(found, fast):
    return [m if m in fast else pytest.param(m, marks=pytest.mark.slow) for m in found]


def loss_of(objective, problem, post=LogitTransform(), **options):
    return objective(
        *problem[:3],
        bias=problem.bias,
        post=post,
        generator=torch.Generator().manual_seed(0),
        **options,
    )


@pytest.mark.parametrize("post", marked(["", "scale", "cap"], [""]))
@pytest.mark.parametrize("mask", marked(MASKS, ["-inf"]))
@pytest.mark.parametrize("name", COVERING)
def test_covering_candidates_are_exact(name, mask, post):
    transform = {"scale": LogitTransform(-0.7), "cap": LogitTransform(1.7, 3.0)}.get(post)
    transform = transform or LogitTransform()
    double, _, kept = make_pair(MASKS[mask], SCATTERED, post=transform, **SMALL)
    exact = stock_loss(double, transform)
    problem = make_pair(MASKS[mask], SCATTERED, torch.float32, transform, **SMALL).masked
    loss = loss_of(objectives.get(**COVERING[name], backend="triton"), problem, transform)
    assert relative_error(loss, exact) < 1e-5
    found = gradients(loss, problem)
    for actual, wanted in zip(found, gradients(exact, double)):
        assert relative_error(actual, wanted) < 1e-4
    for actual in found[1:]:
        actual[kept] = 0.0
        assert (actual == 0).all()


@pytest.mark.parametrize("mask", marked(MASKS, ["-inf"]))
@pytest.mark.parametrize("name", SAMPLED)
def test_padding_is_as_if_removed(name, mask):
    pair = make_pair(MASKS[mask], AT_THE_END, torch.float32, **SMALL)
    objective, alone = (objectives.get(**SAMPLED[name], backend="triton") for _ in range(2))
    loss, want = loss_of(objective, pair.masked), loss_of(alone, pair.removed)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    for actual, wanted in zip(gradients(loss, pair.masked), gradients(want, pair.removed)):
        rows = actual if len(actual) == len(wanted) else actual[pair.kept]
        assert relative_error(rows, wanted) < 1e-4
        if rows is not actual:
            actual[pair.kept] = 0.0
            assert (actual == 0).all()


@pytest.mark.parametrize("listed", marked([False, True], [False]))
def test_gradients_of_a_masked_label_are_those_of_stock_cross_entropy(listed):
    options = {"num_buckets": 0, "shared_frequent": 0, "shared_labels": listed}
    options |= {"tail_candidates": V, "control_variate": True, "backend": "triton"}
    double, single = (
        make_pair(-torch.inf, AT_THE_END, d, **SMALL).masked for d in (torch.float64, torch.float32)
    )
    for problem in (double, single):
        problem.labels[3] = AT_THE_END[2]
    loss = loss_of(objectives.get("sce", **options), single)
    assert loss == torch.inf
    for actual, wanted in zip(gradients(loss, single), gradients(stock_loss(double), double)):
        assert relative_error(actual, wanted) < 1e-4


@pytest.mark.parametrize("mask", marked(MASKS, ["-inf"]))
def test_the_sampled_loss_of_a_masked_label(mask):
    """Both backends, one sample: the rest and its mean do not hold the label."""
    problem = make_pair(MASKS[mask], AT_THE_END, torch.float32, **SMALL).masked
    problem.labels[3] = AT_THE_END[2]
    others = torch.arange(len(problem.labels)) != 3
    for options in (SAMPLED["control"], SAMPLED["no list"]):
        loss = loss_of(objectives.get(**options, backend="triton"), problem, reduction="none")
        assert loss[others].isfinite().all()
        torch.testing.assert_close(loss[3], torch.tensor(-MASKS[mask]), rtol=1e-2, atol=0.0)
        assert all(g.isfinite().all() for g in gradients(loss.sum(), problem))
