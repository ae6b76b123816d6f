"""Classes that a bias masks are as good as gone, in every objective.

Padding and retired items have biases of -inf, -1e4, -1e9 or finfo.min. With the same seed an
objective then has the loss and the gradients of the head without them, and theirs are 0.
"""

import copy
import dataclasses
import math

import pytest
import torch
from support.masks import AT_THE_END, MASKS, OBJECTIVES, OTHERS, SCATTERED, make_pair, stock_loss
from support.monte_carlo import LISTS, PLAIN, call_bias, exact_loss, peaked_problem
from support.problems import Problem, gradients, relative_error

import sce_lm.objectives.sce as sce
from sce_lm import LogitTransform, SCEConfig, SCEState, objectives, sce_loss
from sce_lm.candidates.masks import FAR_BELOW, is_masked, within_reach
from sce_lm.objectives.probe import Probe
from sce_lm.ops.head import EVERYTHING

NEGATIVE, CAP = LogitTransform(-0.8), LogitTransform(1.3, 5.0)
SLOW = pytest.mark.slow


def masks(*fast):
    """All of them, those that are not named by the slow tests."""
    return pytest.mark.parametrize(
        "mask", [pytest.param(m, marks=[] if m in fast else SLOW) for m in MASKS]
    )


every_mask = masks("-1e9", "-inf")


