import math

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from sce_lm.recsys import SASRecConfig, build_item_tokenizer, count_items, recommend

ITEMS = [f"item {i}" if i % 2 else i for i in range(57)]
"""Ids of two types."""

CONFIGS = {
    "sasrec": SASRecConfig(hidden_size=16, max_position_embeddings=20, initializer_range=1.0),
    "gpt2": GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=20, initializer_range=0.3),
    "llama": LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
        initializer_range=0.3,
    ),
}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    """A saved model and tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_item_tokenizer(ITEMS)
    config = CONFIGS[request.param]
    config.update(
        {
            "vocab_size": len(tokenizer),
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def raw_histories(users: int = 30) -> list[list[object]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (users,), generator=generator).tolist()
    return [[ITEMS[i] for i in torch.randint(0, 57, (n,), generator=generator)] for n in lengths]


@torch.no_grad()
def stock_lists(model, tokenizer, histories, k, exclude_seen=True, only=None):
    """Items and scores from the logits of the plain model, a user at a time."""
    lists, scores = [], []
    for history in histories:
        ids = tokenizer.convert_tokens_to_ids([str(item) for item in history])
        logits = model(input_ids=torch.tensor([ids[-20:]])).logits[0, -1]
        logits[tokenizer.all_special_ids] = -torch.inf
        if exclude_seen:
            logits[ids] = -torch.inf
        if only is not None:
            keep = torch.tensor(tokenizer.convert_tokens_to_ids(only))
            logits = torch.full_like(logits, -torch.inf).scatter(0, keep, logits[keep])
        best = logits.topk(k)
        finite = int(best.values.isfinite().sum())
        lists.append(tokenizer.convert_ids_to_tokens(best.indices[:finite]))
        scores.append(best.values[:finite].tolist())
    return lists, scores


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_lists_are_those_of_the_stock_models_logits(loaded, exclude_seen):
    histories = raw_histories()
    found = recommend(*loaded, histories, 7, exclude_seen=exclude_seen, batch_size=8, tile_size=13)
    lists, scores = stock_lists(*loaded, histories, 7, exclude_seen)
    assert found.items == lists
    for mine, stock in zip(found.scores, scores, strict=True):
        assert mine == pytest.approx(stock, abs=1e-5)
    assert (found.unknown_items, found.users_without_history) == (0, 0)


def test_only_candidates_and_nothing_excluded_is_listed(loaded):
    histories = raw_histories()
    candidates = [str(item) for item in ITEMS[5:40]]
    found = recommend(*loaded, histories, 6, candidates=ITEMS[5:40], tile_size=10)
    assert found.items == stock_lists(*loaded, histories, 6, only=candidates)[0]
    excluded = ITEMS[5:20]
    found = recommend(*loaded, histories, 6, candidates=ITEMS[5:40], exclude=excluded)
    assert found.items == stock_lists(*loaded, histories, 6, only=candidates[15:])[0]
    found = recommend(*loaded, histories, 6, exclude=ITEMS[:50])
    assert all(set(listed) <= {str(item) for item in ITEMS[50:]} for listed in found.items)


def test_lists_end_where_items_do(loaded):
    history = ITEMS[:55]
    found = recommend(*loaded, [history], 10)
    assert sorted(found.items[0]) == sorted(str(item) for item in ITEMS[55:])
    assert len(found.scores[0]) == 2
    assert all(math.isfinite(score) for score in found.scores[0])


def test_unknown_items_are_skipped_and_counted(loaded):
    known = raw_histories(3)
    histories = [["never seen", *known[0]], ["new", "[PAD]"], known[1], [], [*known[2], "new"]]
    found = recommend(*loaded, histories, 5)
    assert (found.unknown_items, found.users_without_history) == (4, 2)
    expected = recommend(*loaded, known, 5).items
    assert found.items == [expected[0], [], expected[1], [], expected[2]]
    assert found.sources == ["model", "none", "model", "none", "model"]
    nobody = recommend(*loaded, [["new"]], 5)
    assert (nobody.items, nobody.scores, nobody.sources) == ([[]], [[]], ["none"])
    assert recommend(*loaded, [], 5).items == []


def test_users_of_whom_nothing_is_known_get_what_is_popular(loaded):
    model, tokenizer = loaded
    # Items 10 to 29 occur; of equal counts the first of the catalogue comes first.
    counted = [[2 + i] * (3 if i % 5 else 9) for i in range(10, 30)]
    count_items(tokenizer, pl.DataFrame({"items": counted}))
    known = raw_histories(2)
    found = recommend(model, tokenizer, [["new"], *known, []], 6, tile_size=13)
    popular = [str(ITEMS[i]) for i in (10, 15, 20, 25, 11, 12)]
    assert found.items[0] == found.items[3] == popular
    assert found.scores[0] == [9, 9, 9, 9, 3, 3]
    assert found.sources == ["popularity", "model", "model", "popularity"]
    assert (found.unknown_items, found.users_without_history) == (1, 2)
    assert found.items[1:3] == recommend(model, tokenizer, known, 6).items

    some = recommend(model, tokenizer, [[]], 2, candidates=ITEMS[13:17], exclude=[ITEMS[15]])
    assert some.items == [[str(ITEMS[13]), str(ITEMS[14])]]
    rare = recommend(model, tokenizer, [[]], 3, candidates=ITEMS[:2] + ITEMS[29:30])
    assert rare.items == [[str(ITEMS[29]), str(ITEMS[0]), str(ITEMS[1])]]


def test_a_user_who_has_seen_everything_has_no_list(loaded):
    found = recommend(*loaded, [ITEMS[:5]], 2, candidates=ITEMS[:4])
    assert (found.items, found.sources, found.users_without_history) == ([[]], ["none"], 0)


def test_unknown_candidates_and_exclusions_are_counted(loaded):
    history = raw_histories(1)
    found = recommend(*loaded, history, 5, candidates=["x", *ITEMS[5:40], None], exclude=["y", 6.0])
    without = [item for item in ITEMS[5:40] if item != 6]
    assert found.items == recommend(*loaded, history, 5, candidates=without).items
    assert (found.unknown_candidates, found.unknown_excluded) == (2, 1)


TABLES = {
    "lists": lambda rows: rows,
    "numpy": lambda rows: [np.array(row) for row in rows],
    "polars column": lambda rows: pl.Series(rows),
    "polars": lambda rows: pl.DataFrame({"user": range(len(rows)), "history": rows}),
    "pandas column": lambda rows: pd.Series(rows),
    "pandas": lambda rows: pd.DataFrame({"history": rows}),
    "Arrow column": lambda rows: pa.chunked_array([rows]),
    "Arrow": lambda rows: pa.table({"history": rows}),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("folder", ["gpt2"], indirect=True)
def test_histories_come_as_lists_columns_and_tables(loaded, kind):
    numbers = [[0, 2, 4], [6], [8, 10]]
    expected = recommend(*loaded, numbers, 5).items
    assert recommend(*loaded, TABLES[kind](numbers), 5).items == expected
    with_gaps = [[0.0, 2.0, 4.0], [6.0], [8.0, float("nan"), 10.0]]
    found = recommend(*loaded, TABLES[kind](with_gaps), 5)
    assert (found.items, found.unknown_items) == (expected, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 58}, "k is 58, but there are 57 items to choose from"),
        ({"k": 0}, "k is 0"),
        ({"k": 3, "candidates": ["item 1", 2]}, "k is 3, but there are 2 items"),
        ({"candidates": []}, "no items to choose from: 0 candidates are in the catalogue, 0 are"),
        ({"candidates": ["x", "y"]}, "0 candidates are in the catalogue, 2 are not"),
        ({"candidates": [2], "exclude": [2.0]}, "1 candidates are in .*exclude takes away 1 items"),
        ({"exclude": ITEMS}, "exclude takes away the whole catalogue"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"tile_size": 0}, "tile_size is 0"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
@pytest.mark.parametrize("folder", ["gpt2"], indirect=True)
def test_what_cannot_be_done_is_one_sentence(loaded, change, message):
    with pytest.raises(ValueError, match=message):
        recommend(*loaded, [["item 1"]], **{"k": 10, **change})


@pytest.mark.parametrize("folder", ["gpt2"], indirect=True)
def test_what_is_no_list_of_lists_is_refused(loaded):
    with pytest.raises(TypeError, match="'item 1' is a string"):
        recommend(*loaded, ["item 1"])
    with pytest.raises(TypeError, match="7 is a int"):
        recommend(*loaded, [7])
    with pytest.raises(TypeError, match="exclude is the string 'item 1'"):
        recommend(*loaded, [["item 1"]], exclude="item 1")
    log = pd.DataFrame({"user_id": [1], "item_id": ["item 1"]})
    with pytest.raises(ValueError, match=r"'user_id', 'item_id' and not 'history'.*read_histories"):
        recommend(*loaded, log)
