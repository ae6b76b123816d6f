"""Kernel-based sampling: its straight line, and that Zhat is unbiased as the parameters move."""

import pytest
import torch
from support.monte_carlo import V, call_bias, exact_loss, peaked_problem
from support.problems import gradients, make_problem, relative_error

import sce_lm.candidates.kernel_sampler as sampling
import sce_lm.objectives.kernel as module
from sce_lm import LogitTransform, objectives
from sce_lm.objectives.reference import kernel_reference, position_reference

PLAIN, SCALED, CAP = LogitTransform(), LogitTransform(-0.7), LogitTransform(1.2, 12.0)
FORMS = {
    "quadratic": {"alpha": 10.0},
    "auto": {"alpha": "auto"},
    "centred": {"alpha": 1.0, "center": True},
    "quartic": {"kernel": "quartic", "alpha": 0.05},
    "projected": {"alpha": 10.0, "projection": 4},
    "shared": {"alpha": 10.0, "shared": True, "num_negatives": 200},
    "shared, projected": {"shared": True, "num_negatives": 200, "projection": 4},
    "shared, centred": {"shared": True, "num_negatives": 200, "center": True, "alpha": 1.0},
}


def objective(**options):
    return objectives.get("kernel", **{"num_negatives": 100, "block_size": 16, **options})


def copies_of(form):
    """Copies of a position in a call: each draws for itself, unless the sample is shared."""
    return 1 if "shared" in form else 20


def of_form(form):
    options = {"block_size": "auto", **FORMS[form]} if "shared" in form else FORMS[form]
    return objective(**options)


@pytest.mark.parametrize("post", [PLAIN, CAP], ids=["", "cap"])
@pytest.mark.parametrize("form", FORMS)
def test_partition_is_unbiased(form, post):
    problem, copies = peaked_problem(post), copies_of(form)
    bias = call_bias(of_form(form), problem, 800, post=post, copies=copies)
    assert (bias.standard_error <= 0.003).all()
    assert bias.is_zero, bias


@pytest.mark.parametrize("form", FORMS)
def test_partition_stays_unbiased_as_parameters_move(form):
    """The same objective, after training on other weights and a change of these in place."""
    estimator = of_form(form)
    past = make_problem(30, V, 8, seed=1, spread=3.0)
    for _ in range(3):
        estimator(*past[:3], bias=past.bias)
    problem = peaked_problem(spread=0.3)
    estimator(*problem[:3], bias=problem.bias)
    problem.weight.data[::2] *= 1.3  # a change that leaves the version of the tensor alone
    assert call_bias(estimator, problem, 500, copies=copies_of(form)).is_zero


@pytest.mark.parametrize("post", [PLAIN, SCALED, CAP], ids=["", "scaled", "cap"])
@pytest.mark.parametrize("kernel", ["quadratic", "quartic"])
def test_equals_the_straight_line_given_the_draw(kernel, post, monkeypatch):
    problem, drawn = make_problem(30, V, 6, spread=1.5), []
    draw = module.KernelSampler.draw
    monkeypatch.setattr(
        module.KernelSampler, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1]
    )
    estimator = objective(kernel=kernel)
    loss = estimator(*problem[:3], bias=problem.bias, post=post)
    ids, log_q = drawn[0]
    dense = kernel_reference(
        *problem[:2],
        alpha=100.0,
        power=4 if kernel == "quartic" else 2,
        bias=problem.bias,
        scale=post.scale,
    ).detach()
    torch.testing.assert_close(log_q, dense.gather(1, ids), atol=1e-9, rtol=0)
    c = -dense.gather(1, ids) - torch.log(torch.tensor(100.0).double())
    expected = position_reference(problem.head(post), problem.positions(), ids, c).mean()
    torch.testing.assert_close(loss, expected)
    for mine, want in zip(gradients(loss, problem), gradients(expected, problem)):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-9)


def test_a_centred_kernel_does_not_see_a_common_shift(monkeypatch):
    problem, drawn = make_problem(30, V, 6, with_bias=False), []
    draw = module.KernelSampler.draw
    monkeypatch.setattr(
        module.KernelSampler, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1]
    )
    for shift in (0.0, 5.0):
        objective(center=True)(
            problem.hidden,
            problem.weight + shift,
            problem.labels,
            generator=torch.Generator().manual_seed(0),
        )
    torch.testing.assert_close(drawn[0], drawn[1])
    centred = problem.weight - problem.weight.mean(dim=0)
    dense = kernel_reference(problem.hidden, centred, alpha=100.0).detach()
    torch.testing.assert_close(drawn[0][1], dense.gather(1, drawn[0][0]))


