"""TRL's preference and reinforcement-learning trainers with a patched model, beside a stock one.

TRL's trainers take log-probabilities from a head of their own (since TRL 1.16) or read logits.
Either way a patched model must give the stock model's figures and form no logits.
"""

from typing import Any

import pytest
import torch
from support.allocations import RowsOfLogits
from support.models import tiny_model
from support.training import QUIET, write_text
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoTokenizer, TrainerCallback

from sce_lm import apply_sce, objectives
from sce_lm.distillation import HeadScores, distillation_loss
from sce_lm.hf import asked_logits
from sce_lm.ops import logit_stream

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from peft import LoraConfig

VOCAB_SIZE = 600
BATCH = 4
TIMES = ("runtime", "per_second", "time", "flos")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tokenizer = AutoTokenizer.from_pretrained(write_text(folder)[1], padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Of ours and of TRL's own head, so that no tile has a column for every class."""
    monkeypatch.setattr(asked_logits, "FORMED_ELEMENTS", 0)
    monkeypatch.setattr(logit_stream, "TILE_CLASSES", 100)
    utils = trl.trainer.utils
    if hasattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE"):
        monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 100)


def model(patched, seed=0):
    made = tiny_model("llama", seed, vocab_size=VOCAB_SIZE)
    return apply_sce(made, objectives.get("exact"), lazy_logits="always") if patched else made


def numbers(count=16):
    return [
        (f"add {i} to x:", f" return x + {i}", f" return the sum {i} x x") for i in range(count)
    ]


def pairs():
    rows = [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in numbers()]
    return datasets.Dataset.from_list(rows)


def labelled():
    rows = [
        {"prompt": p, "completion": bad if i % 2 else good, "label": i % 2 == 0}
        for i, (p, good, bad) in enumerate(numbers())
    ]
    return datasets.Dataset.from_list(rows)


def prompts():
    return datasets.Dataset.from_list([{"prompt": p} for p, _, _ in numbers()])


def letters(completions, **_):
    """A reward."""
    return [float(sum(c.isalpha() for c in text)) for text in completions]


SAMPLED = {"num_generations": 2, "max_completion_length": 12}
# Trainer, data, arguments of its config, and what says what the reference is: a model, an adapter
# that is switched off, or nothing.
CASES = {
    "dpo": ("DPO", pairs, {}, "model"),
    "dpo_weighted": ("DPO", pairs, {"use_weighting": True}, "model"),
    "dpo_lora": ("DPO", pairs, {"ld_alpha": 0.5}, "adapter"),
    "kto": ("KTO", labelled, {}, "model"),
    "grpo": ("GRPO", prompts, {**SAMPLED, "num_iterations": 2, "top_entropy_quantile": 0.5}, None),
    "grpo_lora": ("GRPO", prompts, {**SAMPLED, "beta": 0.1, "temperature": 0.7}, "adapter"),
    "rloo": ("RLOO", prompts, {**SAMPLED, "beta": 0.0, "temperature": 0.7}, None),
    "rloo_lora": ("RLOO", prompts, {**SAMPLED, "beta": 0.1}, "adapter"),
}


