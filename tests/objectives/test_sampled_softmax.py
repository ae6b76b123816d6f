"""Sampled softmax: its straight line, its Monte-Carlo test, its limits."""

import math

import pytest
import torch
from support.monte_carlo import V, call_bias, exact_loss, peaked_problem
from support.problems import gradients, make_problem

import sce_lm.candidates.proposals as proposals
import sce_lm.objectives.sampled_softmax as module
from sce_lm import LogitTransform, SCEState, objectives
from sce_lm.objectives.reference import position_reference
from sce_lm.ops.candidate_blocks import Lists

PROPOSALS = ["uniform", "log_uniform", "unigram"]
WAYS = [
    {"sampling": "replacement"},
    {"sampling": "distinct"},
    {"sampling": "priority"},
    {"sampling": "replacement", "shared": False},
    {"sampling": "distinct", "shared": False},
]
PLAIN, CAP = LogitTransform(), LogitTransform(1.2, 12.0)


def way_of(way):
    return way["sampling"] + ("" if way.get("shared", True) else "-own")


def objective(m=120, **options):
    """With a past in which some classes were seen more often than others."""
    made = objectives.get("sampled_softmax", num_negatives=m, **options)
    made.state.counts = 20 + torch.arange(V) * 37 % 81
    return made


def draws_of(way, proposal="unigram"):
    """So many that 240 calls are enough; a priority sample must stay below V."""
    if way["sampling"] == "priority":
        return 190
    return 1600 if proposal == "log_uniform" else 480


CASES = [
    pytest.param(proposal, way, post, id=f"{proposal}-{way_of(way)}{suffix}")
    for post, suffix, proposals_of_it in ((PLAIN, "", PROPOSALS), (CAP, "-cap", ["unigram"]))
    for proposal in proposals_of_it
    for way in WAYS
]


@pytest.mark.parametrize(("proposal", "way", "post"), CASES)
def test_partition_is_unbiased(proposal, way, post):
    estimator = objective(draws_of(way, proposal), proposal=proposal, **way)
    copies = 1 if way.get("shared", True) else 20
    bias = call_bias(estimator, peaked_problem(post), 240, post=post, copies=copies)
    assert (bias.standard_error <= 0.003).all()
    assert bias.is_zero, bias


DRAWS = ("draw_with_replacement", "draw_distinct", "draw_rows", "priority_sample")
PLANTED = {
    "no correction": WAYS,
    "label twice": WAYS,
    "q of another proposal": [way for way in WAYS if way["sampling"] != "priority"],
    "tries forgotten": [way for way in WAYS if way["sampling"] == "distinct"],
    "draws forgotten": [way for way in WAYS if way["sampling"] == "replacement"],
}


def plant(error, monkeypatch):
    """Put one error into the library."""
    if error == "no correction":
        for name in DRAWS:
            draw = getattr(module, name)

            def uncorrected(*args, draw=draw, **options):
                ids, c = draw(*args, **options)
                return ids, torch.where(torch.isfinite(c), 0.0, c)

            monkeypatch.setattr(module, name, uncorrected)
    elif error == "label twice":
        block, make = Lists.block, module.PositionCandidates
        monkeypatch.setattr(Lists, "block", lambda *args: block(*args)._replace(label_columns=[]))
        monkeypatch.setattr(
            module, "PositionCandidates", lambda *args, **fields: make(*args, True, **fields)
        )
    elif error == "q of another proposal":
        flat = proposals.Uniform(V).log_prob
        monkeypatch.setattr(proposals.Categorical, "log_prob", lambda self, ids: flat(ids))
    elif error == "tries forgotten":
        monkeypatch.setattr(proposals, "log_inclusion", lambda log_q, tries: log_q)
    else:
        with_replacement, rows = module.draw_with_replacement, module.draw_rows

        def once(proposal, size, generator):
            ids, _ = with_replacement(proposal, size, generator)
            return ids, -torch.log(size * proposal.log_prob(ids).exp())

        def undivided(proposal, count, size, generator, *, distinct):
            ids, c = rows(proposal, count, size, generator, distinct=distinct)
            return ids, c + math.log(size) - math.log(V)

        monkeypatch.setattr(module, "draw_with_replacement", once)
        monkeypatch.setattr(module, "draw_rows", undivided)