def loss_of(objective, problem, seed, post=PLAIN, **options):
    return objective(
        *problem[:3],
        bias=problem.bias,
        post=post,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def assert_as_if_removed(specification, pair, tolerance, post=PLAIN):
    """Three calls, each with the state that the one before has left."""
    objective, alone = (objectives.get(**specification) for _ in range(2))
    for seed in range(3):
        options = {"reduction": "none"} if seed == 1 else {}
        (loss, stats), (want, expected) = (
            loss_of(o, problem, seed, post, return_stats=True, **options)
            for o, problem in ((objective, pair.masked), (alone, pair.removed))
        )
        torch.testing.assert_close(loss, want, rtol=tolerance, atol=tolerance)
        assert stats.coverage == expected.coverage
        assert stats.products_per_position >= expected.products_per_position
        if stats.candidates is not None:
            assert torch.isin(stats.candidates, pair.kept).all()
        if stats.relative_error is not None:
            torch.testing.assert_close(
                stats.relative_error, expected.relative_error, rtol=1e-3, atol=1e-5
            )
        found = gradients(loss.sum(), pair.masked)
        for actual, wanted in zip(found, gradients(want.sum(), pair.removed)):
            rows = actual if len(actual) == len(wanted) else actual[pair.kept]
            assert relative_error(rows, wanted) < 10 * tolerance
        for actual in found[1:]:
            gone = torch.ones(len(actual), dtype=torch.bool)
            gone[pair.kept] = False
            assert (actual[gone] == 0).all()
    if objective.state is not None:
        assert objective.state.summary().keys() == alone.state.summary().keys()
        assert all(math.isfinite(x) for x in objective.state.summary().values())


def test_the_table_has_every_objective():
    assert {o["name"] for o in OBJECTIVES.values()} == set(objectives.names())


@every_mask
@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_is_as_if_removed(name, mask):
    assert_as_if_removed(OBJECTIVES[name], make_pair(MASKS[mask]), 1e-9)


@pytest.mark.parametrize("mask", ["finfo.min", pytest.param("-1e4", marks=SLOW)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_is_as_if_removed_in_single_precision(name, mask):
    tolerance = 1e-3 if "kernel" in name else 1e-4  # a draw's block may turn on a rounding
    assert_as_if_removed(OBJECTIVES[name], make_pair(MASKS[mask], dtype=torch.float32), tolerance)


@every_mask
@pytest.mark.parametrize("name", OTHERS)
def test_classes_in_between_are_as_if_removed(name, mask):
    assert_as_if_removed(OTHERS[name], make_pair(MASKS[mask], SCATTERED), 1e-9)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["sce, control", "sce, gradient", "kernel", "sampled_softmax"])
def test_under_a_negative_scale_a_mask_is_positive(name, mask):
    assert_as_if_removed(OBJECTIVES[name], make_pair(MASKS[mask], post=NEGATIVE), 1e-9, NEGATIVE)


@pytest.mark.parametrize(
    "name", ["sce, control", "sce, row control", "sce, mixture", "kernel", "xir"]
)
def test_all_but_a_few_classes_are_masked(name):
    pair = make_pair(-torch.inf, torch.arange(170, 1170))
    assert_as_if_removed(OBJECTIVES[name], pair, 1e-8)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_the_labels_are_left(name):
    """Six classes, which every list holds."""
    pair = make_pair(-torch.inf)
    labels = pair.masked.labels % 6
    bias = torch.where(torch.arange(len(pair.masked.bias)) < 6, pair.masked.bias, -torch.inf)
    problem = Problem(*pair.masked[:2], labels, bias.detach().requires_grad_())
    loss = loss_of(objectives.get(**OBJECTIVES[name]), problem, 0)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(loss, problem))
    if name.startswith("sce") and not {"published", "mean", "first"} & set(name.split()):
        assert relative_error(loss, stock_loss(problem)) < 1e-9


@every_mask
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_masked_label_has_the_loss_that_it_has_without_sampling(name, mask):
    """Infinite or huge, at its own position alone; gradients stay finite."""
    pair = make_pair(MASKS[mask])
    pair.masked.labels[[3, 9]] = AT_THE_END[2]
    objective = objectives.get(**OBJECTIVES[name])
    for seed in range(2):
        loss = loss_of(objective, pair.masked, seed, reduction="none")
        others = torch.ones(len(loss), dtype=torch.bool)
        others[[3, 9]] = False
        assert loss[others].isfinite().all()
        if "published" not in name and "mean" not in name:  # where a position may be in no bucket
            share = 1.0
            if name in ("bce", "gbce"):
                config = objective.config
                share = config.positive_weight(len(pair.kept)) / (1 + config.num_negatives)
            torch.testing.assert_close(
                loss[~others],
                torch.full_like(loss[~others], -share * MASKS[mask]),
                rtol=2e-2,
                atol=0,
            )
    loss = loss_of(objective, pair.masked, 2)
    assert all(g.isfinite().all() for g in gradients(loss, pair.masked))


def test_gradients_of_a_masked_label_are_those_of_stock_cross_entropy():
    pair = make_pair(-torch.inf)
    pair.masked.labels[3] = AT_THE_END[2]
    covering = SCEConfig(
        num_buckets=0, shared_frequent=50, tail_candidates=500, control_variate=True
    )
    for config in (covering, dataclasses.replace(covering, shared_labels=False)):
        found = gradients(loss_of(objectives.from_config(config), pair.masked, 0), pair.masked)
        for actual, wanted in zip(found, gradients(stock_loss(pair.masked), pair.masked)):
            assert relative_error(actual, wanted) < 1e-9


@masks("-inf")
@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
def test_under_a_soft_cap_a_masked_class_counts(control, mask):
    """The cap brings it back to ``-soft_cap``, as it does in the model."""
    post = LogitTransform(1.2, 12.0)
    problem = _peaked(post, MASKS[mask])
    exact = exact_loss(problem, post)
    assert exact.isfinite().all()
    config = SCEConfig(
        **{**LISTS["all"], "tail_candidates": 80, "uniform_floor": 0.5, "control_variate": control}
    )
    bias = call_bias(sce.SCE(config), problem, 400, post=post)
    assert (bias.standard_error < 0.02).all()
    assert bias.is_zero, bias


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("mask", [pytest.param(-1e9, marks=SLOW), -torch.inf])
def test_under_a_soft_cap_everything_is_finite(name, mask):
    pair = make_pair(mask)
    loss = loss_of(objectives.get(**OBJECTIVES[name]), pair.masked, 0, CAP)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(loss, pair.masked))


def test_an_infinite_bias_is_not_passed_over():
    """Stock cross-entropy is NaN."""
    pair = make_pair(torch.inf)
    for control in (False, True):
        config = SCEConfig(num_buckets=0, tail_candidates=500, control_variate=control)
        assert loss_of(objectives.from_config(config), pair.masked, 0).isnan()


