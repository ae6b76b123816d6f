"""Components of the tail's proposal, written out."""

import pytest
import torch
from support.problems import make_problem

from sce_lm import LogitTransform, SCEConfig, SCEState, objectives
from sce_lm.candidates.buckets import kmeans_buckets
from sce_lm.candidates.center_softmax import CENTERS, center_softmax
from sce_lm.candidates.noise import stream
from sce_lm.candidates.prior import gradient_prior
from sce_lm.objectives.call import Call
from sce_lm.objectives.tail_proposal import TailProposal
from sce_lm.ops.head import Head

N, V, D = 50, 120, 6
CAP = LogitTransform(1.2, 6.0)
CPU = torch.device("cpu")


def density(prior, problem, post=LogitTransform(), state=None, **options):
    """fp64 ``[V]``, without the floor's share."""
    config = SCEConfig(prior=prior, uniform_floor=1e-12, **options)
    state = SCEState() if state is None else state
    counts = state.begin_call(problem.labels, V, seed=3)[0]
    call = Call(state=state, seed=3, labels=problem.labels, counts=counts)
    with torch.no_grad():
        sizes, head = config.resolve(N, V), problem.head(post)
        return TailProposal(config, sizes, head, problem.positions(), call).log_density().exp()


def test_labels_beside_a_uniform_part():
    problem, state = make_problem(N, V, D), SCEState()
    state.begin_call(torch.arange(V), V, seed=1)
    n = torch.bincount(problem.labels, minlength=V).double()
    found = density({"labels": 1, "uniform": 3}, problem, state=state, prior_power=1.0)
    torch.testing.assert_close(found, 0.25 * (n + 1) / (N + V) + 0.75 / V)


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("post", [LogitTransform(), CAP], ids=["", "cap"])
def test_gradient_is_the_norm_of_the_rows_gradients_at_the_centres(post, control):
    problem = make_problem(N, V, D)
    centers, bucket_of = kmeans_buckets(problem.hidden.detach(), CENTERS, stream(3, "prior", CPU))
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
        Head(problem.weight.detach()),
        control_variate=False,
    )
    torch.testing.assert_close(gradient_prior(at_centers), p_hidden / p_hidden.sum())


@pytest.mark.parametrize("prior", ["gradient", {"gradient": 1, "labels": 1}], ids=str)
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