@pytest.mark.parametrize(
    ("error", "way"),
    [pytest.param(e, way, id=f"{e}-{way_of(way)}") for e, ways in PLANTED.items() for way in ways],
)
def test_planted_errors_are_found(error, way, monkeypatch):
    plant(error, monkeypatch)
    estimator = objective(draws_of(way), proposal="unigram", **way)
    copies = 1 if way.get("shared", True) else 20
    assert not call_bias(estimator, peaked_problem(), 160, copies=copies).is_zero


@pytest.mark.parametrize("way", WAYS, ids=way_of)
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_equals_the_straight_line_given_the_draw(proposal, way, monkeypatch):
    problem = make_problem(30, V, 6, spread=1.5)
    drawn = []
    for name in DRAWS:
        draw = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, draw=draw, **options: drawn.append(draw(*args, **options)) or drawn[-1],
        )
    loss = objective(50, proposal=proposal, **way)(*problem[:3], bias=problem.bias, post=CAP)
    ids, c = drawn[0]
    expected = position_reference(
        problem.head(CAP), problem.positions(), ids.expand(30, -1), c.expand(30, -1)
    ).mean()
    torch.testing.assert_close(loss, expected)
    for mine, want in zip(gradients(loss, problem), gradients(expected, problem)):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("m", [V, V + 1, 10 * V])
def test_a_priority_sample_of_the_catalogue_is_exact(m):
    problem = make_problem(20, V, 6)
    estimator = objective(m, sampling="priority", proposal="unigram")
    loss = estimator(*problem[:3], bias=problem.bias)
    expected = exact_loss(problem).mean()
    torch.testing.assert_close(loss, expected)
    for mine, want in zip(gradients(loss, problem), gradients(expected, problem)):
        torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("shared", [True, False])
def test_distinct_draws_become_exact_with_the_number_of_tries(shared):
    problem = make_problem(5, 12, 4)
    estimator = objectives.get(
        "sampled_softmax",
        num_negatives=1000,
        proposal="uniform",
        sampling="distinct",
        shared=shared,
    )
    loss = estimator(*problem[:3], bias=problem.bias)
    torch.testing.assert_close(loss, exact_loss(problem).mean())


def test_unigram_follows_the_labels():
    problem = make_problem(40, V, 6)
    estimator = objectives.get("sampled_softmax", proposal="unigram", power=1.0, uniform_floor=0.1)
    estimator(*problem[:3])
    counts = torch.bincount(problem.labels, minlength=V)
    assert torch.equal(estimator.state.counts, counts)
    q = estimator._proposal(estimator.state.counts).log_prob(torch.arange(V)).exp()
    torch.testing.assert_close(q, 0.9 * counts.double() / 40 + 0.1 / V)
    assert (q > 0).all()  # a class that was never seen has a bounded weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "num_negatives is 0; give an integer from 1 up"),
        ({"num_negatives": 2.5}, "give an integer"),
        ({"proposal": "bigram"}, "proposal is 'bigram'; choose one of 'unigram'"),
        ({"sampling": "priority", "shared": False}, "a priority sample for each position"),
        ({"uniform_floor": 0.0}, "uniform_floor is 0.0; give one in \\(0, 1\\]"),
        ({"power": -0.5}, "power is -0.5; give one in \\[0, 1\\]"),
        ({"num_negative": 5}, "did you mean 'num_negatives'"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.get("sampled_softmax", **options)


def test_a_state_of_another_vocabulary_is_refused(tmp_path):
    problem = make_problem(8, V, 6)
    estimator = objectives.get("sampled_softmax", proposal="unigram")
    estimator(*problem[:3])
    estimator.state.save(tmp_path / "state.safetensors")
    smaller = objectives.SampledSoftmax(estimator.config, SCEState())
    smaller.state.load(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=f"counts {V} classes but weight has 100"):
        smaller(problem.hidden, problem.weight[:100], problem.labels.clamp_max(99))