PLANTED = ["no correction", "uniform q", "without the 1", "label twice", "m forgotten", "stale q"]


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, monkeypatch):
    draw, make = module.KernelSampler.draw, module.PositionCandidates
    problem = peaked_problem()

    def log_q_of(change):
        def planted(self, queries, *args):
            ids, log_q = draw(self, queries, *args)
            return ids, change(queries, ids, log_q)

        monkeypatch.setattr(module.KernelSampler, "draw", planted)

    if error == "no correction":
        log_q_of(lambda queries, ids, log_q: torch.full_like(log_q, -torch.tensor(100.0).log()))
    elif error == "uniform q":
        log_q_of(lambda queries, ids, log_q: torch.full_like(log_q, -torch.tensor(V).log()))
    elif error == "m forgotten":
        log_q_of(lambda queries, ids, log_q: log_q - torch.tensor(100.0).log())
    elif error == "stale q":  # features of earlier parameters, reported for draws by these
        rows = torch.cat([0.8 * problem.weight, problem.bias[:, None]], dim=1)
        log_q_of(
            lambda queries, ids, log_q: kernel_reference(queries, rows, alpha=10.0).gather(1, ids)
        )
    elif error == "without the 1":
        kernel = sampling.KernelSampler._kernel
        monkeypatch.setattr(sampling.KernelSampler, "_kernel", lambda *a: kernel(*a).sub_(1.0))
        log_q_of(
            lambda queries, ids, log_q: kernel_reference(
                problem.hidden.repeat(20, 1), problem.weight, alpha=10.0, bias=problem.bias
            ).gather(1, ids)
        )
    else:
        monkeypatch.setattr(
            module, "PositionCandidates", lambda *a, **fields: make(*a, True, **fields)
        )
    assert not call_bias(objective(alpha=10.0), problem, 500, copies=20).is_zero


def test_a_projection_follows_the_parameters_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PROJECTION_REFRESH", 3)
    problem = make_problem(40, 300, 20, dtype=torch.float32)
    estimator = objective(projection=5, block_size="auto")
    kept = []
    for seed in range(5):
        estimator(*problem[:3], generator=torch.Generator().manual_seed(seed))
        kept.append(estimator.state.memory["of_rows"])
        problem.weight.data.add_(torch.randn(300, 20))
    assert kept[0] is kept[2]
    assert not torch.equal(kept[2], kept[3])
    assert kept[3] is kept[4]
    estimator.state.save(tmp_path / "state.safetensors")
    again = objective(projection=5, block_size="auto")
    again.state.load(tmp_path / "state.safetensors")
    found = [
        e(*problem[:3], generator=torch.Generator().manual_seed(9)) for e in (estimator, again)
    ]
    assert torch.equal(*found)


def test_wide_models_are_projected_by_themselves():
    problem = make_problem(20, 300, 260, dtype=torch.float32, with_bias=False)
    estimator = objectives.get("kernel", num_negatives=30)
    assert torch.isfinite(estimator(*problem[:3]))
    assert estimator.state.memory["of_rows"].shape == (260, 64)
    narrow = objectives.get("kernel", num_negatives=30)
    narrow(problem.hidden[:, :128], problem.weight[:, :128], problem.labels)
    assert not narrow.state.memory


def test_alpha_auto_is_the_least_variance():
    problem = peaked_problem(spread=1.5)
    spread = {
        alpha: float(
            call_bias(objective(alpha=alpha), problem, 400, copies=20).standard_error.mean()
        )
        for alpha in (1e-2, 1.0, 1e4, "auto")
    }
    assert spread["auto"] < 1.1 * min(spread.values())
    assert spread["auto"] < 0.9 * max(spread.values())


def test_low_precision_heads():
    problem = make_problem(30, V, 6, dtype=torch.bfloat16)
    loss = objective(num_negatives=4000)(*problem[:3], bias=problem.bias)
    wide = problem._replace(
        **{n: t.detach().double() for n, t in problem._asdict().items() if n != "labels"}
    )
    assert relative_error(loss, exact_loss(wide).mean()) < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0; give a positive number"),
        ({"alpha": "automatic"}, "give a positive number"),
        ({"kernel": "cubic"}, "choose one of 'quadratic', 'quartic'"),
        ({"shared": True, "kernel": "quartic"}, "kernel='quartic' needs draws for each position"),
        ({"shared": True, "block_size": 8}, "block_size=8 needs draws for each position"),
        ({"block_size": 0}, "block_size is 0"),
        ({"projection": 0}, "projection is 0"),
        ({"negatives": 3}, "did you mean 'num_negatives'"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.get("kernel", **options)
