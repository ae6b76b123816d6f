"""Reading documents, and packing them without losing or adding a token."""

import gzip
import json
import shutil

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from support.training import END_OF_TEXT, lm_fields
from transformers import AutoTokenizer

from sce_lm.training.language_model import LanguageModelTask
from sce_lm.training.text_blocks import PackedText, hold_out, read, read_documents, tokenise
from sce_lm.training.train_config import TrainConfig


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


LINES = b'{"text": "a"}\n{"text": "b"}\n'

FOLDERS = {
    "markers and hidden files": (
        {
            "T.JSONL": LINES,
            "_SUCCESS": b"",
            ".DS_Store": b"x",
            ".part.crc": b"x",
            "_tmp/a.csv": b"x",
        },
        ["a", "b"],
    ),
    "parts, some of them empty": (
        {"part-10.jsonl": LINES, "part-9.jsonl": b'{"text": "9"}\n', "part-0.jsonl": b""},
        ["9", "a", "b"],
    ),
    "folders in folders": ({"z.txt": b"z", "b/y.TXT": b"y", ".git/x.txt": b"x"}, ["z", "y"]),
    "a description": ({"README.md": b"# What this is", "readme_texts.txt": b"text"}, ["text"]),
    "compressed files": ({"a.jsonl": LINES, "b.jsonl.gz": gzip.compress(LINES)}, [*"abab"]),
    "files of Windows": ({"a.txt": b"\xef\xbb\xbfone\r\n\r\ntwo"}, ["one", "two"]),
    "words for nothing": (
        {"a.csv": b'text\r\nNA\r\nnull\r\n""\r\nb\r\n'},
        ["NA", "null", None, "b"],
    ),
    "an array": ({"a.json": b'[{"text": "a"},\n {"text": null}]'}, ["a", None]),
}


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_is_read_but_for_what_is_no_data(tmp_path, kind):
    files, texts = FOLDERS[kind]
    write_files(tmp_path / "data", files)
    found = read(str(tmp_path / "data"), "train", "text", str(tmp_path / "cache"))
    assert found["text"][:] == texts


@pytest.mark.parametrize(
    "name", ["a[1].txt", "a*.txt", "[!b]?.txt", "x[1]/{a,b}.txt", "a b#%20.txt"]
)
def test_a_path_is_no_pattern(tmp_path, monkeypatch, name):
    others = {"a1.txt": b"other", "ab.txt": b"other", "c1.txt": b"other", "x1/{a,b}.txt": b"other"}
    write_files(tmp_path, {**others, name: b"this one"})
    monkeypatch.chdir(tmp_path)
    for path in (name, str(tmp_path / name)):
        assert read(path, "train", "text", str(tmp_path / "cache"))["text"][:] == ["this one"]
    with pytest.raises(ValueError, match=r"There is no data file \?\.txt"):
        read("?.txt", "train", "text", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="There is no data file /no/such/folder"):
        read("/no/such/folder", "train", "text", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.txt": b"good", "b.txt": b"one\nbad \xff"},
            r"Line 2 of .*b\.txt cannot be read \('utf-8'",
        ),
        ({"a.txt": "UTF-16".encode("utf-16")}, r"Line 1 of .*a\.txt cannot be read \('utf-8'"),
        (
            {"a.jsonl": LINES, "b.jsonl": LINES + b'{"text": "c'},
            r"Line 3 of .*b\.jsonl cannot be read",
        ),
        ({"a.jsonl.gz": gzip.compress(LINES * 99)[:30]}, r"a\.jsonl\.gz cannot be read"),
        ({"a.parquet": b"PAR1"}, r"a\.parquet cannot be read"),
        (
            {"a.jsonl": b'{"text": "a"}\n{"text": 3}\n'},
            "holds values of several types, or with parts; expected text",
        ),
        ({"a.jsonl": b'{"text": null}\n'}, "holds null values; expected text"),
        ({"a.json": b'{"text": {"0": "a", "1": "b"}}'}, "expected text"),
        ({"a.jsonl": b"", "_SUCCESS": b"", ".hidden": b"x"}, "is empty"),
        ({"a.jsonl": LINES, "b.txt": b"b"}, r"holds files of \.jsonl, \.txt"),
        ({"a.jsonl": LINES, "notes.docx": b"x"}, r"holds files of \.docx, \.jsonl"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(tmp_path, files, message):
    write_files(tmp_path / "data", files)
    with pytest.raises(ValueError, match=message) as caught:
        read(str(tmp_path / "data"), "train", "text", str(tmp_path / "cache"))
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
