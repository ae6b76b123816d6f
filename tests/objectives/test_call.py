"""What every objective promises about its call: reductions, ignored labels, errors, dtypes."""

from dataclasses import replace

import pytest
import torch
from support.allocations import Sizes
from support.problems import gradients, make_problem
from torch.utils.checkpoint import checkpoint

from sce_lm import LogitTransform, SCEConfig, SCEState, objectives, sce_loss
from sce_lm.objectives import kernel
from sce_lm.ops import logit_stream

OBJECTIVES = {
    "exact": lambda: objectives.get("exact"),
    "corrected": lambda: objectives.get(
        "sce", num_buckets=3, bucket_candidates=10, shared_frequent=8, tail_candidates=20
    ),
    "published": lambda: objectives.get("sce", published=True, bucket_candidates=10),
    "labels first": lambda: objectives.get("sce", tail_candidates=20, labels_first=3),
    "unigram": lambda: objectives.get("sampled_softmax", num_negatives=20, proposal="unigram"),
    "own negatives": lambda: objectives.get("sampled_softmax", num_negatives=20, shared=False),
    "in_batch": lambda: objectives.get("in_batch", frequency="streaming"),
    "bir": lambda: objectives.get("bir", num_negatives=15),
    "xir": lambda: objectives.get("xir", num_negatives=30, decay=0.9),
    "xir, importance": lambda: objectives.get("xir", num_negatives=30, correction="importance"),
    "kernel": lambda: objectives.get("kernel", num_negatives=12),
    "kernel, projected": lambda: objectives.get("kernel", projection=3, alpha="auto"),
    "kernel, shared": lambda: objectives.get("kernel", num_negatives=30, shared=True),
    "rece": lambda: objectives.get("rece", num_buckets=6, rounds=2),
    "bce": lambda: objectives.get("bce", num_negatives=3),
    "gbce": lambda: objectives.get("gbce", num_negatives=20, shared=True),
}
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


def seeded(objective, problem, **options):
    generator = torch.Generator().manual_seed(11)
    return objective(*problem[:3], bias=problem.bias, generator=generator, **options)


@each_objective
def test_ignored_positions_change_nothing(name):
    problem = make_problem(40, 120, 6)
    kept = torch.arange(40) % 3 != 0
    labels = problem.labels.masked_fill(~kept, -100)
    hidden = problem.hidden.detach().clone()
    hidden[~kept] = torch.nan  # must not even be looked at
    whole = problem._replace(hidden=hidden.requires_grad_(), labels=labels)
    part = problem._replace(hidden=problem.hidden[kept], labels=problem.labels[kept])
    loss = seeded(OBJECTIVES[name](), whole)
    expected = seeded(OBJECTIVES[name](), part)
    torch.testing.assert_close(loss, expected)
    mine, wanted = gradients(loss, whole), gradients(expected, part)
    torch.testing.assert_close(mine[0][kept], wanted[0])
    assert (mine[0][~kept] == 0).all()
    torch.testing.assert_close(mine[1:], wanted[1:])


@each_objective
def test_reductions_agree(name):
    problem = make_problem(40, 120, 6)
    problem.labels[:10] = -100
    shape = (4, 10)
    folded = problem._replace(
        hidden=problem.hidden.reshape(*shape, 6), labels=problem.labels.reshape(shape)
    )
    each, stats = seeded(OBJECTIVES[name](), folded, reduction="none", return_stats=True)
    assert each.shape == shape
    assert stats.num_valid == 30
    total = each.sum() / stats.coverage
    torch.testing.assert_close(seeded(OBJECTIVES[name](), folded, reduction="sum"), total)
    torch.testing.assert_close(seeded(OBJECTIVES[name](), folded), total / 30)
    for items in (77, torch.tensor(77)):
        loss = seeded(OBJECTIVES[name](), folded, num_items_in_batch=items)
        torch.testing.assert_close(loss, total / 77)


@each_objective
def test_candidates_are_the_classes_that_a_loss_depends_on(name):
    """And nothing but them and the labels; without a control variate, whose mean is all rows'."""
    problem, objective = make_problem(40, 120, 6), OBJECTIVES[name]()
    if hasattr(objective.config, "control_variate"):
        objective.config = replace(objective.config, control_variate=False)
    loss, stats = seeded(objective, problem, return_stats=True)
    touched = gradients(loss, problem)[1].abs().sum(dim=1) > 0
    assert (stats.candidates is None) == (name in ("exact", "rece"))
    candidates = torch.arange(120) if stats.candidates is None else stats.candidates
    others = touched.index_fill(0, candidates, False).nonzero().squeeze(1)
    assert torch.isin(others, problem.labels).all()
    if name != "published":  # where a bucket may be no position's best
        assert touched[candidates].all()


