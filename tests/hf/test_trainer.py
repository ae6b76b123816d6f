"""The Trainer of transformers with a patched model, beside the same Trainer with a stock one."""

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.allocations import RowsOfLogits, VocabularySized
from support.models import NAMES, VOCAB_SIZE, tiny_batch, tiny_model
from support.training import QUIET, Losses
from support.versions import TRANSFORMERS_5
from transformers import Trainer, TrainerCallback, TrainingArguments

from sce_lm import SCEConfig, objectives
from sce_lm.hf import (
    SCECallback,
    apply_sce,
    asked_logits,
    load_objective,
    loss_seconds,
    objective_of,
)
from sce_lm.ops import exact_cross_entropy, logit_stream

CONFIG = SCEConfig(num_buckets=4, bucket_candidates=8, shared_frequent=8, tail_candidates=16)


def examples(count=16, seed=0):
    """Sequences with different numbers of labels, so that num_items_in_batch matters."""
    batch = tiny_batch(seed, batch=count, length=12)
    for row in range(count):
        batch["labels"][row, : row % 7] = -100
    return [{name: values[row] for name, values in batch.items()} for row in range(count)]


def trainer(model, folder, callbacks=(), **options):
    defaults = {
        **QUIET,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "logging_nan_inf_filter": False,
    }
    functions = ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func")
    more = {n: options.pop(n) for n in (*functions, "model_init") if n in options}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        train_dataset=examples(),
        eval_dataset=examples(8, seed=1),
        callbacks=list(callbacks),
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
        {"train_sampling_strategy": "group_by_length"}
        if TRANSFORMERS_5
        else {"group_by_length": True},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"max_grad_norm": 0.01},
        {"optim": "adamw_torch", "learning_rate": 1e-3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_trainer_options_equal_stock(options, tmp_path):
    tolerance = 2e-2 if "bf16" in options else 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert_same_training(train_both("gemma3", tmp_path, **options), tolerance)


def test_loss_and_metrics_of_the_users_own_form_no_logits(tmp_path, monkeypatch):
    """``compute_loss_func``, and the best classes for ``compute_metrics``."""
    monkeypatch.setattr(asked_logits, "FORMED_ELEMENTS", 0)
    monkeypatch.setattr(logit_stream, "TILE_CLASSES", 60)

    def accuracy(prediction):
        return {"accuracy": (prediction.predictions == prediction.label_ids).mean()}

    results = []
    for lazy in (False, True):
        model, losses = tiny_model("llama"), Losses()
        if lazy:
            apply_sce(model, objectives.get("exact"), lazy_logits="always")
        run = trainer(
            model,
            tmp_path,
            [losses],
            max_steps=10,
            compute_loss_func=doubled,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        with RowsOfLogits(VOCAB_SIZE) as rows:
            run.train()
            metrics = run.evaluate()
        results.append((losses.losses, metrics["eval_loss"], metrics["eval_accuracy"]))
        assert (rows.most <= 1) == lazy
    (want, *of_stock), (got, *of_ours) = results
    assert len(want) == 10
    assert got == pytest.approx(want, rel=1e-5)
    assert of_ours == pytest.approx(of_stock, rel=1e-5)


def doubled(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].reshape(-1, VOCAB_SIZE)
    sum_of_losses = torch.nn.functional.cross_entropy(
        logits, labels[:, 1:].reshape(-1), reduction="sum"
    )
    return 2.0 * sum_of_losses / num_items_in_batch


@pytest.mark.parametrize(
    "options", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": doubled}]
)
def test_losses_of_the_trainers_own_stay_what_they_are_and_warn(options, tmp_path):
    with pytest.warns(UserWarning, match=r"without labels in its forward.*set label_smoothing in"):
        assert_same_training(train_both("gemma3", tmp_path, **options))


@pytest.mark.parametrize("name", ["llama", "gemma2", "peft"])
def test_label_smoothing_of_the_trainers_own_forms_no_logits(name, tmp_path, monkeypatch):
    """As stock's to the last digits, with LoRA on the head and behind a soft cap too."""
    monkeypatch.setattr(asked_logits, "FORMED_ELEMENTS", 0)
    monkeypatch.setattr(logit_stream, "TILE_CLASSES", 60)
    results = []
    for lazy in (False, True):
        model, callbacks = smoothed_model(name), [Losses()]
        if lazy:
            apply_sce(model, objectives.get("exact"))
            callbacks.append(SCECallback())
        run = trainer(model, tmp_path, callbacks, max_steps=5, label_smoothing_factor=0.1)
        with RowsOfLogits(VOCAB_SIZE) as rows:
            run.train()
        results.append(callbacks[0].losses)
        assert (rows.most <= 1) == lazy
    want, got = results
    assert len(want) == 5
    assert got == pytest.approx(want, rel=1e-5)


def smoothed_model(name):
    if name != "peft":
        return tiny_model(name)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(tiny_model("llama"), config)


def test_label_smoothing_of_the_trainers_own_keeps_a_sampled_objective(tmp_path):
    """Steps of SCE with all classes in its tail are exact ones; with few, they train on its own
    log Z, and count labels."""
    losses = {}
    configs = {
        "all": SCEConfig(tail_candidates=VOCAB_SIZE),
        "few": SCEConfig(num_buckets=0, shared_frequent=2, tail_candidates=4),
        "option": SCEConfig(tail_candidates=VOCAB_SIZE, label_smoothing=0.1),
        "stock": None,
    }
    for name, config in configs.items():
        model, log = tiny_model("llama"), Losses()
        callbacks = [log]
        if config is not None:
            apply_sce(model, config)
            callbacks.append(SCECallback())
        factor = 0.0 if name == "option" else 0.1
        run = trainer(model, tmp_path, callbacks, label_smoothing_factor=factor)
        run.train()
        losses[name] = log.losses
        if config is not None:
            assert objective_of(model).state.step == 6
    assert losses["all"] == pytest.approx(losses["stock"], rel=1e-4)
    if TRANSFORMERS_5:  # before, its smoother's losses are not divided by the accumulated batches
        assert losses["option"] == pytest.approx(losses["stock"], rel=1e-4)
    assert losses["few"] != pytest.approx(losses["stock"], rel=1e-3)
    assert losses["few"] == pytest.approx(losses["stock"], rel=0.2)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (SCEConfig(label_smoothing=0.1), "set one of them to 0"),
        (SCEConfig(tail_candidates=0, num_buckets=4), "give tail_candidates, or leave"),
    ],
)
def test_label_smoothing_that_cannot_be_taken_over_is_refused(config, match, tmp_path):
    model = apply_sce(tiny_model("llama"), config)
    run = trainer(model, tmp_path, [SCECallback()], label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=match):
        run.train()


