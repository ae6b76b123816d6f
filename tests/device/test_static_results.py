"""The way of a call that waits for no device gives what the ordinary way gives, for the same draws:
compared on a CPU, where both can run."""

import copy
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import gradients, make_problem
from torch.utils.checkpoint import checkpoint

from sce_lm import LogitTransform, SCEState, objectives
from sce_lm.candidates.distinct import distinct
from sce_lm.objectives import labels
from sce_lm.ops import candidate_blocks
from sce_lm.ops.static_shapes import static_shapes

TAIL = {"num_buckets": 0, "tail_candidates": 20, "shared_frequent": 0}
OBJECTIVES = {
    "exact": lambda: objectives.get("exact"),
    "exact, terms": lambda: objectives.get("exact", z_loss=0.1, label_smoothing=0.1),
    "in batch": lambda: objectives.get("in_batch"),
    "in batch, streaming": lambda: objectives.get("in_batch", frequency="streaming"),
    "sampled softmax": lambda: objectives.get("sampled_softmax", num_negatives=30),
    "distinct": lambda: objectives.get("sampled_softmax", num_negatives=30, sampling="distinct"),
    "priority": lambda: objectives.get("sampled_softmax", num_negatives=30, sampling="priority"),
    "gbce": lambda: objectives.get("gbce", num_negatives=20, shared=True),
    "sce": lambda: objectives.get("sce", **TAIL),
    "sce, no control": lambda: objectives.get("sce", **TAIL, control_variate=False),
    "sce, no labels": lambda: objectives.get("sce", **TAIL, shared_labels=False, z_loss=0.1),
    "sce, all classes": lambda: objectives.get("sce", num_buckets=0, tail_candidates=500),
}
BUCKETS = {**TAIL, "num_buckets": 3, "bucket_candidates": 8}
SAMPLED_BUCKETS = {"bucket_sampling": "priority", "num_buckets": 3, "bucket_candidates": 15}
SAMPLED_BUCKETS |= {"shared_frequent": 9}
BY_POSITION = {
    "own": lambda: objectives.get("sampled_softmax", num_negatives=2, shared=False),
    "own, many": lambda: objectives.get("sampled_softmax", num_negatives=7, shared=False),
    "bir": lambda: objectives.get("bir", num_negatives=5),
    "bir, importance": lambda: objectives.get("bir", num_negatives=5, correction="importance"),
    "bce": lambda: objectives.get("bce", num_negatives=2),
    "control": lambda: objectives.get("sce", **BUCKETS, control_variate=True),
    "xir": lambda: objectives.get("xir", num_negatives=8, cache_size=20),
    "xir, importance": lambda: objectives.get(
        "xir", num_negatives=8, cache_size=20, correction="importance", cache_from="drawn"
    ),
    "rece": lambda: objectives.get("rece"),
    "rece, rounds": lambda: objectives.get("rece", rounds=3, extra_chunks=0),
    "kernel": lambda: objectives.get("kernel", num_negatives=9),
    "kernel, quartic": lambda: objectives.get(
        "kernel", num_negatives=9, kernel="quartic", alpha="auto", center=True
    ),
    "kernel, shared": lambda: objectives.get("kernel", num_negatives=9, shared=True),
    "published": lambda: objectives.get("sce", published=True, bucket_candidates=9),
    "published, mean": lambda: objectives.get(
        "sce", published=True, bucket_candidates=9, reduce="mean", num_buckets=5
    ),
    "no control": lambda: objectives.get("sce", **BUCKETS, control_variate=False, z_loss=0.1),
    "sampled buckets": lambda: objectives.get("sce", **SAMPLED_BUCKETS),
    "gradient prior": lambda: objectives.get("sce", **TAIL, prior="gradient"),
    "gradient prior, buckets": lambda: objectives.get("sce", **BUCKETS, prior="gradient"),
    "row control": lambda: objectives.get("sce", **TAIL, row_control_variate=True),
    "row control, buckets": lambda: objectives.get("sce", **BUCKETS, row_control_variate=True),
}
"""Objectives that draw for positions or among them, which gives the same only where all have a
label."""
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


