"""Exported vectors, indices of them, and lists by an index."""

import pytest

pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)

import json

import numpy as np
import polars as pl
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, PhiConfig

from sce_lm import recsys
from sce_lm.recsys import SASRecConfig, build_item_tokenizer, export, load_index, recommend
from sce_lm.recsys.item_index import ItemIndex, share_found

NUM_ITEMS = 1200
ITEMS = [f"item {i}" for i in range(NUM_ITEMS)]
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 20,
}
CONFIGS = {
    "sasrec": SASRecConfig(hidden_size=16, max_position_embeddings=20, initializer_range=1.0),
    "bias": PhiConfig(**SMALL, initializer_range=0.3),
    "soft cap": Gemma2Config(**SMALL, final_logit_softcapping=2.0, initializer_range=0.3),
}
KINDS = ["faiss", "usearch"]


def make(name):
    torch.manual_seed(0)
    tokenizer = build_item_tokenizer(ITEMS)
    config = CONFIGS[name]
    config.update({"vocab_size": len(tokenizer), "pad_token_id": 0})
    model = AutoModelForCausalLM.from_config(config).eval()
    if name == "bias":
        torch.nn.init.normal_(model.lm_head.bias)
    return model, tokenizer


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request):
    return make(request.param)


@pytest.fixture(scope="module")
def sasrec():
    return make("sasrec")


def some_histories(users=40):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (users,), generator=generator).tolist()
    return [
        [ITEMS[i] for i in torch.randint(0, NUM_ITEMS, (n,), generator=generator)] for n in lengths
    ]


def share_of_lists(found, exact):
    same = [{*a} & {*b} for a, b in zip(found.items, exact.items, strict=True)]
    return sum(map(len, same)) / sum(map(len, exact.items))


def test_inner_products_with_the_vectors_rank_as_the_model_does(loaded, tmp_path):
    model, tokenizer = loaded
    card = export(model, tokenizer, tmp_path / "out")
    vectors = load_file(tmp_path / "out" / "vectors.safetensors")["vectors"]
    assert pl.read_parquet(tmp_path / "out" / "items.parquet")["item"].to_list() == ITEMS
    assert json.loads((tmp_path / "out" / "card.json").read_text()) == card
    assert (card["items"], card["dimension"]) == vectors.shape
    history = tokenizer.convert_tokens_to_ids(ITEMS[3:9])
    with torch.no_grad():
        query = model.model(torch.tensor([history])).last_hidden_state[0, -1].numpy()
        out = model(torch.tensor([history]))
    if card["bias_in_last_column"]:
        query = np.append(query, 1.0)
    stock = out.logits[0, -1, 2:].numpy()
    assert np.argsort(-(vectors @ query), kind="stable")[:50].tolist() == (
        np.argsort(-stock, kind="stable")[:50].tolist()
    )
    cap = card["soft_cap"]
    scores = vectors @ query if cap is None else cap * np.tanh(vectors @ query / cap)
    assert scores == pytest.approx(stock, abs=1e-4)


def test_formats_hold_the_same_vectors(loaded, tmp_path):
    export(*loaded, tmp_path / "a")
    export(*loaded, tmp_path / "b", "parquet")
    table = pl.read_parquet(tmp_path / "b" / "items.parquet")
    vectors = load_file(tmp_path / "a" / "vectors.safetensors")["vectors"]
    assert np.array_equal(table["vector"].to_numpy(), vectors)
    assert table["item"].to_list() == ITEMS


@pytest.mark.parametrize("kind", KINDS)
def test_lists_by_an_index_find_what_exact_lists_hold(loaded, kind, tmp_path):
    pytest.importorskip(kind)
    model, tokenizer = loaded
    card = export(model, tokenizer, tmp_path / "index", kind, recall=0.9)
    assert card["recall"] >= 0.9
    index = load_index(tmp_path / "index", tokenizer)
    histories = some_histories()
    found = recommend(model, tokenizer, histories, 10, index=index)
    exact = recommend(model, tokenizer, histories, 10)
    assert share_of_lists(found, exact) >= 0.8
    for listed, scores, best, best_scores in zip(
        found.items, found.scores, exact.items, exact.scores, strict=True
    ):
        assert scores == sorted(scores, reverse=True)
        known = dict(zip(best, best_scores, strict=True))
        mine = dict(zip(listed, scores, strict=True))
        for item in known.keys() & mine.keys():  # scores are the model's, whatever the index holds
            assert mine[item] == pytest.approx(known[item], abs=1e-4)

    index.effort = index.library.max_effort
    found = recommend(model, tokenizer, histories, 10, index=index)
    assert share_of_lists(found, exact) >= (1.0 if kind == "faiss" else 0.98)


