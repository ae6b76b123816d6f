"""With candidates that cover the catalogue every estimator is exact cross-entropy."""

import dataclasses

import pytest
import torch
from support.masks import MASKS, SCATTERED, make_pair, stock_loss
from support.problems import gradients, make_problem, relative_error

from sce_lm import LogitTransform, SCEConfig, objectives
from sce_lm.config import PublishedSCEConfig
from sce_lm.objectives.reference import exact_reference
from sce_lm.ops.positions import Positions

N, V, D = 61, 203, 12
NO_SHARED = {"shared_labels": False, "shared_frequent": 0}
COVERING = {
    "exact": None,
    "shared": SCEConfig(num_buckets=0, shared_frequent=V, tail_candidates=0),
    "bucket": SCEConfig(num_buckets=5, bucket_candidates=V, tail_candidates=0, **NO_SHARED),
    "shared, control": SCEConfig(
        num_buckets=0, shared_frequent=V, tail_candidates=V, control_variate=True
    ),
    "bucket, control": SCEConfig(
        num_buckets=5,
        bucket_candidates=V,
        tail_candidates=V,
        control_variate=True,
        **NO_SHARED,
    ),
    "tail": SCEConfig(num_buckets=0, tail_candidates=V, control_variate=False, **NO_SHARED),
    "tail, control": SCEConfig(num_buckets=0, tail_candidates=V, control_variate=True, **NO_SHARED),
    "all three": SCEConfig(
        num_buckets=5, bucket_candidates=40, shared_frequent=20, tail_candidates=V
    ),
    "all three, control": SCEConfig(
        num_buckets=5,
        bucket_candidates=40,
        shared_frequent=20,
        tail_candidates=V,
        control_variate=True,
    ),
    "mixture": SCEConfig(
        num_buckets=0,
        tail_candidates=V,
        prior={"labels": 1, "gradient": 1, "uniform": 1},
        **NO_SHARED,
    ),
    "bucket samples": SCEConfig(
        num_buckets=5, bucket_candidates=V, bucket_sampling="priority", shared_frequent=20
    ),
    "published": SCEConfig.published(num_buckets=3, bucket_positions=N, bucket_candidates=V),
    "published, mean": SCEConfig.published(
        num_buckets=3, bucket_positions=N, bucket_candidates=V, reduce="mean"
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("post", [LogitTransform(), LogitTransform(1.7, 3.0)], ids=["", "cap"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", COVERING)
def test_covering_candidates_are_exact(name, with_bias, post, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    problem = make_problem(N, V, D, with_bias=with_bias, dtype=torch.float64, spread=2.0)
    problem.labels[::7] = -100
    valid = problem.labels != -100
    positions = Positions(problem.hidden[valid], problem.labels[valid])
    exact = exact_reference(problem.head(post), positions)
    config = COVERING[name]
    objective = objectives.get("exact") if config is None else objectives.from_config(config)
    cast = problem._replace(
        **{
            k: None if t is None else t.detach().to(dtype).requires_grad_()
            for k, t in problem._asdict().items()
            if k != "labels"
        }
    )
    for reduction, expected in (("mean", exact.mean()), ("sum", exact.sum()), ("none", exact)):
        loss = objective(*cast[:3], bias=cast.bias, post=post, reduction=reduction)
        assert loss.dtype == dtype
        if reduction == "none":
            assert (loss[~valid] == 0).all()
            torch.testing.assert_close(
                loss[valid], expected.to(dtype), rtol=10 * tolerance, atol=tolerance
            )
            loss, expected = (
                (loss * torch.arange(N)).sum(),
                (expected * torch.arange(N)[valid]).sum(),
            )
        assert relative_error(loss, expected) < tolerance
        pairs = zip(
            gradients(loss, cast),
            torch.autograd.grad(expected, problem.parameters, retain_graph=True),
        )
        for actual, wanted in pairs:
            assert relative_error(actual, wanted) < tolerance


POSTS = {
    "": LogitTransform(),
    "scale": LogitTransform(-0.7),
    "cap": LogitTransform(1.7, 3.0),
}


@pytest.mark.parametrize(
    ("mask", "post", "dtype"),
    [
        pytest.param(
            mask,
            post,
            dtype,
            marks=[]
            if (mask, post, dtype)
            in {
                ("-inf", "", torch.float32),
                ("-1e4", "scale", torch.float32),
                ("-inf", "cap", torch.float64),
            }
            else pytest.mark.slow,
        )
        for mask in MASKS
        for post in POSTS
        for dtype in (torch.float32, torch.float64)
    ],
)
@pytest.mark.parametrize("name", COVERING)
def test_covering_candidates_are_exact_with_masked_classes(name, mask, post, dtype):
    """Lists that hold what is not masked hold everything; under a cap masked classes count."""
    transform, config = POSTS[post], COVERING[name]
    double, _, kept = make_pair(MASKS[mask], SCATTERED, post=transform, spread=2.0)
    exact = stock_loss(double, transform)
    problem = make_pair(MASKS[mask], SCATTERED, dtype, transform, spread=2.0).masked
    if isinstance(config, PublishedSCEConfig):
        config = dataclasses.replace(config, bucket_positions=len(problem.labels))
    objective = objectives.get("exact") if config is None else objectives.from_config(config)
    loss = objective(*problem[:3], bias=problem.bias, post=transform)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-10
    assert relative_error(loss, exact) < tolerance
    found = gradients(loss, problem)
    for actual, wanted in zip(found, gradients(exact, double)):
        assert relative_error(actual, wanted) < tolerance
    for actual in found[1:]:  # under the cap it is flat there
        actual[kept] = 0.0
        assert (actual == 0).all()


def test_published_never_exceeds_exact_on_covered_positions():
    problem = make_problem(N, V, D)
    exact = exact_reference(problem.head(), problem.positions())
    objective = objectives.get("sce", published=True, bucket_candidates=20, alpha=1.0)
    loss, stats = objective(*problem[:3], bias=problem.bias, reduction="none", return_stats=True)
    assert 0 < stats.coverage < 1
    assert stats.coverage == pytest.approx(stats.covered.float().mean().item())
    assert (loss[stats.covered] <= exact[stats.covered] + 1e-12).all()
    assert (loss[~stats.covered] == 0).all()
