"""The two-level sampler draws from the dense kernel distribution, and says so."""

import pytest
import torch

import sce_lm.candidates.kernel_sampler as module
from sce_lm.candidates.kernel_sampler import (
    KernelSampler,
    fit_projection,
    mean_kernel_proposal,
)
from sce_lm.objectives.reference import kernel_reference

V, D = 203, 7
SIZES = [1, 16, 29, 203, 500]  # 203 = 7 · 29; the others leave a block that is not full


def case(dtype=torch.float64, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(5, D, generator=generator, dtype=torch.float64)
    rows = torch.randn(V, D, generator=generator, dtype=torch.float64) * spread / D**0.5 + 0.1
    return queries.to(dtype), rows.to(dtype)


def chi_square(seen, q):
    """In units of its standard deviation above its mean; classes of small expectation together."""
    expected = q * seen.sum()
    small = expected < 5
    if small.any():
        seen = torch.cat([seen[~small], seen[small].sum(0, keepdim=True)])
        expected = torch.cat([expected[~small], expected[small].sum(0, keepdim=True)])
    degrees = len(expected) - 1
    return float((((seen - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5)


@pytest.mark.parametrize("block_size", SIZES)
@pytest.mark.parametrize("power", [2, 4])
def test_frequencies_are_the_kernel_s(power, block_size):
    queries, rows = case()
    sampler = KernelSampler(rows, 64, 20.0, power=power, block_size=block_size)
    ids, _ = sampler.draw(queries, 40_000, torch.Generator().manual_seed(1))
    q = kernel_reference(queries, rows, alpha=20.0, power=power).exp()
    for drawn, expected in zip(ids, q):
        assert chi_square(torch.bincount(drawn, minlength=V), expected) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block_size", [None, *SIZES])
@pytest.mark.parametrize("power", [2, 4])
def test_log_q_is_the_dense_formula_s(power, block_size, dtype):
    queries, rows = case(dtype)
    sampler = KernelSampler(rows, 64, 100.0, power=power, block_size=block_size)
    ids, log_q = sampler.draw(queries, 64, torch.Generator().manual_seed(1))
    dense = kernel_reference(queries.double(), rows.double(), alpha=100.0, power=power)
    torch.testing.assert_close(log_q, dense.gather(1, ids), atol=1e-5, rtol=0)


def test_a_drawn_block_may_be_cut(monkeypatch):
    queries, rows = case()
    whole = KernelSampler(rows, 64, 100.0, block_size=29)
    expected = whole.draw(queries, 50, torch.Generator().manual_seed(1))
    for elements in (1, 100):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
        cut = KernelSampler(rows, 64, 100.0, block_size=29)
        found = cut.draw(queries, 50, torch.Generator().manual_seed(1))
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])


def test_negative_masses_are_raised_and_log_q_stays_exact(monkeypatch):
    """Gram matrices that are wrong enough to give negative masses: the odds are other ones then,
    and log q is theirs."""
    queries, rows = case()
    sampler = KernelSampler(rows, 64, 20.0, block_size=29)
    sampler.grams[2:4] *= -1.0  # of a sum of squares: below 0
    masses = sampler._masses(queries, torch.zeros(5, dtype=torch.float64))
    assert (masses[:, 2:4] == 29).all()
    ids, log_q = sampler.draw(queries, 40_000, torch.Generator().manual_seed(1))
    inside = kernel_reference(queries, rows, alpha=20.0).exp().unflatten(1, (7, 29))
    q = masses / masses.sum(dim=1, keepdim=True)
    q = (q.unsqueeze(2) * inside / inside.sum(dim=2, keepdim=True)).flatten(1)
    torch.testing.assert_close(log_q, q.log().gather(1, ids))
    for drawn, expected in zip(ids, q):
        assert chi_square(torch.bincount(drawn, minlength=V), expected) < 5


def test_block_size_is_the_cost_model_s():
    rows = torch.zeros(100_000, 16)
    sampler = KernelSampler(rows, 50, 1.0)
    assert sampler.block_size == 127  # sqrt(16 · 100,000 / 100) = 126.5
    cost = sampler.operations(10**9, 50)
    for size in (60, 250):
        assert KernelSampler(rows, 50, 1.0, block_size=size).operations(10**9, 50) > cost
    assert sampler.grams.shape == (788, 16 * 17 // 2 + 16 + 1)


@pytest.mark.parametrize("power", [2, 4])
def test_a_shift_is_taken_off(power):
    queries, rows = case()
    shift = torch.tensor([-3.0, 0.0, 0.5, 2.0, 9.0], dtype=torch.float64)
    sampler = KernelSampler(rows, 64, 2.0, power=power, block_size=16)
    ids, log_q = sampler.draw(queries, 40_000, torch.Generator().manual_seed(1), shift)
    # A bias of -shift, one position at a time.
    dense = torch.cat(
        [
            kernel_reference(q[None], rows, alpha=2.0, power=power, bias=-c)
            for q, c in zip(queries, shift)
        ]
    )
    torch.testing.assert_close(log_q, dense.gather(1, ids), atol=1e-9, rtol=0)
    for drawn, expected in zip(ids, dense.exp()):
        assert chi_square(torch.bincount(drawn, minlength=V), expected) < 5


@pytest.mark.parametrize("shift", [None, torch.linspace(-2.0, 3.0, 5, dtype=torch.float64)])
@pytest.mark.parametrize("alpha", [0.1, 100.0])
def test_shared_proposal_is_the_mean_over_positions(alpha, shift):
    queries, rows = case()
    biases = torch.zeros(5, dtype=torch.float64) if shift is None else -shift
    each = [
        kernel_reference(q[None], rows, alpha=alpha, bias=b).exp() for q, b in zip(queries, biases)
    ]
    mean = torch.cat(each).mean(dim=0)
    proposal = mean_kernel_proposal(rows, queries, alpha, shift)
    torch.testing.assert_close(proposal.log_prob(torch.arange(V)), mean.log())


def test_projection_keeps_what_the_hidden_states_see():
    """Hidden states of rank 3 in 20 dimensions: 3 directions keep every inner product."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(90, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    rows = torch.randn(400, 20, generator=generator)
    of_hidden, of_rows = fit_projection(queries, rows, 3)
    exact = queries @ rows.T
    torch.testing.assert_close((queries @ of_hidden) @ (rows @ of_rows).T, exact, atol=0.05, rtol=0)
    # The directions of the rows alone, which do not look at the hidden states, keep less.
    principal = torch.linalg.svd(rows, full_matrices=False).Vh[:3].T
    assert ((queries @ principal) @ (rows @ principal).T - exact).square().mean() > 1.0
