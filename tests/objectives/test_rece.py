"""RECE: the paper's union of chunks, its limits and its bound."""

import pytest
import torch
from support.monte_carlo import exact_loss
from support.problems import gradients, make_problem

from sce_lm import LogitTransform, objectives
from sce_lm.objectives.reference import rece_reference

N, V, D = 61, 203, 6
POSTS = [LogitTransform(), LogitTransform(-0.3), LogitTransform(1.5, 2.0)]


def chunks_of(estimator, monkeypatch):
    """The chunks of each later call."""
    made = []
    choose = type(estimator)._chunks
    monkeypatch.setattr(
        type(estimator), "_chunks", lambda *args: made.append(choose(*args)) or made[-1]
    )
    return made


@pytest.mark.parametrize("post", POSTS, ids=["", "scaled", "cap"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rounds": 3, "num_buckets": 20},
        {"rounds": 2, "num_buckets": 30, "buckets_per_chunk": 3, "extra_chunks": 2},
        {"num_buckets": 500, "extra_chunks": 0},
    ],
    ids=str,
)
def test_equals_the_papers_union(options, with_bias, post, monkeypatch):
    problem = make_problem(N, V, D, with_bias=with_bias)
    estimator = objectives.get("rece", **options)
    made = chunks_of(estimator, monkeypatch)
    loss = estimator(
        *problem[:3],
        bias=problem.bias,
        post=post,
        reduction="none",
        generator=torch.Generator().manual_seed(0),
    )
    chunks = made[0]
    assert chunks.of_position.shape == (estimator.config.rounds, N)
    expected = rece_reference(
        problem.head(post),
        problem.positions(),
        chunks.of_position,
        chunks.of_class,
        estimator.config.extra_chunks,
    )
    torch.testing.assert_close(loss, expected)
    weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    cases = [((loss * weights).sum(), (expected * weights).sum())]
    scalar = estimator(
        *problem[:3], bias=problem.bias, post=post, generator=torch.Generator().manual_seed(0)
    )
    cases.append((scalar, expected.mean()))
    for ours, wanted in cases:
        torch.testing.assert_close(ours, wanted)
        for mine, want in zip(
            gradients(ours, problem),
            torch.autograd.grad(wanted, problem.parameters, retain_graph=True),
        ):
            torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [{"num_buckets": 1}, {"num_buckets": 8, "extra_chunks": 7, "rounds": 2}],
    ids=["one chunk", "all neighbours"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_catalogue_is_exact(options, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    problem = make_problem(N, V, D, dtype=dtype, spread=2.0)
    loss = objectives.get("rece", **options)(*problem[:3], bias=problem.bias)
    expected = exact_loss(problem).mean()
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for mine, want in zip(gradients(loss, problem), gradients(expected, problem)):
        torch.testing.assert_close(mine, want, rtol=10 * tolerance, atol=tolerance)


def test_a_lower_bound_that_rounds_lift():
    problem = make_problem(N, V, D, spread=2.0)
    exact = exact_loss(problem)
    means = []
    for rounds in (1, 2, 6):
        loss, stats = objectives.get("rece", rounds=rounds, num_buckets=20)(
            *problem[:3],
            bias=problem.bias,
            reduction="none",
            return_stats=True,
            generator=torch.Generator().manual_seed(0),
        )
        assert stats.coverage == 1.0
        assert (loss <= exact + 1e-12).all()
        means.append(float(loss.detach().mean()))
    assert means[0] < means[1] < means[2] < exact.mean()


def test_hashing_meets_more_of_the_mass_than_chance():
    """What a position meets holds more of its softmax than as many classes at random."""
    problem = make_problem(400, 2000, 16, with_bias=False, spread=4.0)
    objective = objectives.get("rece", num_buckets=60, extra_chunks=1)
    seeded = torch.Generator().manual_seed(0)
    loss = objective(*problem[:3], reduction="none", generator=seeded)
    share = (loss - exact_loss(problem)).exp().mean()  # Zhat / Z
    assert share > 2 * 3 / 60


def test_sizes_are_the_papers():
    config = objectives.RECEConfig(extra_chunks=2, buckets_per_chunk=2)
    assert config.resolve(1000, 10**6) == (200, 100)
    assert config.resolve(10**6, 1000) == (200, 100)
    assert objectives.RECEConfig(num_buckets=500).resolve(7, 100) == (500, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "RECEConfig.rounds is 0; give an integer from 1 up"),
        ({"extra_chunks": -1}, "give an integer from 0 up"),
        ({"num_buckets": 2, "buckets_per_chunk": 3}, "more than num_buckets=2"),
        ({"n_buckets": 2}, "did you mean 'num_buckets'"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.get("rece", **options)