@st.composite
def cases(draw):
    """A problem some of whose positions have no label, and the call's options."""
    num_positions = draw(st.integers(1, 40))
    problem = make_problem(
        num_positions, draw(st.integers(2, 130)), draw(st.integers(1, 7)), with_bias=False
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        bias = torch.randn(len(problem.weight), generator=generator, dtype=torch.float64)
        problem = problem._replace(bias=bias.requires_grad_())
    ignored = torch.rand(num_positions, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))
    hidden = problem.hidden.detach().masked_fill(ignored[:, None], torch.nan)
    problem = problem._replace(
        hidden=hidden.requires_grad_(), labels=problem.labels.masked_fill(ignored, -100)
    )
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "post": draw(st.sampled_from([LogitTransform(0.7), LogitTransform(2.0, 3.0)])),
    }
    if draw(st.booleans()):
        options["token_weights"] = torch.rand(num_positions, generator=generator)
    if options["reduction"] != "none" and draw(st.booleans()):
        options["num_items_in_batch"] = 7
    return problem, options


def train(objective, problem, options):
    """Losses and gradients of two calls, and the state."""
    generator, found = torch.Generator().manual_seed(5), []
    for _ in range(2):
        loss = objective(*problem[:3], bias=problem.bias, generator=generator, **options)
        factor = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
        found += [loss.detach(), *gradients((loss * factor).sum(), problem)]
    return found, objective.state


def assert_same(make, problem, options):
    """The two ways agree in losses, gradients, and what the state counts."""
    expected, state = train(make(), problem, options)
    with static_shapes():
        found, mine = train(make(), problem, options)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    if state is not None and state.counts is not None:
        assert torch.equal(mine.counts, state.counts)
        assert (mine.step, int(mine.num_labels)) == (state.step, state.num_labels)
    return mine, state


@each_objective
@settings(max_examples=12)
@given(case=cases())
def test_same_loss_gradients_and_counts(name, case):
    problem, options = case
    if name == "exact, terms":
        options["post"] = LogitTransform(0.7)
    assert_same(OBJECTIVES[name], problem, options)


@pytest.mark.parametrize("post", [LogitTransform(0.7), LogitTransform(2.0, 3.0)], ids=str)
@pytest.mark.parametrize("name", BY_POSITION)
def test_same_where_all_have_labels(name, post):
    problem = make_problem(40, 130, 6, with_bias=post.soft_cap is not None)
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "post": post}
        mine, state = assert_same(BY_POSITION[name], problem, options)
    # What was measured of the tail waits to be read.
    assert all(torch.is_tensor(mine.averages[k]) for k in mine.averages if "variance" in k)
    measured = {k: v for k, v in state.summary().items() if "error" in k}
    assert measured == pytest.approx({k: mine.summary()[k] for k in measured}, rel=1e-6)
    assert mine.prefer_control_variate == state.prefer_control_variate


@pytest.mark.parametrize("budget", [2**22, 600], ids=["one block", "many blocks"])
@pytest.mark.parametrize("ignored", [1, 20, 38], ids=str)
@pytest.mark.parametrize(
    "covering",
    [
        {"bucket_candidates": 30, "tail_candidates": 200},
        {"bucket_candidates": 200, "bucket_sampling": "priority"},  # with slots left over
    ],
    ids=["top", "sampled"],
)
def test_covering_buckets_are_exact_beside_ignored_positions(
    covering, ignored, budget, monkeypatch
):
    monkeypatch.setattr(candidate_blocks, "BLOCK_ELEMENTS", budget)
    problem = make_problem(40, 120, 6, with_bias=False)
    problem.labels[torch.randperm(40, generator=torch.Generator().manual_seed(0))[:ignored]] = -100
    expected, _ = train(objectives.get("exact"), problem, {})
    with static_shapes():
        covering = {"num_buckets": 5, "shared_frequent": 0, **covering}
        found, _ = train(objectives.get("sce", **covering), problem, {})
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", BY_POSITION)
def test_ignored_positions_have_no_part(name, reduction):
    problem = make_problem(40, 120, 6, with_bias=False)
    problem.labels[::3] = -100
    hidden = problem.hidden.detach().clone()
    with static_shapes():
        clean, _ = train(BY_POSITION[name](), problem, {"reduction": reduction})
        hidden[::3] = torch.nan
        problem = problem._replace(hidden=hidden.requires_grad_())
        found, _ = train(BY_POSITION[name](), problem, {"reduction": reduction})
    assert all(torch.equal(a, b) for a, b in zip(found, clean))
    assert all((found[k][::3] == 0).all() for k in (1, 4))
    assert reduction == "mean" or (found[0][::3] == 0).all()


def test_frequent_classes_are_listed_once():
    state, problem = SCEState(), make_problem(30, 60, 5, with_bias=False)
    state.counts = torch.randperm(60, generator=torch.Generator().manual_seed(0)) * 100
    options = {"num_buckets": 0, "tail_candidates": 15, "shared_frequent": 20}

    def make():
        objective = objectives.get("sce", **options)
        objective.state = copy.deepcopy(state)
        return objective

    assert_same(make, problem, {})


