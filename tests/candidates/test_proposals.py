"""Proposals: frequencies and log q; the log-weights of their draws."""

import pytest
import torch

from sce_lm.candidates.proposals import (
    Categorical,
    LogUniform,
    Uniform,
    draw_distinct,
    draw_rows,
    draw_with_replacement,
    log_inclusion,
)

V = 37
SKEWED = torch.linspace(-4, 1, V, dtype=torch.float64)
SKEWED[5] = -torch.inf
PROPOSALS = {"uniform": Uniform(V), "log_uniform": LogUniform(V), "any": Categorical(SKEWED)}
each = pytest.mark.parametrize("proposal", PROPOSALS.values(), ids=PROPOSALS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@each
def test_frequencies_are_q(proposal):
    q = proposal.log_prob(torch.arange(V)).exp()
    torch.testing.assert_close(q.sum(), torch.tensor(1.0, dtype=torch.float64))
    n = 400_000
    seen = torch.bincount(proposal.draw((n,), generator()), minlength=V)
    assert (seen[q == 0] == 0).all()
    expected = n * q[q > 0]
    chi_square = ((seen[q > 0] - expected).square() / expected).sum()
    assert chi_square < V + 5 * (2 * V) ** 0.5


def test_any_distribution_is_normalised():
    torch.testing.assert_close(
        PROPOSALS["any"].log_prob(torch.arange(V)), torch.log_softmax(SKEWED, 0)
    )


def test_log_uniform_is_zipfs_law():
    rank = torch.arange(V, dtype=torch.float64)
    expected = torch.log(((rank + 2) / (rank + 1)).log() / torch.tensor(V + 1.0).double().log())
    torch.testing.assert_close(PROPOSALS["log_uniform"].log_prob(torch.arange(V)), expected)


@each
@pytest.mark.parametrize("way", ["replacement", "distinct", "rows", "distinct rows"])
def test_weighted_sums_are_unbiased(proposal, way):
    """The mean over draws of sum_j f_j exp(c_j) is sum_j f_j."""
    f = torch.rand(V, generator=generator(1), dtype=torch.float64)
    f[5] = 0.0  # a class that one of the proposals leaves out
    if "rows" in way:
        ids, c = draw_rows(proposal, 6000, 12, generator(), distinct=way != "rows")
        sums = (f[ids] * c.exp()).sum(dim=1)
    else:
        draw = draw_with_replacement if way == "replacement" else draw_distinct
        source = generator()
        sums = torch.stack(
            [
                (f[ids] * c.exp()).sum()
                for ids, c in (draw(proposal, 12, source) for _ in range(3000))
            ]
        )
    error = sums.std() / len(sums) ** 0.5
    assert error < 0.02 * f.sum()
    assert abs(sums.mean() - f.sum()) < 5 * error


def test_distinct_rows_count_each_class_once():
    ids, c = draw_rows(PROPOSALS["any"], 50, 30, generator(), distinct=True)
    for row, weights in zip(ids, c):
        kept = row[torch.isfinite(weights)]
        assert kept.tolist() == sorted(set(row.tolist()))


def test_inclusion_is_stable_at_both_ends():
    log_q = torch.tensor([-60.0, -1.0, 0.0], dtype=torch.float64)
    found = log_inclusion(log_q, 10)
    expected = torch.tensor([-60.0 + torch.tensor(10.0).log(), 0.0, 0.0], dtype=torch.float64)
    expected[1] = torch.log(1 - (1 - log_q[1].exp()) ** 10)
    torch.testing.assert_close(found, expected)


def test_one_class_is_always_drawn():
    for proposal in (Uniform(1), LogUniform(1), Categorical(torch.zeros(1))):
        assert (proposal.draw((3, 2), generator()) == 0).all()
        assert proposal.log_prob(torch.zeros(1, dtype=torch.int64)).abs() < 1e-12