@pytest.mark.parametrize("kind", KINDS)
def test_filters_are_kept_and_lists_are_full_however_little_an_index_finds(sasrec, kind):
    pytest.importorskip(kind)
    model, tokenizer = sasrec
    index = ItemIndex.build(recsys.item_vectors(model, tokenizer).vectors, kind, effort=1)
    histories = [*some_histories(), ITEMS[:1195], ITEMS[5:600]]
    denied = {*ITEMS[::7]}
    options = {"exclude": denied, "batch_size": 8}
    found = recommend(model, tokenizer, histories, 40, index=index, **options)
    exact = recommend(model, tokenizer, histories, 40, **options)
    for listed, history, best in zip(found.items, histories, exact.items, strict=True):
        assert not {*listed} & (denied | {*history})
        assert len({*listed}) == len(listed) == len(best)
    assert found.items != exact.items or kind == "usearch"  # one cell of faiss holds not all
    allowed = ITEMS[100:120]
    found = recommend(model, tokenizer, histories, 5, index=index, candidates=allowed)
    assert found.items == recommend(model, tokenizer, histories, 5, candidates=allowed).items


def test_users_for_whom_too_few_are_found_get_exact_lists(sasrec):
    """One user has seen what the index finds, and for another it finds nothing."""
    model, tokenizer = sasrec

    class Nothing:
        max_effort = 1

        def search(self, query, n, effort):
            found = np.full((len(query), n), -1)  # longest history first
            found[:2, :20] = np.arange(20)
            return found

    index = ItemIndex(Nothing(), NUM_ITEMS, 16, 1)
    histories = [ITEMS[30:33], ITEMS[:20], ITEMS[40:47]]
    found = recommend(model, tokenizer, histories, 10, index=index)
    exact = recommend(model, tokenizer, histories, 10)
    assert found.items[:2] == exact.items[:2]
    assert {*found.items[2]} <= {*ITEMS[:20]}


def test_what_cannot_be_used_is_said(sasrec, tmp_path):
    pytest.importorskip("faiss")
    model, tokenizer = sasrec
    with pytest.raises(ValueError, match="no format 'csv'; choose of safetensors"):
        export(model, tokenizer, tmp_path / "a", "csv")
    with pytest.raises(ValueError, match=r"recall is 1\.5"):
        export(model, tokenizer, tmp_path / "a", "faiss", recall=1.5)
    with pytest.raises(ValueError, match="histories are all empty"):
        export(model, tokenizer, tmp_path / "a", "faiss", histories=[[]])
    assert list(tmp_path.iterdir()) == []
    export(model, tokenizer, tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists already"):
        export(model, tokenizer, tmp_path / "a")
    with pytest.raises(ValueError, match="and no index"):
        load_index(tmp_path / "a", tokenizer)
    export(model, tokenizer, tmp_path / "b", "faiss")
    with pytest.raises(ValueError, match="which are not the tokenizer's 1200"):
        load_index(tmp_path / "b", build_item_tokenizer(ITEMS[::-1]))
    index = load_index(tmp_path / "b", tokenizer)
    other, _ = make("bias")
    with pytest.raises(ValueError, match=r"holds 1200 items of 16 numbers.* of 17"):
        recommend(other, tokenizer, [ITEMS[:2]], index=index)
    with torch.no_grad():
        broken, _ = make("sasrec")
        broken.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        recsys.item_vectors(broken, tokenizer)


def test_share_found_counts_what_is_there():
    found, exact = np.array([[1, 2, 3], [7, -1, -1]]), np.array([[3, 1], [8, 7]])
    assert share_found(found, exact) == 0.75
