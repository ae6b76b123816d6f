"""Published SCE against the paper's algorithm, given the same centres."""

import pytest
import torch
from support.problems import gradients, make_problem

from sce_lm import LogitTransform, objectives
from sce_lm.candidates.buckets import random_centers
from sce_lm.candidates.noise import draw_seed, stream
from sce_lm.objectives.reference import published_sce_reference

OPTIONS = {"num_buckets": 6, "bucket_positions": 11, "bucket_candidates": 23}


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("mix", [False, True], ids=["random", "mix"])
@pytest.mark.parametrize("post", [LogitTransform(), LogitTransform(0.7, 3.0)], ids=["", "cap"])
def test_equals_the_papers_algorithm(post, mix, reduce):
    problem = make_problem(37, 90, 7)
    objective = objectives.get("sce", published=True, mix=mix, reduce=reduce, **OPTIONS)
    seed = draw_seed(torch.Generator().manual_seed(5))
    centers = random_centers(
        problem.hidden.detach(), 6, stream(seed, "centers", torch.device("cpu")), mix=mix
    )
    expected, covered = published_sce_reference(
        problem.head(post), problem.positions(), centers, 11, 23, reduce=reduce
    )
    assert 0 < covered.sum() < 37

    def ours(**options):
        generator = torch.Generator().manual_seed(5)
        return objective(*problem[:3], bias=problem.bias, post=post, generator=generator, **options)

    loss, stats = ours(reduction="none", return_stats=True)
    assert torch.equal(stats.covered, covered)
    torch.testing.assert_close(loss, expected)
    covered_sum = expected.sum() * (37 / covered.sum())
    for options, wanted in (
        ({"reduction": "mean"}, expected.sum() / covered.sum()),
        ({"reduction": "sum"}, covered_sum),
        ({"num_items_in_batch": 50}, covered_sum / 50),
    ):
        actual = ours(**options)
        torch.testing.assert_close(actual, wanted)
        for mine, want in zip(
            gradients(actual, problem),
            torch.autograd.grad(wanted, problem.parameters, retain_graph=True),
        ):
            torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-9)


def test_sizes_are_the_papers():
    sizes = objectives.get("sce", published=True, alpha=2.0, beta=4.0).config.resolve(2500, 10**6)
    assert (sizes.num_buckets, sizes.bucket_positions) == (50, 200)
    assert sizes.bucket_candidates == 256