def test_automatic_batch_size_starts_again(tmp_path):
    """Out of memory in the first step with four rows; the second try has half of them."""
    model, rows = apply_sce(tiny_model("llama"), CONFIG), []

    def run_out_of_memory(module, args, kwargs):
        rows.append(len(kwargs["input_ids"]))
        if rows[-1] > 2:
            raise RuntimeError("CUDA out of memory.")

    model.model.register_forward_pre_hook(run_out_of_memory, with_kwargs=True)
    options = {"per_device_train_batch_size": 4, "auto_find_batch_size": True}
    trainer(model, tmp_path, [SCECallback()], **options).train()
    assert rows[0] > 2
    assert rows[-1] <= 2
    assert objective_of(model).state.step == sum(count <= 2 for count in rows) == 6
    assert "lm_head" not in model.__dict__


def test_model_init_starts_each_run_anew(tmp_path):
    """What a hyper-parameter search does."""
    models = []

    def model_init():
        models.append(apply_sce(tiny_model("llama"), CONFIG))
        return models[-1]

    losses = Losses()
    run = trainer(None, tmp_path, [losses], model_init=model_init)
    for _ in range(2):
        run.train()
    assert losses.losses[:3] == losses.losses[3:]
    assert [objective_of(model).state.step for model in models[-2:]] == [6, 6]


def test_model_card_is_written(tmp_path):
    run = trainer(apply_sce(tiny_model("llama"), CONFIG), tmp_path)
    run.train()
    run.create_model_card(model_name="tiny")
    assert "learning_rate: 0.01" in (tmp_path / "README.md").read_text()


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


class BatchAccuracy:
    """Accuracy that sees one batch at a time."""

    def __init__(self):
        self.hits = self.count = 0

    def __call__(self, prediction, compute_result):
        logits, labels = prediction.predictions, prediction.label_ids
        kept = labels[:, 1:] != -100
        self.hits += int((logits[:, :-1].argmax(-1) == labels[:, 1:])[kept].sum())
        self.count += int(kept.sum())
        return {"accuracy": self.hits / self.count} if compute_result else {}