@each_objective
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("items", [None, 12])
def test_all_ignored_is_a_connected_zero(name, reduction, items):
    problem = make_problem(5, 20, 3)
    labels = torch.full_like(problem.labels, -100)
    loss = OBJECTIVES[name]()(
        problem.hidden,
        problem.weight,
        labels,
        bias=problem.bias,
        reduction=reduction,
        num_items_in_batch=items,
    )
    assert (loss == 0).all()
    for gradient in gradients(loss.sum(), problem):
        assert (gradient == 0).all()


@each_objective
@pytest.mark.parametrize("is_frozen", [False, True])
def test_low_rank_columns_are_columns_of_the_weight(name, is_frozen):
    """Hidden states and head that are one matrix each, and the same ones in two parts."""
    problem = make_problem(40, 120, 9)
    parts = [part.detach().clone().requires_grad_() for part in problem.weight.split([6, 3], 1)]
    parts[0].requires_grad_(not is_frozen)
    losses = [
        seeded(OBJECTIVES[name](), problem, return_stats=True),
        seeded(
            OBJECTIVES[name](),
            problem._replace(weight=parts[0]),
            low_rank=parts[1],
            return_stats=True,
        ),
    ]
    torch.testing.assert_close(losses[1][0], losses[0][0])
    if losses[0][1].relative_error is not None:
        torch.testing.assert_close(losses[1][1].relative_error, losses[0][1].relative_error)
    wanted = gradients(losses[0][0], problem)
    trained = [problem.hidden, *parts[is_frozen:], problem.bias]
    wanted[1:2] = wanted[1].split([6, 3], 1)[is_frozen:]
    found = torch.autograd.grad(losses[1][0], trained)
    torch.testing.assert_close(list(found), wanted)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"kernel", "kernel, shared"}))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_low_rank_head_is_never_formed(name, reduction, monkeypatch):
    """A frozen weight and a trained low-rank operand: nothing as large as the weight is made.

    The kernel without a projection is a method on all rows at once.
    """
    monkeypatch.setattr(logit_stream, "TILE_CLASSES", 256)
    monkeypatch.setattr(kernel, "TILE_ELEMENTS", 100 * 100)
    monkeypatch.setattr(kernel, "PROJECTION_ROWS", 4)
    problem = make_problem(16, 1500, 96, with_bias=False, dtype=torch.float32)
    low_rank = torch.randn(1500, 4, requires_grad=True)
    largest = []
    for weight in (problem.weight.detach(), problem.weight):
        hidden = torch.cat([problem.hidden, problem.hidden[:, :4]], 1)
        with Sizes(weight) as sizes:
            loss = OBJECTIVES[name]()(
                hidden, weight, problem.labels, low_rank=low_rank, reduction=reduction
            )
            loss.sum().backward()
        assert low_rank.grad.shape == (1500, 4)
        largest.append(sizes.largest)
    assert largest[0] < 1500 * 96 <= largest[1]


@each_objective
def test_one_position_works(name):
    problem = make_problem(1, 20, 3)
    loss = OBJECTIVES[name]()(*problem[:3], bias=problem.bias)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(loss, problem))


@each_objective
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(name, dtype):
    problem = make_problem(30, 80, 5, dtype=dtype)
    loss = OBJECTIVES[name]()(*problem[:3], bias=problem.bias)
    assert loss.dtype == torch.float32
    assert not loss._is_view()
    found = gradients(loss, problem)
    assert [g.dtype for g in found] == [dtype] * 3