def test_a_head_without_any_class_is_not_passed_over():
    pair = make_pair(-torch.inf)
    bias = torch.full_like(pair.masked.bias, -torch.inf)
    assert sce_loss(*pair.masked[:3], bias=bias).isnan()


def test_hidden_states_that_are_not_finite_are_not_passed_over():
    pair = make_pair(-torch.inf)
    for value in (torch.nan, torch.inf):
        hidden = pair.masked.hidden.detach().clone()
        hidden[4, 2] = value
        assert not sce_loss(hidden, *pair.masked[1:3], bias=pair.masked.bias).isfinite()


def _peaked(post=PLAIN, mask=-torch.inf, **options):
    problem = peaked_problem(post, **options)
    bias = problem.bias.clone()
    bias[5:240:5] = mask
    bias[[17, 90]] = problem.bias[[17, 90]]
    return Problem(*problem[:3], bias)


MONTE_CARLO = {
    "tail, control": {**LISTS["tail"], "control_variate": True},
    "all, control": {**LISTS["all"], "control_variate": True},
    "all, plain": {**LISTS["all"], "control_variate": False},
    "buckets, control": {**LISTS["buckets"], "control_variate": True},
    "mixture": {**LISTS["tail"], "prior": {"labels": 1, "gradient": 1}},
}
"""Samples of a catalogue with masks in between, whose draws are not those without them."""


def _sampler(name):
    options = {"tail_candidates": 80, "uniform_floor": 0.5, **MONTE_CARLO[name]}
    return sce.SCE(SCEConfig(**options))


@masks("-1e9")
@pytest.mark.parametrize(
    "name",
    ["tail, control", "all, plain"]
    + [pytest.param(n, marks=SLOW) for n in ("all, control", "buckets, control", "mixture")],
)
def test_partition_is_unbiased_with_masks_in_between(name, mask):
    bias = call_bias(_sampler(name), _peaked(mask=MASKS[mask]), 400)
    assert (bias.standard_error <= 0.008).all()
    assert bias.is_zero, bias


@pytest.mark.parametrize("control", [pytest.param(False, marks=SLOW), True])
def test_large_catalogues_with_masks_are_unbiased(control, monkeypatch):
    monkeypatch.setattr(sce, "LARGE_CATALOGUE", 0)
    options = {**LISTS["buckets"], "tail_candidates": 80, "uniform_floor": 0.5}
    estimator = sce.SCE(SCEConfig(**options, control_variate=control))
    bias = call_bias(estimator, _peaked(mask=-1e9), 400)
    assert (bias.standard_error <= 0.012).all()
    assert bias.is_zero, bias


def test_masked_classes_in_the_count_are_found(monkeypatch):
    """The planted error: they are no part of the mean but of |R|."""
    loss = sce.candidate_cross_entropy

    def wrong(head, positions, candidates, **options):
        candidates = dataclasses.replace(candidates, row_sum=head.row_sum())
        whole = head._replace(masked=None, kept=EVERYTHING)
        return loss(whole, positions, candidates, **options)

    monkeypatch.setattr(sce, "candidate_cross_entropy", wrong)
    assert not call_bias(_sampler("tail, control"), _peaked(), 300).is_zero


def test_a_control_variate_without_masks_is_as_good_as_on_the_smaller_head():
    """With a mean over masked classes too its variance would be that of no control variate."""
    config = SCEConfig(num_buckets=0, shared_frequent=20, tail_candidates=40, control_variate=True)
    for value in MASKS.values():
        pair = make_pair(value, spread=0.3)
        errors = [
            loss_of(objectives.from_config(config), problem, 0, return_stats=True)[1].relative_error
            for problem in (pair.masked, pair.removed)
        ]
        torch.testing.assert_close(errors[0], errors[1])


def test_probe_and_state_see_a_masked_head():
    pair = make_pair(-1e9)
    objective, probe = objectives.get("sce", num_buckets=0, tail_candidates=60), Probe(1, 20)
    loss_of(objective, pair.masked, 0)
    probe(objective, *pair.masked[:3], bias=pair.masked.bias)
    assert abs(probe.figures["probe_bias"]) < 0.5
    assert probe.figures["probe_cos_hidden"] > 0.9


