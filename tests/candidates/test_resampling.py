"""Counts of independent draws from a pool."""

import torch

from sce_lm.candidates.resampling import multinomial_counts


def test_counts_follow_the_weights():
    log_weights = torch.tensor([[0.0, 1.0, -torch.inf, 3.0], [-90.0, -91.0, -95.0, -torch.inf]])
    generator = torch.Generator().manual_seed(0)
    counts = multinomial_counts(log_weights, 200_000, generator)
    assert counts.sum(dim=1).tolist() == [200_000, 200_000]
    expected = torch.softmax(log_weights, dim=1)
    torch.testing.assert_close(counts / 200_000, expected, atol=0.005, rtol=0)
    assert (counts[expected == 0] == 0).all()


def test_a_row_without_classes_draws_nothing():
    log_weights = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]])
    counts = multinomial_counts(log_weights, 7, torch.Generator().manual_seed(0))
    assert counts.tolist() == [[0, 0], [7, 0]]
