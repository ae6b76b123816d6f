"""Components of the tail's proposal, written out; how the cache follows the softmax."""

import pytest
import torch
from support.problems import make_problem

from sce_lm import LogitTransform, SCEConfig, SCEState, objectives
from sce_lm.candidates.buckets import kmeans_buckets
from sce_lm.candidates.cache import OCCURRENCES, occurrences_of
from sce_lm.candidates.center_softmax import CENTERS, center_softmax
from sce_lm.candidates.noise import stream
from sce_lm.candidates.prior import gradient_prior
from sce_lm.objectives.base import HeadInputs
from sce_lm.objectives.reference import kernel_reference
from sce_lm.objectives.sce import count_strata
from sce_lm.objectives.tail_proposal import TailProposal
from sce_lm.ops.rows import HeadColumns

N, V, D = 50, 120, 6
CAP = LogitTransform(1.2, 6.0)
CPU = torch.device("cpu")


def density(prior, problem, post=LogitTransform(), state=None, **options):
    """fp64 ``[V]``, without the floor's share."""
    config = SCEConfig(prior=prior, uniform_floor=1e-12, **options)
    state = SCEState() if state is None else state
    hidden, weight, labels, bias = (t.detach() for t in problem)
    inputs = HeadInputs(hidden, weight, labels, bias, post, None, None, False)
    counts = state.begin_call(labels, V, seed=3)[0]
    proposal = TailProposal(config, state, inputs, config.resolve(N, V))
    return proposal.log_density(counts, 3, counted=True).exp()


def test_labels_of_the_past_and_of_the_batch():
    problem, state = make_problem(N, V, D), SCEState()
    state.begin_call(torch.arange(V), V, seed=1)
    n = torch.bincount(problem.labels, minlength=V).double()
    found = density({"labels": 1, "in_batch": 3}, problem, state=state, prior_power=1.0)
    torch.testing.assert_close(found, 0.25 * (n + 1) / (N + V) + 0.75 * n / N)


def test_kernel_is_that_of_the_kernel_objective():
    problem = make_problem(N, V, D)
    kernel = objectives.get("kernel", shared=True, alpha="auto", center=True)
    hidden, weight, labels, bias = (t.detach() for t in problem)
    inputs = HeadInputs(hidden, weight, labels, bias, LogitTransform(), None, None, False)
    alpha = kernel._kernel(inputs, 3, True)[3]
    centred = weight - weight.mean(dim=0)
    q = kernel_reference(hidden, centred, alpha=alpha, bias=bias - bias.mean()).exp().mean(dim=0)
    torch.testing.assert_close(density("kernel", problem), q)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("post", [LogitTransform(), CAP], ids=["", "cap"])
def test_gradient_is_the_norm_of_the_rows_gradients_at_the_centres(post, control):
    problem = make_problem(N, V, D)
    centers, bucket_of = kmeans_buckets(
        problem.hidden.detach(), CENTERS, stream(3, "prior", CPU), balanced=False
    )
    x = centers @ problem.weight.detach().T + problem.bias.detach()
    p = torch.softmax(post(x), dim=1) * post.slope(post(x))
    if control:
        g_mean = post(x.mean(dim=1))
        e = (g_mean - post(x).logsumexp(dim=1)).exp() * post.slope(g_mean)
        p = p - e[:, None]
    n = torch.bincount(bucket_of, minlength=CENTERS)
    norm = torch.einsum("k,kj,kd->jd", n.double(), p, centers).norm(dim=1)
    found = density("gradient", problem, post, control_variate=control)
    torch.testing.assert_close(found, norm / norm.sum())


def test_gradient_centres_equal_to_the_positions_give_the_exact_norms():
    problem = make_problem(N, V, D, with_bias=False)
    p = torch.softmax(problem.hidden @ problem.weight.T, dim=1)
    p_hidden = (p.T @ problem.hidden).norm(dim=1).detach()
    at_centers = center_softmax(
        problem.hidden.detach(),
        torch.arange(N),
        HeadColumns(problem.weight.detach()),
        LogitTransform(),
        control_variate=False,
    )
    torch.testing.assert_close(gradient_prior(at_centers), p_hidden / p_hidden.sum())


def test_a_cache_follows_the_softmax_and_forgets(tmp_path):
    """Occurrences go to the model's mean softmax, and to another one when the parameters move."""
    options = {"num_buckets": 0, "shared_frequent": 0, "tail_candidates": 40}
    objective = objectives.get("sce", prior="cache", **options)
    problem = make_problem(N, V, D, spread=2.0)
    for step in range(2):
        if step:
            problem.weight.data.neg_()
        for _ in range(400):
            objective(*problem[:3], bias=problem.bias)
        p = torch.softmax(problem.hidden @ problem.weight.T + problem.bias, dim=1).mean(dim=0)
        q = occurrences_of(objective.state, V, CPU)
        assert 0.5 * (q / q.sum() - p.detach()).abs().sum() < 0.1
    objective.state.save(tmp_path / "state.safetensors")
    again = SCEState()
    again.load(tmp_path / "state.safetensors")
    torch.testing.assert_close(again.memory[OCCURRENCES], q)
    smaller = objectives.SCE(objective.config, again)
    again.counts = None
    with pytest.raises(ValueError, match=f"a cache over {V} classes but weight has 100"):
        smaller(problem.hidden, problem.weight[:100], problem.labels.clamp_max(99))


def test_calls_that_do_not_count_leave_the_cache_alone():
    problem = make_problem(N, V, D)
    objective = objectives.get("sce", prior="cache", tail_candidates=20)
    with torch.no_grad():
        objective(*problem[:3], bias=problem.bias)
    assert OCCURRENCES not in objective.state.memory


@pytest.mark.parametrize("prior", ["cache", {"kernel": 1, "gradient": 1, "labels": 1}], ids=str)
def test_a_replay_draws_what_the_first_run_drew(prior):
    problem, others = make_problem(N, V, D), make_problem(N, V, D, seed=1)
    objective = objectives.get("sce", prior=prior, tail_candidates=20, shared_frequent=0)
    objective(*others[:3], bias=others.bias)
    losses = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(4)
        losses.append(objective(*problem[:3], bias=problem.bias, generator=generator))
        objective(*others[:3], bias=others.bias)
    assert torch.equal(*losses)


def test_strata_are_octaves_of_the_count():
    counts = torch.tensor([0, 0, 1, 2, 3, 6, 7, 14, 15, 30])
    assert count_strata(counts, 5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert count_strata(counts, 2).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert count_strata(counts[:2], 4).tolist() == [0, 0]
