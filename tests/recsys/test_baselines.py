import math
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
import torch
from support.data import shared_data

from sce_lm.recsys import (
    baselines,
    build_item_tokenizer,
    catalogue,
    evaluate_items,
    item_knn_scorer,
    item_tokens,
    leave_one_out,
    markov_scorer,
    of_last_days,
    popularity_scorer,
    read_interactions,
    user_sequences,
)
from sce_lm.recsys.scoring import top_items

PAST = [[2, 3, 4], [2, 3, 2], [5, 5, 5, 5], [4], [3, 2, 6]]


@pytest.mark.parametrize("tile_size", [1, 3, 100])
def test_a_markov_chain_orders_items_by_how_often_they_came_next_then_by_popularity(tile_size):
    items = range(2, 8)
    score = markov_scorer(PAST, items)([[6, 2], [3], [9, 7]])
    _, lists = top_items(score, items, 6, tile_size=tile_size)
    assert lists.tolist() == [
        [3, 6, 2, 5, 4, 7],  # 2 -> 3 twice, 2 -> 6 once; then 2 and 5 (4 each), 4 (2), 7 (0)
        [2, 4, 5, 3, 6, 7],  # 3 -> 2 twice, 3 -> 4 once; then 5 (4), 3 (3), 6 (1), 7 (0)
        [2, 5, 3, 4, 6, 7],  # nothing came after 7: popularity alone
    ]


def test_sequences_do_not_run_into_each_other():
    score = markov_scorer([[2, 3], [4, 5]], range(2, 6))([[3]])(2, 6)
    assert (score < 1).all()  # no item came after 3


def item_knn_by_hand(past, history, items, neighbours):
    """Scores [tokens], straight from the definition."""
    holds = np.zeros((len(past), items.stop))
    for row, sequence in enumerate(past):
        holds[row, list(sequence)] = 1
    n = holds.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        similarity = np.nan_to_num(holds.T @ holds / np.sqrt(np.outer(n, n)))
    np.fill_diagonal(similarity, 0)
    scores = np.zeros(items.stop)
    for i in set(history):
        nearest = sorted(range(items.stop), key=lambda j: (-similarity[i, j], j))[:neighbours]
        scores[nearest] += similarity[i, nearest]
    return np.where(scores > 0, scores, n / (n.max() + 1) ** 2)


@pytest.mark.parametrize("neighbours", [1, 3, 100])
@pytest.mark.parametrize(("block", "tile_size"), [(1, 7), (40, 1000), (2**22, 20)])
def test_item_knn_is_its_definition(monkeypatch, neighbours, block, tile_size):
    monkeypatch.setattr(baselines, "BLOCK_PAIRS", block)
    generator = np.random.default_rng(0)
    items = range(2, 50)
    weights = 1 / np.arange(1, 41)  # the last eight items never occur
    past = [
        generator.choice(np.arange(2, 42), generator.integers(1, 15), p=weights / weights.sum())
        for _ in range(60)
    ]
    histories = [[2, 3, 2, 9], [41], [45], past[3].tolist()]
    score = item_knn_scorer(past, items, neighbours)(histories)
    found = torch.cat([score(at, min(at + tile_size, 50)) for at in range(0, 50, tile_size)], 1)
    expected = [item_knn_by_hand(past, history, items, neighbours) for history in histories]
    torch.testing.assert_close(found, torch.tensor(np.array(expected)), rtol=1e-6, atol=1e-7)


def test_item_knn_holds_a_block_of_pairs_at_a_time(monkeypatch):
    """60 users of 100 items each have 600,000 pairs, and no block more than it may."""
    monkeypatch.setattr(baselines, "BLOCK_PAIRS", 20_000)
    generator = np.random.default_rng(0)
    past = [generator.permutation(1000)[:100] for _ in range(60)]
    held = []
    pairs = baselines._pairs
    monkeypatch.setattr(
        baselines,
        "_pairs",
        lambda *given: (held.append(len(block[0])) or block for block in pairs(*given)),
    )
    item_knn_scorer(past, range(1000))
    assert len(held) >= 25
    assert max(held) <= 20_000


