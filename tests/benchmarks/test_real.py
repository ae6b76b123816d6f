"""Whose text a model of the benchmarks reads, and what is said where there is none."""

import pytest
from support.models import tiny_model
from support.training import documentation, write_text
from transformers import AutoTokenizer

from sce_lm import recsys
from sce_lm.benchmarks.real import real_problem
from sce_lm.training.train_config import TrainConfig


@pytest.fixture
def model(tmp_path):
    write_text(tmp_path)
    tiny_model("llama", vocab_size=600).save_pretrained(tmp_path / "model folder")
    AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "model folder")
    return tmp_path / "model folder"


def problem(model, text=None):
    folder = model.parent / "problem"
    folder.mkdir(exist_ok=True)
    return real_problem(folder, model, 40, "float32", text=text)


def test_a_model_that_is_no_run_takes_the_embedded_text(model, monkeypatch):
    """Its builder is asked for the default cache; nothing is asked of a training configuration."""
    asked = []

    def found(cache):
        asked.append(cache)
        raise ValueError("as far as the embedded text")

    monkeypatch.setattr("sce_lm.benchmarks.real.embedded_text", found)
    with pytest.raises(ValueError, match="as far as the embedded text"):
        problem(model)
    assert str(asked[0]).endswith(TrainConfig.cache_dir.removeprefix("~"))


def test_what_cannot_be_read_is_named(model, tmp_path):
    text = tmp_path / "plain.txt"
    text.write_text(documentation()[0])
    assert problem(model, text).positions == 40
    text.write_bytes(b"caf\xe9 " * 99)
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        problem(model, text)
    text.write_text("short")
    with pytest.raises(ValueError, match="give more text by --text, or fewer --tokens"):
        problem(model, text)
    recsys.build_item_tokenizer(["i1", "i2"]).save_pretrained(model)
    text.write_text(documentation()[0])
    with pytest.raises(ValueError, match="knows no word of the text, such as a recommender's"):
        problem(model, text)
    for path in model.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"The tokenizer .*model folder' cannot be loaded"):
        problem(model, text)
