import math

import pytest
import torch

from sce_lm.recsys import metrics


def test_ranks_give_the_metrics_of_their_definitions():
    ranks = torch.tensor([1, 2, 3, 10, 11])
    assert metrics.hit_rate(ranks, 10) == pytest.approx(4 / 5)
    assert metrics.hit_rate(ranks, 2) == pytest.approx(2 / 5)
    assert metrics.mrr(ranks, 10) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 10) / 5)
    gains = [1, 1 / math.log2(3), 1 / 2, 1 / math.log2(11)]
    assert metrics.ndcg(ranks, 10) == pytest.approx(sum(gains) / 5)
    assert metrics.ndcg(ranks, 1) == pytest.approx(1 / 5)


def test_coverage_counts_the_items_that_anyone_is_shown():
    best = torch.full((6,), 4)
    metrics.update_best_positions(best, torch.tensor([[5, 0, 1], [0, 5, -1]]))
    metrics.update_best_positions(best, torch.tensor([[5, 2, 0]]))
    assert best.tolist() == [1, 3, 2, 4, 4, 1]
    assert metrics.coverage(best, 1) == pytest.approx(2 / 6)
    assert metrics.coverage(best, 2) == pytest.approx(3 / 6)
    assert metrics.coverage(best, 3) == pytest.approx(4 / 6)
