import json

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from sce_lm.recsys import (
    SASRecConfig,
    SASRecForCausalLM,
    append_items,
    build_item_tokenizer,
    count_items,
    item_counts,
    item_tokens,
)

ITEMS = ["B001 (red)", 7, " padded ", "Ünï\n", "[x]", "b001 (RED)", "##7", "7.0"]


def test_ids_follow_the_catalogue_after_the_special_tokens():
    tokenizer = build_item_tokenizer(ITEMS)
    names = [str(item) for item in ITEMS]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1)
    assert item_tokens(tokenizer) == range(2, 10)
    assert tokenizer.convert_tokens_to_ids(names) == list(range(2, 10))
    assert tokenizer.convert_ids_to_tokens(range(2, 10)) == names
    assert tokenizer.convert_tokens_to_ids(["never seen"]) == [1]


def test_one_id_is_one_word_whatever_it_contains():
    tokenizer = build_item_tokenizer(ITEMS)
    names = [str(item) for item in ITEMS]
    encoded = tokenizer([names, names[:3]], is_split_into_words=True, padding=True)
    assert encoded["input_ids"] == [list(range(2, 10)), [2, 3, 4, 0, 0, 0, 0, 0]]
    assert encoded["attention_mask"][1] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert set(encoded) == {"input_ids", "attention_mask"}


def test_saves_and_loads_as_any_tokenizer(tmp_path):
    tokenizer = build_item_tokenizer(ITEMS)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.padding_side == "right"
    assert item_tokens(loaded) == item_tokens(tokenizer)
    names = [str(item) for item in ITEMS]
    assert loaded(names, is_split_into_words=True)["input_ids"] == list(range(2, 10))


def test_the_stock_collator_pads_labels_with_minus_100():
    collate = DataCollatorForSeq2Seq(build_item_tokenizer(ITEMS))
    batch = collate([{"input_ids": ids, "labels": ids} for ids in ([2, 3, 4], [5, 6])])
    assert torch.equal(batch["input_ids"], torch.tensor([[2, 3, 4], [5, 6, 0]]))
    assert torch.equal(batch["labels"], torch.tensor([[2, 3, 4], [5, 6, -100]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 1], [1, 1, 0]]))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "the catalogue is empty"),
        (["a", "[PAD]"], r"Item id '\[PAD\]' cannot be a token"),
        (["a", "x [UNK] y"], r"must not contain the special tokens \[PAD\] and \[UNK\]"),
        (["a", ""], "must not be empty"),
        (["1", 1], "2 items but 1 distinct ids"),
        (["1", 1.0], "2 items but 1 distinct ids"),
        (["a", None], "Item id None cannot be a token"),
        (["a", float("nan")], "Item id nan cannot be a token"),
    ],
)
def test_ids_that_cannot_be_tokens_are_refused(items, message):
    with pytest.raises(ValueError, match=message):
        build_item_tokenizer(items)


def test_appended_items_come_after_the_old_ones_and_their_rows_stay(tmp_path):
    tokenizer = build_item_tokenizer(ITEMS)
    torch.manual_seed(0)
    model = SASRecForCausalLM(SASRecConfig(vocab_size=len(tokenizer), hidden_size=8)).eval()
    before = model.lm_head.weight.detach().clone()
    history = torch.tensor([[2, 5, 9]])
    logits = model(input_ids=history).logits

    extended = append_items(tokenizer, ["7", "new", 8, "new", "##7.5"], model)
    names = [str(item) for item in ITEMS]
    assert extended.convert_ids_to_tokens(list(range(2, 13))) == [*names, "new", "8", "##7.5"]
    assert len(tokenizer) == 10  # the old one is as it was
    encoded = extended([["##7.5", "##7", "new"]], is_split_into_words=True)["input_ids"]
    assert encoded == [[12, 8, 10]]
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == 13
    assert model.lm_head.weight is model.model.item_embeddings.weight
    assert torch.equal(model.lm_head.weight[:10], before)
    assert model.lm_head.weight[10:].any(1).all()
    torch.testing.assert_close(model(input_ids=history).logits[..., :10], logits)

    model.save_pretrained(tmp_path)
    extended.save_pretrained(tmp_path)
    loaded = SASRecForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert item_tokens(AutoTokenizer.from_pretrained(tmp_path)) == range(2, 13)


def test_whole_floats_are_whole_numbers_as_in_a_log():
    tokenizer = build_item_tokenizer([7.0, np.float32(8), np.int64(9), 1e16, 7.5])
    names = ["7", "8", "9", "10000000000000000", "7.5"]
    assert tokenizer.convert_ids_to_tokens(list(item_tokens(tokenizer))) == names
    assert len(append_items(tokenizer, [7.0, 9.0])) == len(tokenizer)


def test_counts_are_saved_loaded_and_grow_with_the_tokenizer(tmp_path):
    tokenizer = build_item_tokenizer("abc")
    assert item_counts(tokenizer) is None
    count_items(tokenizer, pl.DataFrame({"items": [[2, 4], [], [4, 4], None]}))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert item_counts(loaded).tolist() == [1, 0, 3]
    assert item_counts(append_items(loaded, ["b", "d", "e"])).tolist() == [1, 0, 3, 0, 0]
    count_items(loaded, pl.DataFrame({"items": [[3]]}))
    assert item_counts(loaded).tolist() == [0, 1, 0]


@pytest.mark.parametrize("counts", ["1 2", "1 2 x", "1 2 -3", "1 2 3.5", [1, 2], {"a": 1}])
def test_counts_of_other_items_are_refused(tmp_path, counts):
    build_item_tokenizer("abc").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "item_counts": counts}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 3 items, and the item_counts saved with it"):
        item_counts(loaded)