def test_a_checkpointed_call_is_replayed():
    problem = make_problem(30, 60, 5, with_bias=False)
    problem.labels[::3] = -100
    found = []
    for recompute in (False, True):
        objective = objectives.get("sce", num_buckets=0, tail_candidates=15)
        torch.manual_seed(3)
        with static_shapes():
            for _ in range(2):
                inputs = (objective, *problem[:3])
                loss = (
                    call(*inputs)
                    if not recompute
                    else checkpoint(call, *inputs, use_reentrant=False)
                )
                found.append([loss, *gradients(loss, problem)])
        assert int(objective.state.num_labels) == int(objective.state.counts.sum()) == 40
    for a, b in zip(found[:2], found[2:]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def call(objective, hidden, weight, labels):
    return objective(hidden, weight, labels)


@given(
    st.lists(st.tuples(st.integers(0, 11), st.booleans()), min_size=1, max_size=30),
    st.sampled_from([12, 13, 40]),
)
def test_distinct_classes(places, vocab_size):
    ids, is_there = (torch.tensor(part) for part in zip(*places))
    with static_shapes():
        found = distinct(ids, vocab_size, is_there)
    assert len(found.ids) == min(len(ids), vocab_size)
    assert ((found.ids >= 0) & (found.ids < vocab_size)).all()
    assert found.is_spare is not None
    kept = ~found.is_spare
    wanted = torch.unique(ids[is_there], return_counts=True)
    assert torch.equal(found.ids[kept], wanted[0])
    assert torch.equal(found.occurrences[kept], wanted[1])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"labels": 61}, r"labels holds an id outside \[0, 60\) and not ignore_index=-100"),
        ({"labels": -5}, r"labels holds an id outside \[0, 60\) and not ignore_index=-100"),
        ({"token_weights": -1.0}, "give each position with a label a finite weight"),
        ({"token_weights": torch.nan}, "give each position with a label a finite weight"),
    ],
)
def test_the_device_checks_what_the_host_does_not_read(wrong, sentence):
    problem = make_problem(30, 60, 5, with_bias=False)
    inputs = {"labels": problem.labels.clone(), "token_weights": torch.ones(30)}
    for name, value in wrong.items():
        inputs[name][7] = value
    objective = objectives.get("exact")
    with static_shapes(), mock.patch.object(labels, "looked_at", set()):
        # The first call looks before it leaps, and the device stops the others.
        with pytest.raises(ValueError, match=r"labels holds|token_weights holds"):
            objective(*problem[:2], **inputs)
        objective(*problem[:3])
        with pytest.raises(RuntimeError, match=sentence):
            objective(*problem[:2], **inputs)
        where_ignored = inputs["labels"].clone()
        where_ignored[7] = -100
        objective(*problem[:2], **(inputs | {"labels": where_ignored}))


def test_statistics_are_those_of_valid_positions():
    problem = make_problem(30, 60, 5, with_bias=False)
    problem.labels[::3] = -100
    found = []
    for way in (nullcontext, static_shapes):
        with way():
            options = {"return_stats": True, "generator": torch.Generator().manual_seed(0)}
            exact = objectives.get("exact")(*problem[:3], **options)[1]
            options["generator"] = torch.Generator().manual_seed(0)
            sampled = objectives.get("sce", **TAIL)(*problem[:3], **options)[1]
            found.append((exact, sampled))
    (exact, sampled), (mine, my_sampled) = found
    assert mine.num_valid == exact.num_valid == my_sampled.num_valid == 20
    assert torch.equal(mine.correct, exact.correct)
    torch.testing.assert_close(mine.confidence, exact.confidence)
    torch.testing.assert_close(my_sampled.relative_error, sampled.relative_error)
    assert torch.equal(my_sampled.candidates, sampled.candidates)


@pytest.mark.parametrize("name", ["sce", "gbce", "priority"])
def test_a_bias_is_looked_at_for_masks_once(name):
    problem = make_problem(30, 60, 5)
    assert problem.bias is not None
    masked = problem.bias.detach().index_fill(0, torch.tensor([3]), -torch.inf)
    problem.labels.clamp_min_(4)
    objective = OBJECTIVES[name]()
    with static_shapes():
        for _ in range(2):  # waits for the device, and leaves the class out
            loss = objective(*problem[:3], bias=masked)
            assert loss.isfinite()
        bias = problem.bias.detach().clone()
        objective(*problem[:3], bias=bias)
        bias[3] = -torch.inf
        with pytest.raises(RuntimeError, match="bias masks classes and did not at its first call"):
            objective(*problem[:3], bias=bias)
