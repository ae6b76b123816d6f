"""Monte-Carlo harness for any objective: is the mean of Zhat over fresh calls equal to Z?"""

from __future__ import annotations

import torch
from support.estimators import Bias, ratio_bias
from support.problems import Problem, make_problem

from sce_lm import LogitTransform
from sce_lm.candidates.proposals import Categorical
from sce_lm.objectives import Objective

V = 240
LABELS = (17, 17, 17, 17, 17, 90)
FREQUENCY = Categorical((20.0 + (torch.arange(V) * 37 % 60)).log())
"""A label distribution q for batches that are redrawn."""
PAST = (FREQUENCY.log_prob(torch.arange(V)).exp() * 1e12).long()
"""Label counts of a long past of that distribution."""
PLAIN, CAP = LogitTransform(), LogitTransform(1.2, 12.0)
LISTS = {
    "tail": {"num_buckets": 0, "shared_labels": False, "shared_frequent": 0},
    "buckets": {
        "num_buckets": 2,
        "bucket_candidates": 12,
        "shared_labels": False,
        "shared_frequent": 0,
    },
    "all": {"num_buckets": 2, "bucket_candidates": 12, "shared_frequent": 12},
}


def peaked_problem(
    post: LogitTransform = LogitTransform(), *, with_bias: bool = True, spread: float = 0.5
) -> Problem:
    """Six positions whose label holds 20-50 % of Z, five times the same; the mean of b is not 0.

    The other positions give that label a logit of 1, so that it is likely in an adaptive sample.
    """
    problem = make_problem(6, V, 8, with_bias=with_bias, seed=3, spread=spread)
    hidden, weight = problem.hidden.detach(), problem.weight.detach().clone()
    labels = torch.tensor(LABELS)
    bias = torch.zeros(V, dtype=torch.float64) if problem.bias is None else problem.bias.detach()
    x = hidden @ weight.T + bias
    x[:, [17, 90]] = -torch.inf
    own = torch.logsumexp(post(x), dim=1) - 0.7
    if post.soft_cap is not None:
        own = post.soft_cap * torch.atanh(own / post.soft_cap)
    own = own / post.scale
    for label in (17, 90):
        target = torch.where(labels == label, own, 1.0) - bias[label]
        weight[label] = torch.linalg.lstsq(hidden, target[:, None]).solution[:, 0]
    share = torch.softmax(post(hidden @ weight.T + bias), dim=1)[torch.arange(6), labels]
    assert ((share > 0.2) & (share < 0.5)).all()
    assert not with_bias or bias.mean() > 0.5
    return Problem(hidden, weight, labels, bias if with_bias else None)


def exact_loss(problem: Problem, post: LogitTransform = LogitTransform()) -> torch.Tensor:
    """``[N]``."""
    x = problem.hidden @ problem.weight.T
    s = post(x if problem.bias is None else x + problem.bias)
    return torch.logsumexp(s, dim=1) - s.gather(1, problem.labels[:, None]).squeeze(1)


@torch.no_grad()
def call_bias(
    objective: Objective,
    problem: Problem,
    draws: int,
    *,
    post: LogitTransform = LogitTransform(),
    exact: torch.Tensor | None = None,
    copies: int = 1,
) -> Bias:
    """``Zhat / Z - 1`` of each position over ``draws`` draws, in calls that do not count.

    A loss per position is ``log Zhat - s_y``, so ``exp(loss - exact)`` is the ratio. Where each
    position draws for itself, a call can have ``copies`` of the problem.
    """
    exact = exact_loss(problem, post) if exact is None else exact
    hidden, labels = problem.hidden.repeat(copies, 1), problem.labels.repeat(copies)
    losses = (
        objective(
            hidden,
            problem.weight,
            labels,
            bias=problem.bias,
            post=post,
            reduction="none",
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in range(draws // copies)
    )
    return ratio_bias(row - exact for loss in losses for row in loss.view(copies, -1))


@torch.no_grad()
def pool_bias(
    objective: Objective,
    draws: int,
    *,
    post: LogitTransform = LogitTransform(),
    size: int = 400,
    problem: Problem | None = None,
) -> Bias:
    """The same for an objective whose candidates are the batch's labels: a batch is one position
    of the problem (the first or the last) and the labels of ``size - 1`` others, drawn anew from
    ``FREQUENCY`` each time; only the first row of a batch is looked at."""
    problem = peaked_problem(post) if problem is None else problem
    exact = exact_loss(problem, post)
    generator = torch.Generator().manual_seed(0)

    def losses():
        for _ in range(draws):
            others = FREQUENCY.draw((size - 1,), generator)
            found = [
                objective(
                    problem.hidden[[t] * size],
                    problem.weight,
                    torch.cat([problem.labels[t : t + 1], others]),
                    bias=problem.bias,
                    post=post,
                    reduction="none",
                    generator=generator,
                )[0]
                - exact[t]
                for t in (0, 5)
            ]
            yield torch.stack(found)

    return ratio_bias(losses())
