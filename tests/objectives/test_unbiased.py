"""The corrected partition function is unbiased, and the test that says so can fail.

A problem of 6 positions, 240 classes, 5 times the same label that holds 20-50 % of Z; every case
has a standard error of at most 0.3 % and no position may be off by more than five of them.
"""

import dataclasses

import pytest
import torch
from support.estimators import measure
from support.monte_carlo import CAP, LISTS, PLAIN, peaked_problem
from support.planted import PLANTED, plant

import sce_lm.candidates.priority as priority
import sce_lm.objectives.sce as sce
from sce_lm import SCEConfig, objectives
from sce_lm.candidates.weight_classes import WeightClasses
from sce_lm.objectives.tail_proposal import TailProposal
from sce_lm.ops.control_variate import Rest


def bucket_samples(**options):
    fields = {"bucket_candidates": 80, "bucket_sampling": "priority", "shared_frequent": 12}
    fields |= {"num_buckets": 2, "shared_labels": False, "uniform_floor": 0.3}
    return sce.SCE(SCEConfig(**{**fields, **options}))


def objective(lists, *, control, m=80, **options):
    fields = {"tail_candidates": m, "control_variate": control, "uniform_floor": 0.3}
    return sce.SCE(SCEConfig(**{**fields, **LISTS[lists], **options}))


def check(estimator, problem, post=PLAIN, draws=1000):
    bias = measure(estimator, problem, post, draws)
    assert (bias.standard_error <= 0.003).all()
    assert bias.is_zero, bias


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("with_bias", "post"),
    [
        pytest.param(False, PLAIN, marks=SLOW, id="plain head"),
        pytest.param(True, PLAIN, marks=SLOW, id="bias"),
        pytest.param(False, CAP, marks=SLOW, id="cap"),
        pytest.param(True, CAP, id="bias and cap"),
    ],
)
@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize("lists", LISTS)
def test_partition_is_unbiased(lists, control, with_bias, post):
    check(objective(lists, control=control), peaked_problem(post, with_bias=with_bias), post)


PRIORS = {
    "uniform": {"prior": "uniform"},
    "labels": {"prior_power": 1.0, "uniform_floor": 0.5},
    "flat labels": {"prior_power": 0.0, "uniform_floor": 0.9},
}


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize("prior", PRIORS)
def test_every_label_prior_is_unbiased(prior, control):
    check(objective("all", control=control, **PRIORS[prior]), peaked_problem())


MIXTURE = {"labels": 2.0, "gradient": 1.0}


@pytest.mark.parametrize(
    ("prior", "lists", "control"),
    [("gradient", "tail", True), (MIXTURE, "tail", False), (MIXTURE, "buckets", True)],
    ids=str,
)
def test_gradients_at_the_centres_and_mixtures_are_unbiased(prior, lists, control):
    check(objective(lists, control=control, prior=prior), peaked_problem())


@pytest.mark.parametrize(
    ("prior", "post"), [("labels", CAP), ("gradient", PLAIN)], ids=["labels", "gradient"]
)
def test_bucket_samples_are_unbiased(prior, post):
    check(bucket_samples(prior=prior), peaked_problem(post), post)


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize("tile", [35, 100])
def test_tiles_with_thresholds_of_their_own_are_unbiased(tile, control, monkeypatch):
    def tiled(proposal, size, generator, *, backend):
        return priority.priority_sample(proposal, size, generator, tile=tile, backend=backend)

    monkeypatch.setattr(sce, "priority_sample", tiled)
    check(objective("buckets", control=control), peaked_problem())


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize("prior", ["labels", "uniform"])
def test_large_catalogues_are_unbiased(prior, control, monkeypatch):
    monkeypatch.setattr(sce, "LARGE_CATALOGUE", 0)
    check(objective("buckets", control=control, prior=prior), peaked_problem())


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, control, monkeypatch):
    if error == "mean of b" and not control:
        control, post = True, CAP  # only the control variate reads the mean: with and without cap
    else:
        post = PLAIN
    # The wrong threshold is off by 1/m of what is sampled: a small m and a wide spread show it.
    is_tau = error == "tau the m-th"
    lists, m, draws, spread = ("tail", 3, 8000, 1.0) if is_tau else ("buckets", 80, 1000, 0.5)
    estimator, problem = (
        objective(lists, control=control, m=m),
        peaked_problem(post, spread=spread),
    )
    bias = measure(estimator, problem, post, draws, plant(error, monkeypatch))
    assert not bias.is_zero, bias


