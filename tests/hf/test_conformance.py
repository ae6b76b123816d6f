"""`apply_sce` with the exact objective equals the stock model, for every type of transformers.

The table of all types: ``python tests/programs/conformance.py --json conformance.json``.
"""

from collections import Counter

import pytest
from programs.conformance import Outcome, check, types
from support.versions import TRANSFORMERS_5

from sce_lm.objectives.exact import Exact

FEW = (
    "bart",  # calls cross_entropy itself
    "bert",  # the head is a part of a part
    "cohere2",  # scales its logits
    "deepseek_v3",
    "falcon_h1",
    "gemma3n_text",  # soft cap, tied
    "git",  # drops the positions of its image
    "gpt2",
    "mamba2",
    "qwen3_moe",
)
OTHER_HEADS = {
    "seq2seq": ("marian", "t5", "qwen2_audio"),  # a bias added to the logits, ..., a mask of them
    "masked": ("bert", "modernbert", "distilbert"),
    "vision": ("gemma3", "idefics3", "llava"),
}


@pytest.mark.parametrize("model_type", FEW)
def test_causal(model_type):
    result = check(model_type)
    assert result.outcome is Outcome.EQUAL, result


@pytest.mark.parametrize(
    ("head", "model_type"), [(head, name) for head, names in OTHER_HEADS.items() for name in names]
)
def test_other_heads(head, model_type):
    result = check(model_type, head)
    assert result.outcome is Outcome.EQUAL, result


def test_what_cannot_stream_its_loss_is_equal_after_materialising():
    result = check("prophetnet")
    assert result.outcome is Outcome.MATERIALISED
    counts = "num_items_in_batch, shift_labels, " if TRANSFORMERS_5 else ""
    assert result.reason == f"labels, {counts}evaluation"


def test_head_that_is_no_linear_layer_is_refused():
    result = check("fsmt", "seq2seq")
    assert result.outcome is Outcome.REFUSED
    assert "Embedding" in result.reason


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 builds a small blt")
def test_what_cannot_be_built_has_a_reason():
    result = check("blt")
    assert result.outcome is Outcome.UNBUILDABLE
    assert "num_hidden_layers" in result.reason


@pytest.mark.parametrize("name", ["labels", "bias"])
def test_an_error_in_the_loss_is_found(name, monkeypatch):
    """One label of 48, or a bias left out: small things that a loose comparison would pass."""
    real = Exact.__call__

    def wrong(self, hidden_states, weight, labels, **options):
        if name == "bias":
            options["bias"] = None
        else:
            labels = labels.clone()
            labels[-1, 2] = (labels[-1, 2] + 1) % len(weight)
        return real(self, hidden_states, weight, labels, **options)

    monkeypatch.setattr(Exact, "__call__", wrong)
    assert check("phi").outcome is Outcome.WRONG


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "equal"), [("causal", 175), ("seq2seq", 30), ("masked", 45), ("vision", 55)]
)
def test_all(head, equal):
    results = [check(model_type, head) for model_type in types(head)]
    counts = Counter(result.outcome for result in results)
    assert not [result for result in results if result.outcome is Outcome.WRONG]
    assert counts[Outcome.EQUAL] >= equal, counts
