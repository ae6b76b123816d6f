"""Whole runs: what they leave behind, what they refuse, and that interruptions leave no trace."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.launch import ONE_THREAD
from support.training import (
    NO_DROPOUT,
    SMALL_SCE,
    figures,
    lm_fields,
    write_config,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from sce_lm.training import checkpoint
from sce_lm.training.loop import Run
from sce_lm.training.metrics_file import read_metrics
from sce_lm.training.run_building import build_run
from sce_lm.training.run_evaluation import evaluate_run
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def parameters(run: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run / "model").state_dict()


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)


def train(fields) -> Run:
    run = build_run(TrainConfig(**fields))
    run.train()
    return run


def test_a_run_leaves_a_stock_model_metrics_report_and_a_summary(corpus, tmp_path):
    fields = lm_fields(
        corpus,
        output_dir=str(tmp_path),
        objective="sce",
        objective_options=SMALL_SCE,
        trackers=["tensorboard"],
        gradient_accumulation_steps=2,
    )
    run = train(fields)

    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in records if "validation/nll" in r] == [5, 6]
    assert {"objective/coverage", "seconds_per_step", "tokens_per_second"} <= records[0].keys()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["objective"]["tail_candidates"] == 32
    assert json.loads((tmp_path / "objective.json").read_text()) == summary["objective"]
    assert summary["test"]["nll"] < math.log(600)
    assert (tmp_path / "report.png").stat().st_size > 5000
    error = summary["objective_error"]
    assert error["positions"] > 100
    assert 0 < error["log_z_sd"] < 0.2
    assert abs(error["log_z_bias"]) < 4 * error["log_z_sd"]
    assert 0.9 < error["cos_hidden"] < 1
    shares = summary["classes_by_frequency"]
    assert shares["classes"][-1] == 600
    assert shares["candidates"][0] == 1
    assert shares["candidates"][-1] < 0.5
    assert 0 < summary["loss_seconds_per_step"] < summary["seconds_per_step"]
    assert list(tmp_path.rglob("events.out.tfevents*"))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == model.config.vocab_size
    assert evaluate_run(RunFolder(tmp_path), run.accelerator)["model"] == pytest.approx(
        summary["test"]
    )


def test_a_finished_run_is_not_trained_again(corpus, tmp_path):
    fields = lm_fields(corpus, output_dir=str(tmp_path), max_steps=2, checkpoint_every=0)
    first = train(fields).folder.summary
    written = first.stat().st_mtime_ns, figures(tmp_path)
    assert build_run(TrainConfig(**fields)).train() == json.loads(first.read_text())
    assert written == (first.stat().st_mtime_ns, figures(tmp_path))


def test_accumulated_batches_train_as_one_batch_does(corpus, tmp_path):
    model_config = {**lm_fields(corpus)["model_config"], **NO_DROPOUT}
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        folder = tmp_path / str(batch)
        changes = {"per_device_batch_size": batch, "gradient_accumulation_steps": accumulation}
        train(lm_fields(corpus, output_dir=str(folder), model_config=model_config, **changes))
        runs.append([r["loss"] for r in figures(folder) if "loss" in r])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def test_bf16_and_gradient_checkpointing_run(corpus, tmp_path):
    changes = {"mixed_precision": "bf16", "gradient_checkpointing": True, "objective": "sce"}
    fields = lm_fields(corpus, output_dir=str(tmp_path), objective_options=SMALL_SCE, **changes)
    assert train(fields).step == 6
    assert next(iter(parameters(tmp_path).values())).dtype == torch.float32


@pytest.mark.parametrize("objective", [pytest.param("exact", marks=pytest.mark.slow), "sce"])
def test_a_killed_run_resumes_bit_for_bit(corpus, tmp_path, objective):
    """SIGKILL in the middle of 30 steps, with dropout, accumulation and (sce) sampling."""
    fields = lm_fields(
        corpus,
        objective=objective,
        objective_options=SMALL_SCE if objective == "sce" else {},
        gradient_accumulation_steps=2,
        max_steps=30,
        eval_every=10,
        checkpoint_every=6,
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    config = write_config(tmp_path / "config.yaml", {**fields, "output_dir": str(killed)})
    command = [sys.executable, ROOT / "scripts" / "train.py", config]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=ONE_THREAD, **pipes)
    while len(read_metrics(killed / "metrics.jsonl")) < 15:
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "summary.json").exists()
    reached = read_metrics(killed / "metrics.jsonl")[-1]["step"]
    assert 13 <= reached < 30

    subprocess.run(command, check=True, capture_output=True, env=ONE_THREAD)
    train({**fields, "output_dir": str(whole)})
    assert_equal(parameters(killed), parameters(whole))
    assert figures(killed) == figures(whole)


def test_lora_trains_adapters_resumes_and_leaves_a_stock_model(corpus, tmp_path, monkeypatch):
    base = tmp_path / "base"
    train(lm_fields(corpus, output_dir=str(base), max_steps=2))
    fields = lm_fields(
        corpus,
        model=str(base / "model"),
        model_config={},
        lora_rank=2,
        objective="sce",
        objective_options=SMALL_SCE,
        learning_rate=0.01,
        checkpoint_every=3,
        eval_every=2,
        keep_best=True,
    )
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    complete = checkpoint._complete

    def stop_after_step_3(*arguments):
        complete(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_complete", stop_after_step_3)
    with pytest.raises(KeyboardInterrupt):
        train({**fields, "output_dir": str(stopped)})
    monkeypatch.undo()
    train({**fields, "output_dir": str(stopped)})
    run = train({**fields, "output_dir": str(whole)})
    assert_equal(parameters(stopped), parameters(whole))
    assert figures(stopped) == figures(whole)

    before, after = parameters(base), parameters(whole)
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert any("attn" in name for name in changed)
    assert not any("wte" in name or "lm_head" in name or "ln_" in name for name in changed)
    summary = json.loads((whole / "summary.json").read_text())
    merged = evaluate_run(RunFolder(whole), run.accelerator)["model"]
    assert merged["nll"] == pytest.approx(summary["test"]["nll"], rel=1e-5)
    assert summary["memory_estimate_mib"]["gradients"] == 0


def test_a_checkpoint_in_the_making_is_passed_over(corpus, tmp_path, monkeypatch):
    fields = lm_fields(corpus, checkpoint_every=2)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    complete = checkpoint._complete

    def stop_at_step_4(partial, folder, facts):
        if facts["step"] == 4:
            raise KeyboardInterrupt
        complete(partial, folder, facts)

    run = build_run(TrainConfig(**{**fields, "output_dir": str(broken)}))
    monkeypatch.setattr(checkpoint, "_complete", stop_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    monkeypatch.undo()
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line that was cut off
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["step-00000002"]
    killed = broken / "checkpoints" / ".partial-step-00000004"  # what SIGKILL would have left
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"the first half")

    resumed = build_run(TrainConfig(**{**fields, "output_dir": str(broken)}))
    assert resumed.step == 2
    assert not list((broken / "checkpoints").glob(".*"))
    resumed.train()
    train({**fields, "output_dir": str(whole)})
    assert_equal(parameters(broken), parameters(whole))
    assert figures(broken) == figures(whole)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(corpus, tmp_path):
    fields = lm_fields(corpus, output_dir=str(tmp_path))
    train(fields)
    before = parameters(tmp_path)
    (tmp_path / "summary.json").unlink()
    newest = tmp_path / "checkpoints" / "step-00000006"
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000006 is damaged \(model.safetensors"):
        build_run(TrainConfig(**fields))
    weights.unlink()
    with pytest.raises(ValueError, match=r"step-00000006 is damaged \(model.safetensors"):
        build_run(TrainConfig(**fields))

    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    run = build_run(TrainConfig(**fields))
    assert run.step == 4
    run.train()
    assert_equal(parameters(tmp_path), before)


def test_only_the_newest_checkpoints_are_kept(corpus, tmp_path):
    train(lm_fields(corpus, output_dir=str(tmp_path), checkpoint_every=1, checkpoints_to_keep=3))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005", "step-00000006"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, "another configuration .learning_rate 0.001 -> 0.5"),
        ({"resume": False}, "already holds a run and resume is off"),
    ],
)
def test_a_folder_with_another_run_is_refused(corpus, tmp_path, changes, message):
    fields = lm_fields(corpus, output_dir=str(tmp_path), max_steps=2)
    train(fields)
    before = figures(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_run(TrainConfig(**{**fields, **changes}))
    assert figures(tmp_path) == before


def test_a_refused_configuration_leaves_the_folder_free(corpus, tmp_path):
    fields = lm_fields(corpus, output_dir=str(tmp_path), max_steps=1)
    misspelt = {"tail_candidate": 3}
    with pytest.raises(ValueError, match="'body'"):
        build_run(TrainConfig(**{**fields, "text_column": "body"}))
    with pytest.raises(ValueError, match="tracker 'wandbb'"):
        build_run(TrainConfig(**{**fields, "trackers": ["wandbb"]}))
    with pytest.raises(ValueError, match="tail_candidate"):
        build_run(TrainConfig(**{**fields, "objective": "sce", "objective_options": misspelt}))
    train(fields)


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path):
    fields = lm_fields(corpus, output_dir=str(tmp_path), learning_rate=1e30, max_grad_norm=0)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train(fields)


def test_the_script_says_what_is_wrong_in_one_line(corpus, tmp_path):
    config = write_config(tmp_path / "config.yaml", lm_fields(corpus, data="none.jsonl"))
    command = [sys.executable, ROOT / "scripts" / "train.py", config]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().split("\n")[-1] == (
        "train.py: There is no data file none.jsonl; give the path of a file or folder."
    )
    assert "Traceback" not in done.stderr


def test_the_evaluation_script_prints_and_writes_what_the_run_ended_with(corpus, tmp_path):
    summary = build_run(
        TrainConfig(**lm_fields(corpus, output_dir=str(tmp_path), max_steps=2))
    ).train()
    script = str(ROOT / "scripts" / "evaluate.py")
    command = [sys.executable, script, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ONE_THREAD)
    written = json.loads((tmp_path / "evaluation.json").read_text())["model"]
    assert written == pytest.approx(summary["test"])
    for name, value in written.items():
        assert name in done.stdout
        assert f"{value:.4f}" in done.stdout