def accuracy_with_inputs_and_losses(prediction):
    assert prediction.inputs.shape == (8, 12)
    assert len(prediction.losses) == 8
    return accuracy(prediction)


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_loss_only": True},
        {"eval_accumulation_steps": 1, "compute_metrics": accuracy},
        {"batch_eval_metrics": True, "compute_metrics": BatchAccuracy},
        {
            "include_for_metrics": ["inputs", "loss"],
            "compute_metrics": accuracy_with_inputs_and_losses,
        },
        {"bf16_full_eval": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_modes_of_evaluation_equal_stock(options, tmp_path):
    got = []
    for model in (tiny_model("gemma2"), apply_sce(tiny_model("gemma2"), CONFIG)):
        fresh = dict(options)
        if fresh.get("compute_metrics") is BatchAccuracy:
            fresh["compute_metrics"] = BatchAccuracy()
        run = trainer(model, tmp_path, **fresh)
        got.append((run.evaluate({"a": run.eval_dataset, "b": run.eval_dataset}), run))
    (want, _), (metrics, _) = got
    tolerance = 2e-2 if "bf16_full_eval" in options else 1e-5
    assert metrics.keys() == want.keys()
    for name in want:
        if name.endswith(("loss", "accuracy")):
            assert metrics[name] == pytest.approx(want[name], rel=tolerance)


def test_predict_equals_stock(tmp_path):
    stock, patched = tiny_model("granite"), apply_sce(tiny_model("granite"), CONFIG)
    want, got = (trainer(m, tmp_path).predict(examples(5)) for m in (stock, patched))
    torch.testing.assert_close(got.predictions, want.predictions, rtol=1e-5, atol=1e-5)
    assert got.metrics["test_loss"] == pytest.approx(want.metrics["test_loss"], rel=1e-5)


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


def test_resuming_from_a_stock_checkpoint_warns_once(tmp_path):
    trainer(tiny_model("llama"), tmp_path, **SAVING).train()
    model = apply_sce(tiny_model("llama"), CONFIG)
    run = trainer(model, tmp_path, [SCECallback()], **{**SAVING, "max_steps": 6})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train(resume_from_checkpoint=True)
    messages = [str(w.message) for w in caught if "SCEState" in str(w.message)]
    assert len(messages) == 1
    assert "resuming at step 4 without" in messages[0]
    assert objective_of(model).state.step == 4


def saved_steps(folder):
    """Calls that the state of each checkpoint had counted, by the checkpoint's path."""
    files = sorted(folder.rglob("sce_state_rank0.safetensors"))
    steps = {}
    for file in files:
        state = load_objective(file.parent).state
        steps[str(file.parent.relative_to(folder))] = state.step
    return steps


def new_model(trial=None):
    return apply_sce(tiny_model("llama"), CONFIG)


def without_our_warnings(function, *args, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(gone|SCEState|objective).*")
        return function(*args, **options)


@pytest.mark.parametrize("hp_name", [None, lambda trial: f"rates/{trial.number}"])
def test_states_of_a_hyper_parameter_search(hp_name, tmp_path):
    pytest.importorskip("optuna")
    evaluated = {"eval_strategy": "steps", "eval_steps": 2}
    run = trainer(None, tmp_path, [SCECallback()], model_init=new_model, **SAVING, **evaluated)

    def space(trial):
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}

    options = {"hp_space": space, "n_trials": 2, "direction": "minimize", "hp_name": hp_name}
    without_our_warnings(run.hyperparameter_search, backend="optuna", **options)
    trials = ["run-0", "run-1"] if hp_name is None else ["rates/0", "rates/1"]
    want = {f"{trial}/checkpoint-{step}": 2 * step for trial in trials for step in (2, 4)}
    assert saved_steps(tmp_path) == want
    # The best trial goes on, whose folder is nowhere else named.
    best = str(tmp_path / trials[0] / "checkpoint-2")
    without_our_warnings(run.train, resume_from_checkpoint=best)
    assert objective_of(run.model).state.step == 8
    assert saved_steps(tmp_path) == {**want, "checkpoint-4": 8}


class InSearch(TrainerCallback):
    """What the state of a trial says."""

    def on_train_begin(self, args, state, control, **kwargs):
        state.is_hyper_param_search = True


class Trials(Trainer):
    """The folders of a search, whatever library runs it."""

    number = 0

    def _get_output_dir(self, trial):
        return f"{super()._get_output_dir(trial)}/run-{self.number}"


def test_states_of_trials_go_where_the_trainer_saves(tmp_path):
    plain = trainer(new_model(), tmp_path, **SAVING)
    data = plain.train_dataset
    run = Trials(args=plain.args, model_init=new_model, train_dataset=data)
    run.add_callback(InSearch())
    run.add_callback(SCECallback())
    for run.number in (3, 1, 3):  # the last one over what another search left
        without_our_warnings(run.train)
    want = {f"run-{n}/checkpoint-{step}": 2 * step for n in (1, 3) for step in (2, 4)}
    assert saved_steps(tmp_path) == want
    # Trials with nearly one history are told apart by what was written last.
    for file in tmp_path.rglob("*sce*"):
        file.unlink()
    run.number = 1
    without_our_warnings(run.train)
    assert set(saved_steps(tmp_path)) == {"run-1/checkpoint-2", "run-1/checkpoint-4"}


def test_a_second_run_saves_into_its_own_folder(tmp_path, monkeypatch):
    """One callback, one model, two runs, of which the second has a relative path."""
    monkeypatch.chdir(tmp_path)
    model, callback = new_model(), SCECallback()
    for folder in (tmp_path / "a", "b/"):
        run = trainer(model, folder, [callback], **SAVING)
        without_our_warnings(run.train)
    assert saved_steps(tmp_path / "a") == {"checkpoint-2": 4, "checkpoint-4": 8}
    assert saved_steps(tmp_path / "b") == {"checkpoint-2": 12, "checkpoint-4": 16}


def test_state_is_saved_with_the_best_checkpoint(tmp_path):
    best = {"save_strategy": "best", "metric_for_best_model": "loss", "save_only_model": True}
    options = {**SAVING, **best, "eval_strategy": "steps", "eval_steps": 2}
    run = trainer(new_model(), tmp_path, [SCECallback()], **options)
    without_our_warnings(run.train)
    saved = [path.name for path in tmp_path.glob("checkpoint-*")]
    assert "checkpoint-2" in saved
    assert sorted(saved_steps(tmp_path)) == sorted(saved)


def test_state_of_a_run_that_found_its_batch_size(tmp_path):
    """Out of memory after a checkpoint; the second try saves over it."""
    model, seen = new_model(), []

    def run_out_of_memory(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if len(seen) == 6:  # after two steps
            raise RuntimeError("CUDA out of memory.")

    model.model.register_forward_pre_hook(run_out_of_memory, with_kwargs=True)
    options = {**SAVING, "per_device_train_batch_size": 4, "auto_find_batch_size": True}
    without_our_warnings(trainer(model, tmp_path, [SCECallback()], **options).train)
    first = 5  # the failed call did not count
    assert saved_steps(tmp_path) == {"checkpoint-2": first + 4, "checkpoint-4": first + 8}


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_the_trainer_forms_no_logits(options, tmp_path, monkeypatch):
    monkeypatch.setattr(exact_cross_entropy, "BLOCK_ELEMENTS", 8 * VOCAB_SIZE)
    options = {**options, "per_device_train_batch_size": 4, "prediction_loss_only": True}
    counts = []
    for patch in (lambda m: m, lambda m: apply_sce(m, objectives.get("exact"))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            run = trainer(patch(tiny_model("llama")), tmp_path, **options)
        with VocabularySized(4 * 12, VOCAB_SIZE) as counter:
            run.train()
            run.evaluate()
        counts.append(counter.count)
    assert counts[0] > 0
    assert counts[1] == 0


def test_callback_with_rotation_and_logs(tmp_path):
    model = apply_sce(tiny_model("llama"), CONFIG)
    run = trainer(model, tmp_path, [SCECallback()], **{**SAVING, "save_total_limit": 1})
    run.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert (tmp_path / "checkpoint-4" / "sce_state_rank0.safetensors").is_file()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(entry["sce/coverage"] == 1.0 for entry in logged)
    listed = [entry["sce/candidates_per_position"] for entry in logged]
    # The bucket's and the sampled ones, the frequent and at most all labels, of which the batch has
    # fewer than 50.
    assert all(8 + 16 + 8 <= count <= 8 + 16 + 8 + 50 for count in listed)
    assert all(entry["sce/products_per_position"] > count for entry, count in zip(logged, listed))
    assert all(entry["sce/relative_error"] > 0 for entry in logged)
    assert all(entry["sce/loss_seconds"] > 0 for entry in logged)
    assert sum(e["sce/loss_seconds"] for e in logged) == pytest.approx(loss_seconds(model))
    again = load_objective(tmp_path / "checkpoint-4")
    assert again.config == CONFIG
    assert torch.equal(again.state.counts, objective_of(model).state.counts)


def test_callback_is_idle_without_a_state(tmp_path):
    for model in (tiny_model("llama"), apply_sce(tiny_model("llama"), objectives.get("exact"))):
        run = trainer(model, tmp_path, [SCECallback()], **SAVING)
        run.train()
        assert not list(tmp_path.glob("*/sce_state*"))
