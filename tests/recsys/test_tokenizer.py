import pytest

pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)

import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from sce_lm.recsys import (
    SASRecConfig,
    SASRecForCausalLM,
    append_items,
    build_item_tokenizer,
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
