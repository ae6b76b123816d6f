"""The row control variate: what it adds to the head's gradient, and that its mean is nothing."""

import dataclasses

import pytest
import torch
from support.problems import gradients, make_problem, relative_error
from torch.utils.checkpoint import checkpoint

import sce_lm.objectives.sce as sce
from sce_lm import LogitTransform, SCEConfig
from sce_lm.objectives.reference import exact_reference

N, V, D = 12, 120, 6
PLAIN, CAP = LogitTransform(), LogitTransform(1.2, 6.0)
LISTS = {
    "tail": {"num_buckets": 0, "shared_labels": False, "shared_frequent": 0},
    "shared": {"num_buckets": 0, "shared_frequent": 12},
    "buckets": {"num_buckets": 3, "bucket_candidates": 10, "shared_frequent": 12},
    "samples": {"num_buckets": 3, "bucket_sampling": "priority", "shared_frequent": 12},
}


def objective(lists="tail", *, row_control=True, control=False, m=30, **options):
    fields = {"tail_candidates": m, "control_variate": control}
    if lists == "samples":
        fields = {"bucket_candidates": m}
    fields["row_control_variate"] = row_control
    return sce.SCE(SCEConfig(**{**LISTS[lists], **fields, **options}))


def loss_of(problem, post=PLAIN, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return objective(**options)(
        *problem[:3], bias=problem.bias, post=post, generator=generator, reduction="sum"
    )


def added(problem, post=PLAIN, **options):
    """Gradients of weight and bias, with the row control variate minus without."""
    both = [
        gradients(loss_of(problem, post, row_control=on, **options), problem)
        for on in (True, False)
    ]
    assert torch.equal(both[0][0], both[1][0])  # of hidden states
    return [a - b for a, b in zip(both[0][1:], both[1][1:])]


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize("post", [PLAIN, CAP], ids=["", "cap"])
@pytest.mark.parametrize("lists", LISTS)
def test_it_adds_the_written_out_sum(lists, post, control, monkeypatch):
    problem, seen = make_problem(N, V, D), []
    wrapped = sce.expected_rows

    def spied(candidates, softmax):
        seen.append((candidates, softmax))
        return wrapped(candidates, softmax)

    monkeypatch.setattr(sce, "expected_rows", spied)
    found = added(problem, post, lists=lists, control=control)
    [(candidates, (centers, center_of, _))] = seen
    x = (centers @ problem.weight.T + problem.bias).detach()
    log_z = post(x).logsumexp(dim=1)
    expected = torch.zeros(V, D), torch.zeros(V)
    drawn = dict(zip(candidates.tail.tolist(), candidates.tail_log_weights.exp().tolist()))
    for k in range(len(centers)):
        g_mean = post(x[k].mean())
        has_control = control and lists != "samples"
        e = (g_mean - log_z[k]).exp() * post.slope(g_mean) if has_control else 0.0
        own = [] if candidates.bucket_items is None else candidates.bucket_items[k].tolist()
        if candidates.bucket_log_weights is not None:
            drawn = dict(zip(own, candidates.bucket_log_weights[k].exp().tolist()))
            own = []
        for j in set(range(V)) - set(candidates.shared.tolist()) - set(own):
            s = post(x[k, j])
            p = (s - log_z[k]).exp() * post.slope(s)
            g = (center_of == k).sum() * (p - e) * (1.0 - drawn.get(j, 0.0))
            expected[0][j] += (g * centers[k]).float()
            expected[1][j] += g.float()
    for mine, want in zip(found, expected):
        assert relative_error(mine, want) < 1e-6


@pytest.mark.parametrize("post", [PLAIN, CAP], ids=["", "cap"])
def test_centres_equal_to_the_positions_give_rows_that_were_not_drawn_their_exact_gradient(post):
    problem = make_problem(N, V, D)
    loss = loss_of(problem, post, m=20)
    exact = exact_reference(problem.head(post), problem.positions()).sum()
    touched = gradients(loss_of(problem, post, m=20, row_control=False), problem)[2] != 0
    assert 20 <= touched.sum() <= 20 + N
    for mine, want in zip(gradients(loss, problem)[1:], gradients(exact, problem)[1:]):
        assert relative_error(mine[~touched], want[~touched]) < 1e-10


def mean_added(problem, draws, **options):
    """Mean over draws of what is added, in standard errors, and their largest relative size."""
    found = torch.stack([added(problem, seed=seed, **options)[0] for seed in range(draws)])
    error = found.std(dim=0) / draws**0.5
    return (found.mean(dim=0) / error.clamp_min(1e-12)).abs().max()


@pytest.mark.parametrize("lists", ["tail", "samples"])
def test_its_mean_over_draws_is_nothing(lists):
    assert mean_added(make_problem(N, V, D), 200, lists=lists, prior="uniform") < 5.0


@pytest.mark.parametrize("lists", ["tail", "samples"])
def test_forgotten_weights_are_found(lists, monkeypatch):
    wrapped = sce.expected_rows

    def planted(candidates, softmax):
        name = "tail_log_weights" if lists == "tail" else "bucket_log_weights"
        forgotten = {name: torch.zeros_like(getattr(candidates, name))}
        candidates = dataclasses.replace(candidates, **forgotten)
        return wrapped(candidates, softmax)

    monkeypatch.setattr(sce, "expected_rows", planted)
    assert mean_added(make_problem(N, V, D), 200, lists=lists, prior="uniform") > 5.0


@pytest.mark.parametrize("lists", LISTS)
def test_rows_come_nearer_to_their_exact_gradient(lists):
    """The problem has more positions than centres, in groups."""
    problem, generator = make_problem(200, V, D), torch.Generator().manual_seed(1)
    kind = torch.randint(8, (200,), generator=generator)
    with torch.no_grad():
        problem.hidden.copy_(problem.hidden[:8][kind] + 0.3 * problem.hidden)
    exact = gradients(exact_reference(problem.head(), problem.positions()).sum(), problem)[1]

    def error(row_control):
        return sum(
            relative_error(
                gradients(loss_of(problem, seed=s, lists=lists, row_control=row_control), problem)[
                    1
                ],
                exact,
            )
            for s in range(10)
        )

    assert error(True) < 0.8 * error(False)


def test_weights_of_positions_and_scales_of_the_loss_reach_it():
    problem = make_problem(40, V, D)
    scale = torch.linspace(0.0, 2.0, 40, dtype=torch.float64)

    def rows(reduction, factor):
        generator = torch.Generator().manual_seed(0)
        options = {"bias": problem.bias, "generator": generator, "reduction": reduction}
        loss = objective("buckets")(*problem[:3], **options)
        return gradients((loss * factor).sum(), problem)[1]

    torch.testing.assert_close(rows("none", 1.0), rows("sum", 1.0))
    torch.testing.assert_close(rows("mean", 80.0), rows("sum", 2.0))
    half = torch.zeros(40, dtype=torch.float64)
    half[:20] = 1.0
    parts = rows("none", half) + rows("none", 1.0 - half)
    torch.testing.assert_close(parts, rows("sum", 1.0))
    torch.testing.assert_close(rows("none", scale) * 3, rows("none", scale * 3))


def test_a_frozen_head_has_no_scan_and_an_adapter_gets_its_columns(monkeypatch):
    problem = make_problem(N, V, D, with_bias=False)
    low_rank = torch.randn(V, 2, dtype=torch.float64, requires_grad=True)
    hidden = torch.cat([problem.hidden, torch.randn(N, 2, dtype=torch.float64)], dim=1).detach()
    frozen, scans = problem.weight.detach(), []
    scan = sce.TailProposal.at_centers
    monkeypatch.setattr(sce.TailProposal, "at_centers", lambda self: scans.append(0) or scan(self))

    def grad(row_control, weight, low_rank):
        generator = torch.Generator().manual_seed(0)
        loss = objective(row_control=row_control)(
            hidden, weight, problem.labels, low_rank=low_rank, generator=generator
        )
        return torch.autograd.grad(loss, low_rank)[0]

    whole = torch.cat([frozen, low_rank.detach()], dim=1).requires_grad_()
    wide = problem._replace(hidden=hidden.clone().requires_grad_(), weight=whole)
    added_rows = added(wide)[0][:, D:] / N
    found = grad(True, frozen, low_rank) - grad(False, frozen, low_rank)
    torch.testing.assert_close(found, added_rows)
    count = len(scans)
    objective()(problem.hidden, frozen, problem.labels)
    assert count > 0
    assert len(scans) == count


@pytest.mark.parametrize(
    ("lists", "prior", "scanned"),
    [("tail", "labels", 12), ("tail", "gradient", 0), ("buckets", "labels", 3)],
)
def test_its_scan_counts(lists, prior, scanned):
    problem = make_problem(N, V, D)
    costs = [
        objective(lists, row_control=on, prior=prior)(
            *problem[:3], generator=torch.Generator().manual_seed(0), return_stats=True
        )[1].products_per_position
        for on in (True, False)
    ]
    assert costs[0] - costs[1] == pytest.approx(scanned * V / N)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    problem, found = make_problem(N, V, D), []
    for is_checkpointed in (False, True):
        own, generator = objective("buckets"), torch.Generator()

        def call(hidden, weight, bias, own=own, generator=generator):
            generator.manual_seed(3)
            return own(hidden, weight, problem.labels, bias=bias, generator=generator)

        parts = (problem.hidden, problem.weight, problem.bias)
        if is_checkpointed:
            loss = checkpoint(call, *parts, use_reentrant=use_reentrant)
        else:
            loss = call(*parts)
        assert loss is not None
        loss.backward()
        found.append([p.grad for p in problem.parameters])
        for p in problem.parameters:
            p.grad = None
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
