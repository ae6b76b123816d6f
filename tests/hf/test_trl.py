"""TRL's SFTTrainer with a patched model, beside the stock one."""

import warnings

import pytest
import torch
from support.models import tiny_model
from support.training import QUIET, documentation, write_text
from transformers import AutoTokenizer

from sce_lm import SCEConfig, objectives
from sce_lm.hf import SCECallback, apply_sce, objective_of

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

from sce_lm.hf.trl import SCESFTTrainer

CONFIG = SCEConfig(num_buckets=4, bucket_candidates=16, shared_frequent=32, tail_candidates=64)
METRICS = ("loss", "entropy", "mean_token_accuracy", "num_tokens")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tokenizer = AutoTokenizer.from_pretrained(write_text(folder)[1])
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def texts():
    lines = [line for text in documentation() for line in text.splitlines() if len(line) > 40]
    return datasets.Dataset.from_list([{"text": line} for line in lines[:160]])


def completions():
    rows = [{"prompt": f"add {i} to x:", "completion": f" return x + {i}"} for i in range(64)]
    return datasets.Dataset.from_list(rows)


def model(name="llama"):
    return tiny_model(name, vocab_size=600)


def train(trainer_class, model, tokenizer, folder, data=None, peft_config=None, **options):
    defaults = {
        **QUIET,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_length": 48,
        "learning_rate": 5e-3,
        "bf16": False,
    }
    data = texts() if data is None else data
    trainer = trainer_class(
        model=model,
        args=trl.SFTConfig(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[SCECallback()] if trainer_class is SCESFTTrainer else [],
    )
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def test_twenty_steps(tokenizer, tmp_path):
    patched = apply_sce(model(), CONFIG)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(objective|without labels).*")
        trainer, logs = train(SCESFTTrainer, patched, tokenizer, tmp_path, max_steps=20)
    assert objective_of(patched).state.step == 20
    assert all(name in entry for entry in logs for name in METRICS)
    assert all(entry["sce/coverage"] == 1.0 for entry in logs)
    losses = [entry["loss"] for entry in logs]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert logs[-1]["mean_token_accuracy"] > logs[0]["mean_token_accuracy"]
    figures = trainer.evaluate()
    assert figures["eval_loss"] < losses[0]
    assert 0 < figures["eval_mean_token_accuracy"] < 1


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (texts, {}),
        (texts, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        (texts, {"packing": True, "packing_strategy": "wrapped"}),
        (completions, {"completion_only_loss": True}),
        (completions, {"peft_config": LoraConfig(r=4, target_modules="all-linear")}),
    ],
    ids=["text", "accumulation", "packing", "completion_only", "lora"],
)
def test_exact_objective_equals_stock(data, options, tokenizer, tmp_path):
    patched = apply_sce(model(), objectives.get("exact"))
    torch.manual_seed(0)
    _, want = train(trl.SFTTrainer, model(), tokenizer, tmp_path, data(), **options)
    torch.manual_seed(0)
    _, got = train(SCESFTTrainer, patched, tokenizer, tmp_path, data(), **options)
    assert len(got) == len(want) == 4
    # Fewer positions than are probed, so that the metrics are those of all of them.
    for name in (*METRICS, "grad_norm"):
        assert [e[name] for e in got] == pytest.approx([e[name] for e in want], rel=1e-4), name


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (PromptTuningConfig, {"packing": True, "packing_strategy": "wrapped"}),
        (PromptEncoderConfig, {}),
        (PrefixTuningConfig, {"gradient_checkpointing": False}),  # TRL fails with it
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_virtual_tokens_equal_stock(kind, options, tokenizer, tmp_path):
    """Prompt tuning and P-tuning put them before the batch's own. The last one predicts the first
    label of the batch, which counts in the metrics."""
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    options = {"peft_config": config, "max_steps": 2, **options}
    logs = []
    for trainer_class, patch in (
        (trl.SFTTrainer, lambda m: m),
        (SCESFTTrainer, lambda m: apply_sce(m, objectives.get("exact"))),
    ):
        patched = patch(model())
        torch.manual_seed(0)
        logs.append(train(trainer_class, patched, tokenizer, tmp_path, **options)[1])
    want, got = logs
    assert want[0]["entropy"] > 0  # a model without training may be right about no token
    for name in (*METRICS, "grad_norm"):
        assert [e[name] for e in got] == pytest.approx([e[name] for e in want], rel=1e-4), name


def test_scaled_and_capped_logits_are_probed_as_they_are(tokenizer, tmp_path):
    for name in ("gemma2", "granite"):
        patched = apply_sce(model(name), objectives.get("exact"))
        _, want = train(trl.SFTTrainer, model(name), tokenizer, tmp_path, max_steps=1)
        _, got = train(SCESFTTrainer, patched, tokenizer, tmp_path, max_steps=1)
        for metric in METRICS:
            assert got[0][metric] == pytest.approx(want[0][metric], rel=1e-4)


def test_trls_own_trainer_warns_that_the_objective_is_not_used(tokenizer, tmp_path):
    patched = apply_sce(model(), CONFIG)
    with pytest.warns(UserWarning, match="without the objective 'sce'"):
        train(trl.SFTTrainer, patched, tokenizer, tmp_path, max_steps=1)
    assert objective_of(patched).state.is_new


def test_refusals(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="call apply_sce"):
        train(SCESFTTrainer, model(), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="dft"):
        train(SCESFTTrainer, apply_sce(model(), CONFIG), tokenizer, tmp_path, loss_type="dft")
