"""Top-K by group maxima, and the priority sample with noise made on chip."""

import pytest
import torch

import sce_lm.ops.catalogue_scan as plain
from sce_lm.ops.triton.catalogue_scan import GROUP_SIZE, catalogue_topk
from sce_lm.ops.triton.tail_sample import DRAWS, tail_sample


@pytest.mark.parametrize(
    ("queries", "vocab", "width", "size", "excluded", "with_bias", "dtype"),
    [
        (5, 300, 70, 7, 20, True, torch.float32),
        (37, 333, 64, 40, 0, False, torch.float32),
        (3, 100, 33, 80, 20, False, torch.float32),
        (18, 150, 96, 10, 5, True, torch.float16),
        (1, 17, 4, 17, 0, False, torch.float32),
    ],
)
def test_topk_equals_the_plain_one(queries, vocab, width, size, excluded, with_bias, dtype):
    generator = torch.Generator().manual_seed(0)
    # Whole numbers: products and sums are exact in every dtype, and ties are many.
    q = torch.randint(-3, 4, (queries, width), generator=generator).to(dtype)
    w = torch.randint(-3, 4, (vocab, width), generator=generator).to(dtype)
    bias = torch.randint(-9, 9, (vocab,), generator=generator).to(dtype) if with_bias else None
    out = torch.randperm(vocab, generator=generator)[:excluded] if excluded else None
    found = catalogue_topk(q, w, size, bias=bias, excluded=out)
    expected = plain.catalogue_topk(q.float(), w.float(), size, bias=bias, excluded=out)
    scores = q.float() @ w.float().T + (0 if bias is None else bias.float())
    assert found.shape == expected.shape
    assert all(len(torch.unique(row)) == size for row in found)
    if out is not None:
        assert not torch.isin(found, out).any()
    best = scores.gather(1, expected).sort(dim=1).values
    assert torch.equal(scores.gather(1, found).sort(dim=1).values, best)
    assert torch.equal(found, found.sort(dim=1).values)


def test_neighbouring_best_classes_are_all_found():
    """The best classes in one group, and one group more than there are places."""
    w = torch.arange(200.0).unsqueeze(1)
    found = catalogue_topk(torch.tensor([[1.0], [-1.0]]), w, 2 * GROUP_SIZE + 1)
    assert torch.equal(found[0], torch.arange(200 - 2 * GROUP_SIZE - 1, 200))
    assert torch.equal(found[1], torch.arange(2 * GROUP_SIZE + 1))


def philox_bits(seed: int, item: int, rank: int) -> int:
    """First word of Philox 4x32-10 (Salmon et al. 2011) with counter (item, rank, 0, 0)."""
    c = [item, rank, 0, 0]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0]


def test_one_slab_is_the_definition():
    """r_j = a_j - log u_j; the m largest; c_j = max(0, tau - a_j) with tau the (m+1)-th."""
    vocab, size, seed, rank = 300, DRAWS - 3, 2**61 + 12345, 5
    a = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    a[::9] = -torch.inf
    u = torch.tensor(
        [(philox_bits(seed, j, rank) + 1) / 2**32 for j in range(vocab)], dtype=torch.float64
    )
    r = a.double() - u.log()
    order = r.argsort(descending=True)
    tau = r[order[size]]
    ids, c = tail_sample(a, size, seed, rank)
    assert torch.equal(ids, order[:size])
    expected = (tau - a[ids].double()).clamp_min(0.0)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


def test_seed_and_rank_make_the_sample():
    a = torch.zeros(400)
    first = tail_sample(a, 40, 7, 0)
    assert all(torch.equal(x, y) for x, y in zip(first, tail_sample(a, 40, 7, 0)))
    assert not torch.equal(first[0], tail_sample(a, 40, 8, 0)[0])
    assert not torch.equal(first[0], tail_sample(a, 40, 7 + 2**40, 0)[0])
    assert not torch.equal(first[0], tail_sample(a, 40, 7, 1)[0])


def test_sums_are_unbiased():
    """Over seeds, with several slabs, a heavy class and classes left out."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(120, generator=generator)
    a[11], a[40:60] = 4.0, -torch.inf
    f = torch.rand(120, generator=generator, dtype=torch.float64) + 0.5
    f[11] = 20.0
    f[40:60] = 0.0
    sums = []
    for seed in range(20):
        ids, c = tail_sample(a, DRAWS + 5, 977 * seed + 2**33)
        assert len(torch.unique(ids[c > -torch.inf])) == int((c > -torch.inf).sum())
        sums.append((f[ids] * c.double().exp()).sum())
    error = torch.stack(sums).mean() - f.sum()
    standard_error = torch.stack(sums).std() / len(sums) ** 0.5
    assert standard_error < 0.08 * f.sum()
    assert abs(error) < 4 * standard_error
    uncorrected = torch.stack([f[tail_sample(a, DRAWS + 5, s)[0]].sum() for s in range(3)]).mean()
    assert abs(uncorrected - f.sum()) > 6 * standard_error


def test_everything_is_taken_where_there_is_no_more():
    a = torch.zeros(10)
    a[3] = -torch.inf
    ids, c = tail_sample(a, DRAWS, 5)
    taken = c > -torch.inf
    assert sorted(ids[taken].tolist()) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert (c[taken] == 0).all()
