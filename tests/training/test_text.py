"""Reading documents, and packing them without losing or adding a token."""

import json
import shutil

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from support.training import END_OF_TEXT, lm_fields
from transformers import AutoTokenizer

from sce_lm.training.config import TrainConfig
from sce_lm.training.language_model import LanguageModelTask
from sce_lm.training.text import PackedText, hold_out, read_documents, tokenise


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    length=st.integers(1, 7),
    chunk=st.integers(1, 4),
)
def test_blocks_are_the_stream_cut_at_equal_places(lengths, length, chunk):
    rows, start = [], 0
    for size in lengths:
        rows.append(list(range(start, start + size)))
        start += size
    parts = [
        Dataset.from_dict({"input_ids": rows[i : i + chunk]}) for i in range(0, len(rows), chunk)
    ]
    if not start:
        return
    packed = PackedText(concatenate_datasets(parts), length)
    assert len(packed) == start // length
    if len(packed):
        stream = np.concatenate([packed[i] for i in range(len(packed))])
        assert stream.tolist() == list(range(len(packed) * length))
    with pytest.raises(IndexError):
        packed[len(packed)]


def test_documents_are_joined_by_the_end_of_text_token(corpus):
    config = TrainConfig(**lm_fields(corpus))
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    texts = ["First document.", "  \n ", "Second one."]
    rows = tokenise(Dataset.from_dict({"text": texts}), tokenizer, config)["input_ids"]
    joined = tokenizer.decode([token for row in rows for token in row])
    assert joined == f"First document.{END_OF_TEXT}Second one.{END_OF_TEXT}"


def test_text_is_tokenised_once_wherever_it_and_its_tokenizer_are(tmp_path, corpus):
    texts = ["One.", "Two."]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "a.parquet")
    Dataset.from_dict({"text": ["", *texts]}).to_json(tmp_path / "b.jsonl")
    shutil.copytree(corpus / "tokenizer", tmp_path / "tokenizer")
    for name, tokenizer in (("a.parquet", corpus), ("b.jsonl", tmp_path)):
        fields = lm_fields(corpus, data=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        config = TrainConfig(**fields)
        documents, _ = read_documents(config)
        tokenise(documents, AutoTokenizer.from_pretrained(tokenizer / "tokenizer"), config)
    assert len(list((tmp_path / "cache" / "tokenised").iterdir())) == 1


def test_held_out_documents_are_not_trained_on(corpus):
    config = TrainConfig(**lm_fields(corpus))
    train, held_out = hold_out(read_documents(config)[0], config)
    assert (len(train), len(held_out)) == (7, 1)
    assert not set(train["text"]) & set(held_out["text"])
    named = TrainConfig(**lm_fields(corpus, held_out=config.data))
    train, held_out = read_documents(named)
    assert train["text"][:] == held_out["text"][:]


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "txt"])
def test_local_files_of_each_kind_are_read(tmp_path, corpus, kind):
    texts = ["One\nof two lines.", "Two."]
    data = Dataset.from_dict({"text": texts})
    path = tmp_path / f"documents.{kind}"
    if kind == "csv":
        data.to_csv(path)
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        path.write_text("\n" + "\n\n\n".join(texts) + "\n")
    fields = lm_fields(corpus, data=str(path), held_out=str(path), cache_dir=str(tmp_path))
    train, _ = read_documents(TrainConfig(**fields))
    assert train["text"][:] == texts


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n', {"text_column": "body"}, "has the columns text.*'body'"),
        ("a.jsonl", '{"text": 3}\n', {}, "holds int64 values; expected text"),
        ("a.jsonl", '{"text": ', {}, "cannot be read"),
        ("a.jsonl", "", {}, "is empty"),
        ("a.csv", "text\n", {}, "corresponds to no data"),
        ("a.txt", "One document without a blank line.", {}, "1 document and none can be held out"),
        ("a.pdf", "%PDF", {}, r"holds files of \.pdf"),
        ("a.jsonl", None, {}, "There is no data file"),
    ],
)
def test_data_that_cannot_be_used_are_refused(tmp_path, corpus, name, content, changes, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    config = TrainConfig(
        **lm_fields(corpus, data=str(path), cache_dir=str(tmp_path / "cache"), **changes)
    )
    with pytest.raises(ValueError, match=message) as caught:
        hold_out(read_documents(config)[0], config)
    assert "\n" not in str(caught.value)


def test_less_text_than_a_block_is_refused(corpus):
    config = TrainConfig(**lm_fields(corpus, sequence_length=64))
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    few = Dataset.from_dict({"text": ["Too little."]})
    with pytest.raises(ValueError, match="less than one block of sequence_length 64"):
        LanguageModelTask(few, few, tokenizer, config)


def test_a_tokenizer_without_an_end_of_text_token_is_refused(corpus):
    config = TrainConfig(**lm_fields(corpus))
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, eos_token=None)
    few = Dataset.from_dict({"text": ["Too little."]})
    with pytest.raises(ValueError, match="no end-of-text token"):
        LanguageModelTask(few, few, tokenizer, config)
