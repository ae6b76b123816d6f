import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sce_lm.recsys import evaluate_items, metrics, popularity_scorer


def test_ranks_give_the_metrics_of_their_definitions():
    ranks = torch.tensor([1, 2, 3, 10, 11])
    assert metrics.hit_rate(ranks, 10) == pytest.approx(4 / 5)
    assert metrics.hit_rate(ranks, 2) == pytest.approx(2 / 5)
    assert metrics.mrr(ranks, 10) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 10) / 5)
    gains = [1, 1 / math.log2(3), 1 / 2, 1 / math.log2(11)]
    assert metrics.ndcg(ranks, 10) == pytest.approx(sum(gains) / 5)
    assert metrics.ndcg(ranks, 1) == pytest.approx(1 / 5)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 8))
def test_metrics_of_one_relevant_item_are_those_of_relevance_lists(ranks, k):
    """By the definitions for any number of relevant items, from each user's list of places."""
    lists = [[place == rank for place in range(1, k + 1)] for rank in ranks]
    precisions = [[sum(found[:n]) / n for n in range(1, k + 1)] for found in lists]
    expected = {
        "precision": [sum(found) / k for found in lists],
        "recall": [sum(found) / 1 for found in lists],
        "map": [sum(p for p, hit in zip(at, found) if hit) for at, found in zip(precisions, lists)],
    }
    for name, values in expected.items():
        found = metrics.RANK_METRICS[name](torch.tensor(ranks), k)
        assert found == pytest.approx(sum(values) / len(values))


def test_novelty_is_the_mean_information_of_the_items_listed():
    counts = torch.tensor([8, 4, 3, 1, 0])  # 1, 2, 2.4, 4 and, as if it had one event, 4 bits
    listed = torch.tensor([3, 1, 0, 2, 2])
    assert metrics.novelty(listed, counts) == pytest.approx((3 * 1 + 2 + 2 * 4 + 2 * 4) / 8)
    report = evaluate_items(
        popularity_scorer([[0] * 8 + [1] * 4 + [2] * 3 + [3]], range(5)),
        [[0], [3]],
        [1, 0],
        items=range(5),
        k=(1, 2),
        counts=counts,
    )  # the lists are 1, 2 and 0, 1
    assert report["novelty@2"] == pytest.approx((2 + math.log2(16 / 3) + 1 + 2) / 4)
    assert "novelty@1" not in report


def test_coverage_counts_the_items_that_anyone_is_shown():
    best = torch.full((6,), 4)
    metrics.update_best_positions(best, torch.tensor([[5, 0, 1], [0, 5, -1]]))
    metrics.update_best_positions(best, torch.tensor([[5, 2, 0]]))
    assert best.tolist() == [1, 3, 2, 4, 4, 1]
    assert metrics.coverage(best, 1) == pytest.approx(2 / 6)
    assert metrics.coverage(best, 2) == pytest.approx(3 / 6)
    assert metrics.coverage(best, 3) == pytest.approx(4 / 6)


def test_intervals_are_those_of_resampled_users():
    ranks = torch.tensor([1] * 30 + [2] * 50 + [7] * 20 + [11] * 300)
    random = np.random.default_rng(1)
    resamples = ranks.numpy()[random.integers(0, len(ranks), size=(4000, len(ranks)))]
    found = metrics.bootstrap_intervals(ranks, 10)
    for name, gain in {
        "hr": (resamples <= 10) * 1.0,
        "ndcg": (resamples <= 10) / np.log2(resamples + 1),
        "mrr": (resamples <= 10) / resamples,
        "precision": (resamples <= 10) / 10,
    }.items():
        expected = np.quantile(gain.mean(1), (0.025, 0.975))
        assert found[name] == pytest.approx(expected, abs=0.006)
        assert found[name][0] < metrics.RANK_METRICS[name](ranks, 10) < found[name][1]
    assert metrics.bootstrap_intervals(ranks, 10) == found
    narrower = metrics.bootstrap_intervals(ranks.repeat(100), 10)
    assert narrower["hr"][1] - narrower["hr"][0] < (found["hr"][1] - found["hr"][0]) / 8


def test_the_interval_of_certain_figures_is_a_point():
    assert metrics.bootstrap_intervals(torch.tensor([1, 1, 1]), 5)["ndcg"] == (1.0, 1.0)
    assert metrics.bootstrap_intervals(torch.tensor([6, 6, 9]), 5)["mrr"] == (0.0, 0.0)


def test_the_popularity_profile_counts_what_goes_to_the_most_popular():
    trained = torch.zeros(1000, dtype=torch.int64)
    trained[500:510] = torch.arange(10, 0, -1)  # item 500 is the most popular
    listed = torch.zeros_like(trained)
    listed[500], listed[503], listed[0] = 5, 3, 2
    profile = metrics.popularity_profile(listed, trained)
    assert profile["catalogue"] == [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    assert profile["recommended"][:3] == pytest.approx([0.5, 0.5, 0.8])
    assert profile["recommended"][-1] == 1
    assert profile["trained"][:3] == pytest.approx([10 / 55, 27 / 55, 1])
