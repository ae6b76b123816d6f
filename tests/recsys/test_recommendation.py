import pytest

pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)

import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from sce_lm.recsys import SASRecConfig, build_item_tokenizer, recommend

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
    nobody = recommend(*loaded, [["new"]], 5)
    assert nobody.items == [[]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 58}, "k is 58, but there are 57 items to choose from"),
        ({"k": 0}, "k is 0"),
        ({"k": 3, "candidates": ["item 1", 2]}, "k is 3, but there are 2 items"),
        ({"candidates": []}, "there are 0 items to choose from"),
        ({"candidates": ["item 1", "x", "y"]}, "candidates names 2 items.*for instance 'x'"),
        ({"exclude": ["[UNK]"]}, r"exclude names 1 items.*for instance '\[UNK\]'"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(loaded, change, message):
    with pytest.raises(ValueError, match=message):
        recommend(*loaded, [["item 1"]], **{"k": 10, **change})
    with pytest.raises(TypeError, match="'item 1' is a string"):
        recommend(*loaded, ["item 1"])
