"""The random split of pairs and its metrics, against sums written out."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from sce_lm import objectives, recsys
from sce_lm.benchmarks.papers.xir import code_ndcg
from sce_lm.hf.adapter import apply_sce
from sce_lm.recsys.pairs import pair_hits


def sequences(*lengths):
    rows = [list(range(2, 2 + n)) for n in lengths]
    users = [f"u{i}" for i in range(len(lengths))]
    return pl.DataFrame({"user": users, "items": rows}, schema_overrides={"items": pl.List(int)})


def test_a_fifth_of_each_user_is_held_out_at_random():
    log = sequences(1, 2, 3, 10, 101)
    split = recsys.random_split(log, seed=1)
    assert split["test"].list.len().to_list() == [0, 0, 1, 2, 20]
    for before, train, test in zip(log["items"], split["train"], split["test"]):
        assert sorted([*train, *test]) == before.to_list()
    again, other = recsys.random_split(log, seed=1), recsys.random_split(log, seed=2)
    assert again.equals(split)
    assert set(other["test"][4]) != set(split["test"][4])
    assert set(split["test"][4]) != set(range(2, 22))
    with pytest.raises(ValueError, match="rounds to one or more"):
        recsys.random_split(sequences(1, 2))
    with pytest.raises(ValueError, match="between 0 and 1"):
        recsys.random_split(log, 1.0)


def asked():
    """Users 0 and 2 are asked; item 7 is best for all, then 6, 5, 4, ..."""
    split = pl.DataFrame(
        {
            "user": ["a", "b", "c"],
            "train": [[7], [2, 3], [4]],
            "test": [[5, 2], [], [7]],
        },
        schema_overrides={"train": pl.List(pl.Int32), "test": pl.List(pl.Int32)},
    )
    rows = []

    def scorer(histories):
        rows.append(np.array(histories).tolist())
        scores = torch.arange(8.0).repeat(len(histories), 1)
        return lambda start, stop: scores[:, start:stop].clone()

    return split, scorer, rows


def test_metrics_with_several_relevant_items():
    split, scorer, rows = asked()
    report = recsys.evaluate_pairs(scorer, split, items=range(2, 8), k=(2, 5))
    assert rows == [[[0], [2]]]  # a user is known by the number of its row
    # User a sees 6 5 4 3 2 (7 is seen) and wants 5, 2; user c sees 7 first, which it wants.
    a2, a5 = 1 / math.log2(3), 1 / math.log2(3) + 1 / math.log2(6)
    ideal = 1 + 1 / math.log2(3)
    assert report["ndcg@2"] == pytest.approx((a2 / ideal + 1) / 2)
    assert report["ndcg@5"] == pytest.approx((a5 / ideal + 1) / 2)
    assert report["recall@2"] == pytest.approx((1 / 2 + 1) / 2)
    assert report["recall@5"] == 1
    assert report["coverage@2"] == pytest.approx(3 / 6)  # 6, 5, 7
    kept = recsys.evaluate_pairs(scorer, split, items=range(2, 8), k=(2,), mask_seen=False)
    assert kept["ndcg@2"] == pytest.approx(1 / 2)


def test_the_figure_of_the_authors_evaluator():
    split, scorer, _ = asked()
    found = pair_hits(scorer, split, items=range(2, 8), depth=5)
    flat = 1 / math.log2(3)  # at every place but the first
    expected = (2 * flat / (1 + 1 / math.log2(3)) + 1) / 2
    assert code_ndcg(found, 5) == pytest.approx(expected)


def test_a_two_tower_model_scores_by_inner_products(tmp_path):
    torch.manual_seed(0)
    config = recsys.TwoTowerConfig(vocab_size=11, num_users=4, hidden_size=3)
    model = recsys.TwoTowerForCausalLM(config)
    users, items = torch.tensor([3, 0, 3]), torch.tensor([2, 10, 5])
    inputs = {
        "input_ids": torch.stack((users, users), 1),
        "labels": torch.stack((torch.full((3,), -100), items), 1),
    }
    logits = model.user_embeddings.weight[users] @ model.lm_head.weight.T
    expected = torch.nn.functional.cross_entropy(logits, items)
    torch.testing.assert_close(model(**inputs).loss, expected)
    apply_sce(model, objectives.get("exact"))
    torch.testing.assert_close(model(**inputs).loss, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, recsys.TwoTowerForCausalLM)
    torch.testing.assert_close(loaded(users[:, None]).logits[:, 0], logits)
