"""The Trainer of transformers with a patched model, beside the same Trainer with a stock one."""

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from support.models import NAMES, VOCAB_SIZE, tiny_batch, tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from sce_lm import SCEConfig, objectives
from sce_lm.hf import SCECallback, apply_sce, objective_of

CONFIG = SCEConfig(num_buckets=4, bucket_candidates=8, shared_frequent=8, tail_candidates=16)


def examples(count=16, seed=0):
    """Sequences with different numbers of labels, so that num_items_in_batch matters."""
    batch = tiny_batch(seed, batch=count, length=12)
    for row in range(count):
        batch["labels"][row, : row % 7] = -100
    return [{name: values[row] for name, values in batch.items()} for row in range(count)]


class Losses(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def trainer(model, folder, callbacks=(), **options):
    defaults = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": False,
    }
    compute_metrics = options.pop("compute_metrics", None)
    more = {n: options.pop(n) for n in ("preprocess_logits_for_metrics",) if n in options}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=examples(),
        eval_dataset=examples(8, seed=1),
        callbacks=list(callbacks),
        compute_metrics=compute_metrics,
        **more,
    )


def train_both(name, tmp_path, **options):
    """Logged losses and models after the same training, stock first."""
    results = []
    for patch in (lambda m: m, lambda m: apply_sce(m, objectives.get("exact"))):
        model, losses = patch(tiny_model(name)), Losses()
        trainer(model, tmp_path, [losses], **options).train()
        results.append((losses.losses, model))
    return results


def assert_same_training(results, tolerance=1e-5):
    (want, stock), (got, patched) = results
    assert len(want) == 3
    assert got == pytest.approx(want, rel=tolerance)
    for (name, p), q in zip(patched.named_parameters(), stock.named_parameters()):
        torch.testing.assert_close(p, q[1], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_trainer_equals_stock_step_by_step(name, tmp_path):
    assert_same_training(train_both(name, tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"average_tokens_across_devices": False},
        {"label_smoothing_factor": 0.1},
        {"optim": "adamw_torch", "learning_rate": 1e-3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_trainer_options_equal_stock(options, tmp_path):
    tolerance = 2e-2 if "bf16" in options else 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert_same_training(train_both("gemma3", tmp_path, **options), tolerance)


def accuracy(prediction):
    logits, labels = prediction.predictions, prediction.label_ids
    assert logits.shape == (8, 12, VOCAB_SIZE)
    kept = labels[:, 1:] != -100
    return {"accuracy": float((logits[:, :-1].argmax(-1) == labels[:, 1:])[kept].mean())}


def top_ids(logits, labels):
    return logits.argmax(-1)


def accuracy_of_ids(prediction):
    ids, labels = prediction.predictions, prediction.label_ids
    assert ids.shape == (8, 12)
    kept = labels[:, 1:] != -100
    return {"accuracy": float((ids[:, :-1] == labels[:, 1:])[kept].mean())}


@pytest.mark.parametrize("name", ["gemma2", "phi"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compute_metrics": accuracy},
        {"compute_metrics": accuracy_of_ids, "preprocess_logits_for_metrics": top_ids},
    ],
    ids=["loss_only", "logits", "preprocessed"],
)
def test_evaluation_equals_stock(name, bf16, options, tmp_path):
    stock, patched = tiny_model(name), apply_sce(tiny_model(name), CONFIG)
    want, got = (trainer(m, tmp_path, bf16=bf16, **options).evaluate() for m in (stock, patched))
    assert got["eval_loss"] == pytest.approx(want["eval_loss"], rel=2e-2 if bf16 else 1e-5)
    assert got.get("eval_accuracy") == want.get("eval_accuracy")


def test_saved_model_loads_without_this_package(tmp_path):
    model = apply_sce(tiny_model("gemma3"), CONFIG)
    run = trainer(model, tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "saved"))
    batch = tiny_batch()
    torch.save(batch, tmp_path / "batch.pt")
    program = (
        "import sys; sys.modules['sce_lm'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'saved')!r}).eval()\n"
        f"print(repr(float(m(**torch.load({str(tmp_path / 'batch.pt')!r})).loss)))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    with torch.no_grad():
        assert float(out) == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)


# --------------------------------------------------------------------------------- SCECallback


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}


def test_callback_restores_the_state_of_a_resumed_run(tmp_path):
    whole = apply_sce(tiny_model("llama"), CONFIG)
    trainer(whole, tmp_path, [SCECallback()], **SAVING).train()
    assert (tmp_path / "checkpoint-2" / "sce_state_rank0.safetensors").is_file()
    shutil.rmtree(tmp_path / "checkpoint-4")

    resumed = apply_sce(tiny_model("llama", seed=9), CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = trainer(resumed, tmp_path, [SCECallback()], **SAVING)
        run.train(resume_from_checkpoint=True)
    assert objective_of(resumed).state.step == objective_of(whole).state.step == 8
    assert torch.equal(objective_of(resumed).state.counts, objective_of(whole).state.counts)
    for p, q in zip(resumed.parameters(), whole.parameters()):
        assert torch.equal(p, q)


def test_callback_finds_a_checkpoint_elsewhere(tmp_path):
    model = apply_sce(tiny_model("llama"), CONFIG)
    trainer(model, tmp_path / "a", [SCECallback()], **SAVING).train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    resumed = apply_sce(tiny_model("llama"), CONFIG)
    callback = SCECallback(resume_from=checkpoint)
    run = trainer(resumed, tmp_path / "b", [callback], **SAVING)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert objective_of(resumed).state.step == 8


def test_resuming_without_a_saved_state_warns(tmp_path):
    trainer(apply_sce(tiny_model("llama"), CONFIG), tmp_path, **SAVING).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    for callbacks, message in (([], "SCECallback"), ([SCECallback()], "sce_state_rank0")):
        model = apply_sce(tiny_model("llama"), CONFIG)
        run = trainer(model, tmp_path, callbacks, **{**SAVING, "save_strategy": "no"})
        with pytest.warns(UserWarning, match=message):
            run.train(resume_from_checkpoint=True)
        assert objective_of(model).state.step == 4


def test_callback_with_rotation_and_logs(tmp_path):
    model = apply_sce(tiny_model("llama"), CONFIG)
    run = trainer(model, tmp_path, [SCECallback()], **{**SAVING, "save_total_limit": 1})
    run.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "sce_state_rank0.safetensors").is_file()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(entry["sce/coverage"] == 1.0 for entry in logged)
    assert all(entry["sce/products_per_position"] > 0 for entry in logged)


def test_callback_is_idle_without_a_state(tmp_path):
    for model in (tiny_model("llama"), apply_sce(tiny_model("llama"), objectives.get("exact"))):
        run = trainer(model, tmp_path, [SCECallback()], **SAVING)
        run.train()
        assert not list(tmp_path.glob("*/sce_state*"))