@pytest.mark.parametrize(
    "time_after",
    [
        lambda days: 1.6e9 + 86_400 * days,
        lambda days: int(1.6e12 + 86_400_000 * days),
        lambda days: datetime(2024, 5, 1) + timedelta(days=days),
    ],
)
def test_the_last_days_of_a_log(time_after):
    times = [time_after(days) for days in (0, 3, 9.5, 10)]
    sequences = pl.DataFrame(
        {
            "user": ["u", "v", "w"],
            "items": [[2, 3], [4], [5]],
            "times": [[times[0], times[2]], [times[1]], [times[3]]],
        }
    )
    for days, expected in ((1, [[3], [5]]), (8, [[3], [4], [5]]), (11, [[2, 3], [4], [5]])):
        recent = of_last_days(sequences, days)
        assert recent is not None
        assert recent.to_list() == expected


def test_places_in_a_log_have_no_days():
    sequences = pl.DataFrame({"user": ["u"], "items": [[2, 3]], "times": [[1, 900]]})
    assert of_last_days(sequences, 7) is None


def real_questions(name: str):
    log = read_interactions(shared_data(f"{name}.parquet"))
    tokenizer = build_item_tokenizer(catalogue(log))
    return item_tokens(tokenizer), leave_one_out(user_sequences(log, tokenizer)).test


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "hr", "ndcg"),
    [("amazon-beauty-5core", 0.0709, 0.0482), ("amazon-sports-5core", 0.0379, 0.0247)],
)
def test_the_markov_chain_is_near_its_published_figures(name, hr, ndcg):
    items, test = real_questions(name)
    scorer = markov_scorer(test["history"], items)
    report = evaluate_items(scorer, test["history"], test["target"], items=items)
    # Published without the back-off, and with ties at random.
    assert report["hr@10"] == pytest.approx(hr, rel=0.08)
    assert report["ndcg@10"] == pytest.approx(ndcg, rel=0.06)


@pytest.mark.data
def test_popularity_on_a_real_log():
    log = read_interactions(shared_data("amazon-beauty-5core.parquet"))
    tokenizer = build_item_tokenizer(catalogue(log))
    items = item_tokens(tokenizer)
    split = leave_one_out(user_sequences(log, tokenizer))
    scorer = popularity_scorer(split.train["items"].to_list(), items)
    histories, targets = split.test["history"].to_list(), split.test["target"].to_list()
    report = evaluate_items(scorer, histories, targets, items=items, tile_size=5_000)

    # The same by hand for every user: walk down the items by popularity, past those seen.
    counts = np.bincount(split.train["items"].explode().to_numpy(), minlength=len(tokenizer))
    by_popularity = sorted(items, key=lambda item: (-counts[item], item))[:300]
    gains = []
    for history, target in zip(histories, targets, strict=True):
        gone = set(history) - {target}
        shown = [item for item in by_popularity if item not in gone][:10]
        gains.append(1 / math.log2(shown.index(target) + 2) if target in shown else 0.0)
    assert report["ndcg@10"] == pytest.approx(sum(gains) / len(gains), abs=1e-12)
    assert report["hr@10"] == pytest.approx(sum(gain > 0 for gain in gains) / len(gains))
    assert 0.005 < report["ndcg@10"] < report["hr@10"] < 0.03  # far below any learned model
    assert report["coverage@10"] < 0.01


@pytest.mark.slow
@pytest.mark.data
def test_popularity_reaches_the_published_figures():
    items, test = real_questions("amazon-beauty-54k")
    scorer = popularity_scorer(test["history"], items)
    report = evaluate_items(scorer, test["history"], test["target"], items=items)
    assert report["hr@10"] == pytest.approx(0.0088, abs=5e-5)
    assert report["ndcg@10"] == pytest.approx(0.0038, abs=5e-5)