@pytest.mark.parametrize("frozen", [False, True])
def test_a_low_rank_head_with_masked_rows(frozen):
    pair = make_pair(-torch.inf)
    generator = torch.Generator().manual_seed(4)
    b = torch.randn(len(pair.masked.weight), 3, generator=generator, dtype=torch.float64) * 0.3
    b = b.requires_grad_()
    beside = torch.randn(len(pair.masked.hidden), 3, generator=generator, dtype=torch.float64)
    config = SCEConfig(num_buckets=2, bucket_candidates=10, shared_frequent=20, tail_candidates=40)
    results = []
    for problem, part in ((pair.masked, b), (pair.removed, b.detach()[pair.kept].requires_grad_())):
        weight = problem.weight.detach().requires_grad_(not frozen)
        hidden = torch.cat([problem.hidden.detach(), beside], dim=1)
        loss = objectives.from_config(config)(
            hidden,
            weight,
            problem.labels,
            bias=problem.bias,
            low_rank=part,
            generator=torch.Generator().manual_seed(1),
        )
        results.append((loss, torch.autograd.grad(loss, part)[0]))
    (loss, grad), (want, wanted) = results
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad[pair.kept], wanted)
    assert (grad[AT_THE_END] == 0).all()


def test_a_running_row_sum_leaves_masked_rows_out():
    """Of a frozen head it is kept, and masks may change meanwhile."""
    pair = make_pair(-1e9)
    config = SCEConfig(num_buckets=0, shared_frequent=20, tail_candidates=40, control_variate=True)
    state, weight = SCEState(), pair.masked.weight.detach()
    biases = [pair.masked.bias, pair.masked.bias.detach().clamp_min(-1.0), pair.masked.bias]
    for seed, bias in enumerate(biases):
        fresh = copy.deepcopy(state)
        fresh.row_sum.forget()
        kept, new = (
            sce_loss(
                pair.masked.hidden,
                weight,
                pair.masked.labels,
                bias=bias,
                config=config,
                state=s,
                generator=torch.Generator().manual_seed(seed),
            )
            for s in (state, fresh)
        )
        torch.testing.assert_close(kept, new)


def test_what_counts_as_masked():
    bias = torch.tensor([0.0, -FAR_BELOW + 1, -FAR_BELOW - 1, -torch.inf, 5.0, torch.nan])

    def found(bias, post=PLAIN):
        mask = is_masked(bias, post)
        return None if mask is None else mask.nonzero().flatten().tolist()

    assert found(bias[:4]) == [2, 3]
    assert found(bias[:5]) == [1, 2, 3]  # as far below the largest
    assert found(bias) == [3]  # which is not known here
    assert found(bias[:4] + 1e6) == [2, 3]  # a softmax does not see a shift
    assert found(torch.tensor([0.0, torch.inf, -torch.inf])) == [2]
    assert found(-bias[:4], LogitTransform(-1.0)) == [2, 3]
    assert found(torch.tensor([1.0, -65504.0], dtype=torch.float16), LogitTransform(0.0625)) == [1]
    assert found(torch.tensor([1.0, -1e4]), LogitTransform(0.0625)) == [1]  # Cohere's
    assert found(bias, CAP) is None
    assert within_reach(bias, PLAIN) is bias
    far = torch.tensor([1.0, -torch.inf, 1e9, -3e4], dtype=torch.float64)
    near = within_reach(far, CAP)
    assert near.isfinite().all()
    assert torch.equal(CAP(near + 3.0), CAP(far + 3.0))


def test_lists_that_hold_the_catalogue_are_said_once():
    """Of a head with 170 classes that are not masked, lists of 170 hold everything."""
    pair = make_pair(-torch.inf)
    for size, is_whole in ((len(pair.kept), True), (20, False)):
        objective = objectives.get(
            "sce", num_buckets=0, shared_frequent=10, tail_candidates=size, shared_labels=False
        )
        assert objective.advice() is None
        loss = loss_of(objective, pair.masked, 0)
        advice = objective.advice()
        assert (advice is not None and "hold all 170 classes" in advice) == is_whole
        if is_whole:
            assert 'choose "exact" instead' in advice
            assert relative_error(loss, stock_loss(pair.masked)) < 1e-9
