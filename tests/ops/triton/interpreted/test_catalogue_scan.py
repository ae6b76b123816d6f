"""Top-K by group maxima."""

import pytest
import torch

import sce_lm.ops.catalogue_scan as plain
from sce_lm.ops.head import Head
from sce_lm.ops.triton.catalogue_scan import GROUP_SIZE, catalogue_topk


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
    found = catalogue_topk(q, Head(w, None, bias), size, excluded=out)
    wide = Head(w.float(), None, bias)
    expected = plain.catalogue_topk(q.float(), wide, size, excluded=out)
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
    found = catalogue_topk(torch.tensor([[1.0], [-1.0]]), Head(w), 2 * GROUP_SIZE + 1)
    assert torch.equal(found[0], torch.arange(200 - 2 * GROUP_SIZE - 1, 200))
    assert torch.equal(found[1], torch.arange(2 * GROUP_SIZE + 1))