class Logs(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        self.logs.append({k: v for k, v in logs.items() if not any(t in k for t in TIMES)})


def build(case, patched, tokenizer, folder, **arguments):
    """A trainer, and the list that it logs to."""
    name, data, options, reference = CASES[case]
    defaults = {
        **QUIET,
        "max_steps": 3,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "bf16": False,
    }
    logs = Logs()
    policy: Any = model(patched)
    if data is prompts:
        arguments["reward_funcs"] = letters
    if reference == "model":
        arguments["ref_model"] = model(patched, seed=1)
    elif reference == "adapter":
        arguments["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(0)
    trainer = getattr(trl, f"{name}Trainer")(
        model=policy,
        args=getattr(trl, f"{name}Config")(str(folder), **{**defaults, **options}),
        train_dataset=data(),
        eval_dataset=data().select(range(BATCH)),
        processing_class=tokenizer,
        callbacks=[logs],
        **arguments,
    )
    generate = policy.generate

    def uncounted(*args, **kwargs):
        with _disable_current_modes():
            return generate(*args, **kwargs)

    policy.generate = uncounted
    return trainer, logs.logs


@pytest.mark.parametrize("case", CASES)
def test_trainer_equals_stock_and_forms_no_logits(case, tokenizer, tmp_path):
    stock, want = build(case, False, tokenizer, tmp_path)
    patched, got = build(case, True, tokenizer, tmp_path)
    for trainer in (stock, patched):
        torch.manual_seed(0)
        with RowsOfLogits(VOCAB_SIZE) as rows:
            trainer.train()
            trainer.evaluate()
    assert rows.most <= 1
    assert [set(entry) for entry in got] == [set(entry) for entry in want]
    assert sum("loss" in entry for entry in got) == 3
    assert any("eval_loss" in entry for entry in got)
    for a, b in zip(got, want):
        for metric in b:
            assert a[metric] == pytest.approx(b[metric], rel=1e-5, abs=1e-5), metric
    for p, q in zip(patched.model.parameters(), stock.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["dpo", "kto"])
@pytest.mark.filterwarnings("ignore:.*are deprecated:FutureWarning")
def test_metrics_of_the_users_own_form_no_logits(case, tokenizer, tmp_path):
    """For them TRL runs the model once more and takes its logits."""
    results = []
    for patched in (False, True):
        trainer, _ = build(
            case,
            patched,
            tokenizer,
            tmp_path,
            compute_metrics=lambda p: {"ids": p.predictions.mean()},
        )
        trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
        with RowsOfLogits(VOCAB_SIZE) as rows:
            results.append(trainer.evaluate())
        assert (rows.most <= 1) == patched
    want, got = results
    assert got["eval_ids"] == pytest.approx(want["eval_ids"])
    assert got["eval_loss"] == pytest.approx(want["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore:.*trl.experimental")
def test_gkd_equals_stock_and_the_streamed_divergence(beta, tokenizer, tmp_path):
    """Its divergence is no answer of lazy logits, so it forms those of both models; its loss is
    that of `distillation_loss`, which forms none."""
    gkd = pytest.importorskip("trl.experimental.gkd")
    rows = tokenizer([a + b for a, b, _ in numbers()], padding=True, return_tensors="pt")
    batch = [{name: rows[name][i] for name in rows} for i in range(len(rows["input_ids"]))]
    for row in batch:
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
    losses, models = [], []
    for patched in (False, True):
        student, teacher, logs = model(patched), model(patched, seed=1), Logs()
        options = {"max_steps": 3, "per_device_train_batch_size": BATCH, "learning_rate": 1e-2}
        options |= {"optim": "sgd", "bf16": False, "lmbda": 0.0, "beta": beta, "max_length": 64}
        trainer = gkd.GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=gkd.GKDConfig(str(tmp_path), **{**QUIET, **options}),
            train_dataset=datasets.Dataset.from_list(batch),
            data_collator=lambda rows: {
                name: torch.tensor([row[name] for row in rows]) for name in rows[0]
            },
            processing_class=tokenizer,
            callbacks=[logs],
        )
        inputs = next(iter(trainer.get_train_dataloader()))
        if patched:
            with torch.no_grad():
                ours, theirs = (
                    HeadScores.of(each.eval()(**{**inputs, "labels": None}).logits[:, :-1])
                    for each in (student, teacher)
                )
                kind = {"divergence": "jsd", "beta": beta}
                expected = distillation_loss(ours, theirs, inputs["labels"][:, 1:], **kind)
                torch.testing.assert_close(trainer.compute_loss(student, inputs), expected)
        torch.manual_seed(0)
        trainer.train()
        losses.append([entry["loss"] for entry in logs.logs if "loss" in entry])
        models.append(student)
    want, got = losses
    assert len(want) == 3
    assert got == pytest.approx(want, rel=1e-5)
    for p, q in zip(*(each.parameters() for each in models)):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