@each_objective
def test_autocast_does_not_round_the_loss(name):
    problem = make_problem(30, 80, 5, dtype=torch.float32)
    plain = seeded(OBJECTIVES[name](), problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = seeded(OBJECTIVES[name](), problem)
    assert torch.equal(plain, under)


@each_objective
def test_frozen_head_builds_no_gradient_for_it(name):
    problem = make_problem(30, 80, 5, with_bias=False)
    frozen = problem.weight.detach()
    loss = OBJECTIVES[name]()(problem.hidden, frozen, problem.labels)
    loss.backward()
    assert problem.hidden.grad is not None
    assert frozen.grad is None


@each_objective
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_equal_plain_ones(name, use_reentrant):
    """The recomputation replays the draw and the counts, also with other calls in between."""
    problem = make_problem(40, 300, 6)
    others = make_problem(40, 300, 6, seed=9)
    results = []
    for checkpointed in (False, True):
        objective = OBJECTIVES[name]()
        torch.manual_seed(3)
        for _ in range(2):  # some past
            objective(*others[:3])

        def head(hidden, objective=objective):
            return objective(hidden, problem.weight, problem.labels, bias=problem.bias)

        if checkpointed:
            loss = checkpoint(head, problem.hidden, use_reentrant=use_reentrant)
        elif use_reentrant:  # its first run is without gradients, so that it does not count
            with torch.no_grad():
                state = torch.get_rng_state()
                head(problem.hidden)
            torch.set_rng_state(state)
            loss = head(problem.hidden)
        else:
            loss = head(problem.hidden)
        state = torch.get_rng_state()
        objective(*others[:3])  # a later call changes the counts before the backward pass
        torch.set_rng_state(state)
        for t in problem.parameters:
            t.grad = None
        loss.backward()
        steps = objective.state.step if objective.state else 0
        results.append((loss.detach(), [t.grad.clone() for t in problem.parameters], steps))
    (plain, wanted, steps), (under, found, steps_under) = results
    torch.testing.assert_close(under, plain, rtol=0, atol=0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert steps_under == steps


@each_objective
def test_a_saved_state_goes_on_as_if_it_had_never_stopped(name, tmp_path):
    problem = make_problem(40, 300, 6, dtype=torch.float32)
    first, second = OBJECTIVES[name](), OBJECTIVES[name]()

    def losses(objective, seeds):
        return [
            objective(*problem[:3], generator=torch.Generator().manual_seed(seed)).item()
            for seed in seeds
        ]

    losses(first, range(3))
    if first.state is not None:
        first.state.save(tmp_path / "state.safetensors")
        second.state.load(tmp_path / "state.safetensors")
    assert losses(second, range(3, 6)) == losses(first, range(3, 6))


def test_sce_loss_is_the_objective():
    problem = make_problem(30, 80, 5)
    config = SCEConfig(num_buckets=2, bucket_candidates=8, shared_frequent=4, tail_candidates=20)
    generator = torch.Generator().manual_seed(1)
    state = SCEState()
    loss, stats = sce_loss(
        *problem[:3],
        bias=problem.bias,
        post=LogitTransform(0.5),
        config=config,
        state=state,
        generator=generator,
        return_stats=True,
    )
    again = objectives.from_config(config)(
        *problem[:3],
        bias=problem.bias,
        post=LogitTransform(0.5),
        generator=torch.Generator().manual_seed(1),
    )
    assert torch.equal(loss, again)
    assert state.step == 1
    assert stats.coverage == 1.0
    assert stats.relative_error.shape == problem.labels.shape
    assert (stats.relative_error > 0).any()
    assert 0 < stats.products_per_position < 2 * 80 + 200


@pytest.mark.parametrize(
    "drawn",
    [
        {"num_buckets": 0, "tail_candidates": 60, "control_variate": False},
        {"num_buckets": 2, "bucket_candidates": 60, "bucket_sampling": "priority"},
    ],
    ids=["a tail", "buckets"],
)
def test_the_monitor_estimates_the_spread_of_zhat(drawn):
    """The mean of Vhat over draws is the variance of Zhat over draws."""
    problem = make_problem(4, 150, 5)
    objective = objectives.from_config(SCEConfig(shared_frequent=0, **drawn))
    log_z, errors = [], []
    for seed in range(800):
        loss, stats = objective(
            *problem[:3],
            bias=problem.bias,
            reduction="none",
            return_stats=True,
            generator=torch.Generator().manual_seed(seed),
        )
        log_z.append(loss.detach())
        errors.append(stats.relative_error)
    s = problem.hidden @ problem.weight.T + problem.bias
    exact = torch.logsumexp(s, 1) - s.gather(1, problem.labels[:, None]).squeeze(1)
    zhat = (torch.stack(log_z) - exact.detach()).exp()
    predicted = (torch.stack(errors) * zhat).square().mean(0)  # Vhat / Z², averaged
    torch.testing.assert_close(predicted, zhat.var(0), rtol=0.2, atol=0)


def test_bad_input_is_one_sentence():
    problem = make_problem(6, 20, 3)
    hidden, weight, labels, bias = problem
    loss = objectives.get("exact")
    cases = [
        (ValueError, "last dimensions", (hidden[:, :2], weight, labels), {}),
        (ValueError, "outside \\[0, 20\\)", (hidden, weight, labels.clone().fill_(20)), {}),
        (ValueError, "outside", (hidden, weight, labels.clone().fill_(-1)), {}),
        (ValueError, "one label for each", (hidden, weight, labels[:3]), {}),
        (ValueError, "vocab_size, hidden_size", (hidden, weight[0], labels), {}),
        (TypeError, "int64", (hidden, weight, labels.float()), {}),
        (ValueError, "one number for each", (hidden, weight, labels), {"bias": bias[:3]}),
        (ValueError, "reduction", (hidden, weight, labels), {"reduction": "max"}),
    ]
    for error, message, args, options in cases:
        with pytest.raises(error, match=message):
            loss(*args, **options)
    with pytest.raises(ValueError, match="unknown objective 'cse'"):
        objectives.get("cse")
    with pytest.raises(ValueError, match="did you mean 'tail_candidates'"):
        objectives.get("sce", tail_candidate=3)
    with pytest.raises(TypeError, match="SCEConfig"):
        objectives.from_config({"name": "sce"})


@each_objective
def test_to_dict_builds_it_again(name):
    objective = OBJECTIVES[name]()
    again = objectives.get(**objective.to_dict())
    assert again.to_dict() == objective.to_dict()
    assert again.config == objective.config