@pytest.mark.parametrize("part", ["labels", "gradient"])
def test_a_mixture_weighed_by_one_of_its_parts_is_found(part, monkeypatch):
    """The planted error of mixtures: drawn from all of them, weighed by the density of one."""
    options = {"control": False, "m": 60}
    one, made = objective("tail", prior=part, **options), []

    class Remembered(TailProposal):
        def __init__(self, config, *call):
            super().__init__(config, *call)
            made.append(TailProposal(one.config, *call))

    def wrong(proposal, size, generator, **options):
        ids, c = priority.priority_sample(proposal, size, generator, **options)
        alone = made.pop().log_density()
        return ids, (c + proposal[ids] - alone[ids]).clamp_min(0.0)

    monkeypatch.setattr(sce, "priority_sample", wrong)
    monkeypatch.setattr(sce, "TailProposal", Remembered)
    estimator = objective("tail", prior=MIXTURE, **options)
    assert not measure(estimator, peaked_problem(), PLAIN, 300).is_zero


@pytest.mark.parametrize("error", ["mean of everything", "size of everything"])
def test_a_rest_that_still_has_the_buckets_items_is_found(error, monkeypatch):
    init, set_means = Rest.__init__, Rest.set_means

    def whole_size(rest, lists, row_sum):
        init(rest, lists, row_sum)
        rest.size += lists.bucket_size

    def whole_mean(rest, buckets, item_rows):
        set_means(rest, buckets, torch.zeros_like(item_rows))

    if error == "size of everything":
        monkeypatch.setattr(Rest, "__init__", whole_size)
    else:
        monkeypatch.setattr(Rest, "set_means", whole_mean)
    estimator = objective("buckets", control=True)
    assert not measure(estimator, peaked_problem(), PLAIN, 500).is_zero


def test_forgotten_weights_of_bucket_samples_are_found():
    def forget(c):
        return dataclasses.replace(c, bucket_log_weights=torch.zeros_like(c.bucket_log_weights))

    assert not measure(bucket_samples(), peaked_problem(), PLAIN, 500, forget).is_zero


def test_weights_of_another_bucket_are_found(monkeypatch):
    samples = sce.bucket_samples

    def swapped(*args):
        ids, c = samples(*args)
        return ids, c.flip(0)

    monkeypatch.setattr(sce, "bucket_samples", swapped)
    estimator = bucket_samples()
    assert not measure(estimator, peaked_problem(), PLAIN, 500).is_zero


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
def test_weights_of_a_large_catalogue_matter(control, monkeypatch):
    """The planted error of its own: inclusion probabilities of another size."""
    monkeypatch.setattr(sce, "LARGE_CATALOGUE", 0)
    sample = WeightClasses.sample

    def wrong(classes, size, *args, **options):
        ids, c = sample(classes, size, *args, **options)
        return ids, (c - 0.1).clamp_min(0.0)

    monkeypatch.setattr(WeightClasses, "sample", wrong)
    assert not measure(objective("buckets", control=control), peaked_problem(), PLAIN, 1000).is_zero


@pytest.mark.parametrize("lists", ["buckets", "all"])
def test_without_correction_it_is_biased(lists):
    estimator = objective(lists, control=False, m=0)
    assert not measure(estimator, peaked_problem(), PLAIN, 20).is_zero


def test_published_is_a_lower_bound():
    estimator = objectives.get(
        "sce", published=True, num_buckets=4, bucket_candidates=40, bucket_positions=3
    )
    problem = peaked_problem()
    hidden, weight, labels, bias = (t.detach() for t in problem)
    s = hidden @ weight.T + bias
    exact = torch.logsumexp(s, dim=1) - s.gather(1, labels[:, None]).squeeze(1)
    for _ in range(20):
        loss, stats = estimator(
            hidden, weight, labels, bias=bias, reduction="none", return_stats=True
        )
        assert ((loss < exact - 0.01) | ~stats.covered).all()
