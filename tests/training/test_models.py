"""A model from scratch or loaded, and refusals in one sentence."""

import pytest
from support.training import NO_DROPOUT, lm_fields
from transformers import AutoTokenizer

from sce_lm.training.models import build_model, load_tokenizer
from sce_lm.training.train_config import TrainConfig


def build(corpus, **changes):
    fields = lm_fields(corpus, **changes)
    tokenizer = AutoTokenizer.from_pretrained(fields["tokenizer"])
    return build_model(TrainConfig(**fields), tokenizer), tokenizer


def test_a_model_from_scratch_takes_its_vocabulary_from_the_tokenizer(corpus):
    model, tokenizer = build(corpus, dtype="bfloat16")
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert str(model.dtype) == "torch.bfloat16"


def test_a_model_is_loaded_from_a_folder(corpus, tmp_path):
    model, _ = build(corpus)
    model.save_pretrained(tmp_path)
    loaded, _ = build(corpus, model=str(tmp_path), model_config={})
    assert loaded.config.n_embd == 32
    assert all(map(lambda a, b: a.equal(b), model.parameters(), loaded.parameters()))


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, **NO_DROPOUT}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config": {"model_type": "gtp2"}}, "'gtp2'.*did you mean 'gpt2'"),
        ({"model_config": {**GPT2, "n_embed": 3}}, "'n_embed'.*did you mean 'n_embd'"),
        ({"model_config": {**GPT2, "vocab_size": 9}}, "9 token embeddings.*600 tokens"),
        ({"model_config": {**GPT2, "n_positions": 8}}, "sequence_length is 32.* 8 positions"),
        ({"model_config": {}, "model": "/no/such/folder"}, "model '/no/such/folder' cannot be"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(corpus, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(corpus, **changes)
    assert "\n" not in str(caught.value)


def test_an_unreadable_folder_is_refused(corpus, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"')
    with pytest.raises(ValueError, match="cannot be loaded"):
        build(corpus, model=str(tmp_path), model_config={})
    with pytest.raises(ValueError, match=r"The tokenizer .* cannot be loaded"):
        load_tokenizer(str(tmp_path))
