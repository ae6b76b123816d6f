"""Counts of draws from a pool."""

import pytest
import torch

from sce_lm.candidates.resampling import multinomial_counts, systematic_counts

BOTH = pytest.mark.parametrize("draw", [multinomial_counts, systematic_counts])


@BOTH
def test_counts_follow_the_weights(draw):
    log_weights = torch.tensor([[0.0, 1.0, -torch.inf, 3.0], [-90.0, -91.0, -95.0, -torch.inf]])
    generator = torch.Generator().manual_seed(0)
    counts = draw(log_weights, 200_000, generator)
    assert counts.sum(dim=1).tolist() == [200_000, 200_000]
    expected = torch.softmax(log_weights, dim=1)
    torch.testing.assert_close(counts / 200_000, expected, atol=0.005, rtol=0)
    assert (counts[expected == 0] == 0).all()


@BOTH
def test_a_row_without_classes_draws_nothing(draw):
    log_weights = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]])
    counts = draw(log_weights, 7, torch.Generator().manual_seed(0))
    assert counts.tolist() == [[0, 0], [7, 0]]


@BOTH
def test_few_draws_are_unbiased_and_have_the_variance_of_their_kind(draw):
    """Independent draws have the multinomial's variance; a systematic count is one of the two
    whole numbers around what it is expected to be, also where that is far below 1."""
    rows, draws = 200_000, 5
    w = torch.tensor([0.003, 0.3, 0.0, 0.047, 0.25, 0.4], dtype=torch.float64)
    counts = draw(w.log().expand(rows, -1), draws, torch.Generator().manual_seed(1))
    assert (counts.sum(dim=1) == draws).all()
    expected = draws * w
    part = expected - expected.floor()
    variance = expected * (1 - w) if draw is multinomial_counts else part * (1 - part)
    error = (variance / rows).sqrt()
    assert ((counts.mean(dim=0) - expected).abs() <= 5 * error + 1e-12).all()
    torch.testing.assert_close(counts.var(dim=0), variance, rtol=0.05, atol=1e-12)
