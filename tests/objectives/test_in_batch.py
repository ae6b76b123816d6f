"""In-batch softmax: its straight line, its Monte-Carlo test with batches redrawn, frequencies."""

import pytest
import torch
from support.monte_carlo import PAST, V, pool_bias
from support.problems import gradients, make_problem

import sce_lm.objectives.in_batch as module
from sce_lm import LogitTransform, SCEState, objectives
from sce_lm.objectives.in_batch import streaming_frequency
from sce_lm.objectives.reference import position_reference

PLAIN, CAP = LogitTransform(), LogitTransform(1.2, 12.0)


def bias_of(draws, post=PLAIN, size=400, counts=PAST, **options):
    estimator = objectives.get("in_batch", **options)
    estimator.state.counts = counts
    return pool_bias(estimator, draws, post=post, size=size)


@pytest.mark.parametrize("post", [PLAIN, CAP], ids=["", "cap"])
def test_partition_is_unbiased(post):
    bias = bias_of(120, post)
    assert (bias.standard_error <= 0.003).all()
    assert bias.is_zero, bias


def test_planted_errors_are_found(monkeypatch):
    assert not bias_of(100, logq=False).is_zero
    assert not bias_of(100, counts=torch.full((V,), 10**9)).is_zero
    # N draws instead of N - 1: in a batch of 12 that is 8 %.
    monkeypatch.setattr(module, "max", lambda others, _: others + 1, raising=False)
    assert not bias_of(800, size=12).is_zero


def test_small_batches_are_unbiased():
    assert bias_of(800, size=12).is_zero


@pytest.mark.parametrize("logq", [True, False])
def test_equals_the_straight_line(logq):
    problem = make_problem(50, V, 6, spread=1.5)
    estimator = objectives.get("in_batch", logq=logq)
    past = torch.randint(0, V, (500,), generator=torch.Generator().manual_seed(0))
    estimator(torch.zeros(500, 6, requires_grad=True), problem.weight, past)
    loss = estimator(*problem[:3], bias=problem.bias, post=CAP)
    # Every other position's label is a negative, as it stands in the batch, repetitions included.
    ids = problem.labels.expand(50, -1)
    seen = torch.bincount(torch.cat([past, problem.labels]), minlength=V)
    q = seen[ids].double() / 550
    c = -torch.log(49 * q) if logq else torch.zeros_like(q)
    expected = position_reference(problem.head(CAP), problem.positions(), ids, c).mean()
    torch.testing.assert_close(loss, expected)
    for mine, want in zip(gradients(loss, problem), gradients(expected, problem)):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-9)


def test_one_label_for_all_positions_leaves_no_negatives():
    problem = make_problem(4, 20, 3)
    labels = torch.full((4,), 7)
    for part in (slice(0, 4), slice(0, 1)):
        loss = objectives.get("in_batch")(problem.hidden[part], problem.weight, labels[part])
        assert abs(loss) < 1e-15
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, problem[:2]))


def test_streaming_gaps_are_the_formula_and_follow_a_drift():
    state = SCEState()

    def see(*labels, keep=True):
        ids, occurrences = torch.unique(torch.tensor(labels), return_counts=True)
        found = streaming_frequency(state, ids, occurrences, len(labels), 6, 0.25, keep=keep)
        return found.tolist()

    assert see(1, 1, 2, 3) == pytest.approx([2 / 4, 1 / 4, 1 / 4])  # first met: its share so far
    assert see(1, 0, keep=False) == pytest.approx([1 / 6, 1 / (0.75 * 2 + 0.25 * 2)])
    assert see(1, 1, 1, 5) == pytest.approx([1 / (0.75**3 * 2 + (1 - 0.75**3) * 4 / 3), 1 / 8])
    for _ in range(60):
        q = see(2, 2, 2, 4)
    assert q == pytest.approx([3 / 4, 1 / 4], rel=1e-6)


def test_streaming_frequencies_are_saved_and_replayed(tmp_path):
    problem, others = make_problem(30, 50, 4), make_problem(70, 50, 4, seed=1)
    estimator = objectives.get("in_batch", frequency="streaming")
    estimator(*others[:3])
    first = estimator(*problem[:3], generator=torch.Generator().manual_seed(4))
    estimator.state.save(tmp_path / "state.safetensors")
    moved = estimator(*others[:3])
    again = estimator(*problem[:3], generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    other = objectives.get("in_batch", frequency="streaming")
    other.state.load(tmp_path / "state.safetensors")
    assert torch.equal(other(*others[:3]), moved)
    for name, tensor in estimator.state.memory.items():
        assert torch.equal(other.state.memory[name], tensor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequency": "guess"}, "choose one of 'counts', 'streaming'"),
        ({"streaming_rate": 0}, "give one in \\(0, 1\\]"),
        ({"logQ": True}, "did you mean 'logq'"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.get("in_batch", **options)
