"""The priority sample with noise made on chip."""

import pytest
import torch

from sce_lm.ops.triton.priority_sample import DRAWS, _sample, expected_draws, priority_sample


def sample(a: torch.Tensor, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _sample(a, size, torch.tensor([seed]))


def philox_bits(seed: int, item: int) -> int:
    """First word of Philox 4x32-10 (Salmon et al. 2011) with counter (item, 0, 0, 0)."""
    c = [item, 0, 0, 0]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def test_one_slab_is_the_definition():
    """r_j = a_j - log u_j; the m largest; c_j = max(0, tau - a_j) with tau the (m+1)-th."""
    vocab, size, seed = 300, DRAWS - 3, 2**61 + 12345
    a = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    a[::9] = -torch.inf
    u = torch.tensor([(philox_bits(seed, j) + 1) / 2**32 for j in range(vocab)]).double()
    r = a.double() - u.log()
    order = r.argsort(descending=True)
    tau = r[order[size]]
    ids, c = sample(a, size, seed)
    assert torch.equal(ids, order[:size])
    expected = (tau - a[ids].double()).clamp_min(0.0)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_seed_makes_the_sample():
    a = torch.zeros(120)
    first = sample(a, 20, 7)
    assert all(torch.equal(x, y) for x, y in zip(first, sample(a, 20, 7)))
    assert not torch.equal(first[0], sample(a, 20, 8)[0])
    assert not torch.equal(first[0], sample(a, 20, 7 + 2**40)[0])


def test_the_generator_makes_the_seed():
    a, generator = torch.zeros(120), torch.Generator().manual_seed(3)
    first, second = (priority_sample(a, 20, generator)[0] for _ in range(2))
    assert not torch.equal(first, second)
    again = priority_sample(a, 20, torch.Generator().manual_seed(3))[0]
    assert torch.equal(first, again)


def heavy() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-proposal with a heavy class and classes left out, and what is summed."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(120, generator=generator)
    a[11], a[40:60] = 4.0, -torch.inf
    f = torch.rand(120, generator=generator, dtype=torch.float64) + 0.5
    f[11], f[40:60] = 20.0, 0.0
    return a, f


def test_sums_are_unbiased():
    """Over seeds, with several slabs."""
    a, f = heavy()
    sums = []
    for seed in range(16):
        ids, c = sample(a, DRAWS + 5, 977 * seed + 2**33)
        assert len(torch.unique(ids[c > -torch.inf])) == int((c > -torch.inf).sum())
        sums.append((f[ids] * c.double().exp()).sum())
    error = torch.stack(sums).mean() - f.sum()
    standard_error = torch.stack(sums).std() / len(sums) ** 0.5
    assert standard_error < 0.08 * f.sum()
    assert abs(error) < 4 * standard_error
    uncorrected = torch.stack([f[sample(a, DRAWS + 5, s)[0]].sum() for s in range(3)]).mean()
    assert abs(uncorrected - f.sum()) > 6 * standard_error


def test_certain_classes_waste_no_draws():
    """A Zipf proposal in the order of ids, as tokenizers have it: slabs that hold equal shares of
    the proposal itself would leave most places of the first ones empty."""
    q = 1.0 / torch.arange(1, 401).double()
    size = 4 * DRAWS
    _, c = sample(q.log(), size, 0)
    assert int((c > -torch.inf).sum()) >= size - 4


@pytest.mark.parametrize("size", [1, 7, 40, 99, 100, 150])
def test_expected_draws_sum_to_the_size(size):
    q = torch.rand(120, generator=torch.Generator().manual_seed(1)).double() ** 4 + 1e-6
    q[::6] = 0.0
    p = expected_draws(q, size)
    assert ((p >= 0) & (p <= 1)).all()
    assert (p[::6] == 0).all()
    assert float(p.sum()) == pytest.approx(min(size, 100), rel=1e-5)
    if size >= 100:
        assert (p[q > 0] == 1).all()
    else:
        least = (p / q)[(q > 0) & (p < 1)]
        assert float(least.max() / least.min()) == pytest.approx(1.0)
        assert (q[p == 1] >= q[(p < 1) & (q > 0)].max()).all()


@pytest.mark.parametrize("extra", [0, 1, 25])
def test_everything_is_taken_where_there_is_no_more(extra):
    """Over several slabs, whatever the proposal: the loss is exact then."""
    a = 3.0 * torch.randn(70, generator=torch.Generator().manual_seed(2))
    a[3::7] = -torch.inf
    left = torch.isfinite(a).nonzero().squeeze(1)
    ids, c = sample(a, len(left) + extra, 5)
    taken = c > -torch.inf
    assert torch.equal(ids[taken].sort().values, left)
    assert (c[taken] == 0).all()
