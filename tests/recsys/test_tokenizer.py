import pytest
import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from sce_lm.recsys import build_item_tokenizer, item_tokens

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
    ],
)
def test_ids_that_cannot_be_tokens_are_refused(items, message):
    with pytest.raises(ValueError, match=message):
        build_item_tokenizer(items)
