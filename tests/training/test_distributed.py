"""Several processes train as one with as large a batch, started as accelerate starts them."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support.launch import ONE_THREAD
from support.training import NO_DROPOUT, SMALL_SCE, figures, lm_fields, write_config

from sce_lm.training.checkpoint import Checkpoints
from sce_lm.training.metrics_file import read_metrics
from sce_lm.training.run_building import build_run
from sce_lm.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]


def script(config: Path, *options: str) -> list[str]:
    return [str(ROOT / "scripts" / "train.py"), str(config), *options]


def launch(config: Path, *options: str) -> None:
    """Train with `accelerate launch --cpu --num_processes 2`."""
    command = [*LAUNCH, *script(config, *options)]
    subprocess.run(command, check=True, env=ONE_THREAD, capture_output=True)


def start(folder: Path, command: list[str], **variables: str) -> subprocess.Popen:
    """A program whose error output goes to `errors` in the folder: a pipe would fill up."""
    with (folder / "errors").open("a") as errors:
        environment = {**ONE_THREAD, **variables}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def wait_for_checkpoint(run: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run that the process makes has a checkpoint of this step, or of a later one."""
    end = time.monotonic() + 300
    name = f"step-{step:08d}"
    while not any(found.name >= name for found in (run / "checkpoints").glob("step-*")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.distributed
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(corpus, tmp_path):
    """Exact loss, no dropout, accumulation; also validation figures, which are summed over both."""
    fields = lm_fields(corpus, gradient_accumulation_steps=2, eval_batches=0)
    fields["model_config"] = {**fields["model_config"], **NO_DROPOUT}
    one, two = tmp_path / "one", tmp_path / "two"
    launch(write_config(tmp_path / "config.yaml", {**fields, "output_dir": str(two)}))
    build_run(TrainConfig(**{**fields, "output_dir": str(one), "per_device_batch_size": 8})).train()

    left, right = read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl")
    assert len(left) == len(right) == 8
    for name in (
        "loss",
        "grad_norm",
        "validation/nll",
        "validation/accuracy",
        "learning_rate",
        "epoch",
    ):
        expected = [record[name] for record in left if name in record]
        assert [record[name] for record in right if name in record] == pytest.approx(
            expected, rel=1e-5
        )


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("optimizer", "tied"),
    [("sparse_adam", True), ("rowwise_adagrad", False)],
)
@pytest.mark.slow
def test_two_processes_train_by_rows_as_one_with_twice_the_batch(corpus, tmp_path, optimizer, tied):
    """Every class is a candidate, so that the loss is exact; each process meets inputs of its own,
    and the rest of the gradients must agree for the model to."""
    fields = lm_fields(
        corpus,
        optimizer=optimizer,
        objective="sce",
        objective_options={
            "num_buckets": 0,
            "tail_candidates": 10**6,
            "control_variate": False,
            "sparse_grad": True,
        },
        gradient_accumulation_steps=2,
        eval_batches=0,
        max_grad_norm=0.5,
    )
    fields["model_config"] = {**fields["model_config"], **NO_DROPOUT, "tie_word_embeddings": tied}
    one, two = tmp_path / "one", tmp_path / "two"
    launch(write_config(tmp_path / "config.yaml", {**fields, "output_dir": str(two)}))
    build_run(TrainConfig(**{**fields, "output_dir": str(one), "per_device_batch_size": 8})).train()

    left, right = read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl")
    assert len(left) == len(right) == 8
    for name in ("loss", "grad_norm", "validation/nll"):
        expected = [record[name] for record in left if name in record]
        assert [record[name] for record in right if name in record] == pytest.approx(
            expected, rel=1e-4
        )


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_resume_where_they_stopped_with_states_of_their_own(corpus, tmp_path):
    fields = lm_fields(corpus, objective="sce", objective_options=SMALL_SCE, max_steps=6)
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    config = write_config(tmp_path / "config.yaml", {**fields, "output_dir": str(whole)})
    launch(config)
    launch(config, "--output_dir", str(stopped))
    newest = stopped / "checkpoints" / "step-00000006"
    states = [(newest / f"sce_state_rank{rank}.safetensors").read_bytes() for rank in range(2)]
    assert states[0] != states[1]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    (stopped / "summary.json").unlink()
    launch(config, "--output_dir", str(stopped))
    assert figures(stopped) == figures(whole)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_process_ends_a_run_that_goes_on_with_two_or_one(corpus, tmp_path):
    """Exact loss without dropout: one process that takes both shares comes out where two do."""
    fields = lm_fields(corpus, max_steps=60, eval_every=20, checkpoint_every=5)
    fields["model_config"] = {**fields["model_config"], **NO_DROPOUT}
    two, one, whole = tmp_path / "two", tmp_path / "one", tmp_path / "whole"
    config = write_config(tmp_path / "config.yaml", {**fields, "output_dir": str(two)})
    launch(config, "--output_dir", str(whole))

    run = start(tmp_path, [*LAUNCH, *script(config)])
    wait_for_checkpoint(two, 10, run)
    workers = {
        int(worker.environ()["RANK"]): worker
        for worker in psutil.Process(run.pid).children(recursive=True)
        if any(part.endswith("train.py") for part in worker.cmdline())
        and "RANK" in worker.environ()
    }
    workers[1].kill()
    assert run.wait(timeout=60) != 0
    assert "Signal 9" in (tmp_path / "errors").read_text()
    assert not any(worker.is_running() for worker in workers.values())
    assert not (two / "summary.json").exists()

    shutil.copytree(two, one)
    launch(config)
    assert figures(two) == figures(whole)
    alone = TrainConfig(**{**fields, "output_dir": str(one)})
    assert build_run(alone).train()["processes"] == 1
    (one / "summary.json").unlink()
    shutil.rmtree(one / "checkpoints" / "step-00000060")
    build_run(alone).train()  # from a checkpoint of one process, whose steps still take two batches
    left, right = read_metrics(one / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [record["step"] for record in left] == [record["step"] for record in right]
    for name in ("loss", "validation/nll", "num_items", "epoch"):
        expected = [record[name] for record in right if name in record]
        assert [record[name] for record in left if name in record] == pytest.approx(
            expected, rel=1e-4
        )


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "options"),
    [(signal.SIGKILL, ()), (signal.SIGSTOP, ("--process_timeout", "30"))],
    ids=["killed", "hanging"],
)
def test_a_process_ends_when_another_is_gone_though_nobody_watches_them(
    corpus, tmp_path, sent, options
):
    """Started by hand, as by a scheduler: no torchrun ends the processes that are left."""
    fields = lm_fields(corpus, max_steps=100_000, eval_every=0, checkpoint_every=10)
    config = write_config(tmp_path / "config.yaml", {**fields, "output_dir": str(tmp_path / "run")})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        start(
            tmp_path,
            [sys.executable, *script(config, *options)],
            **address,
            ACCELERATE_USE_CPU="true",
            RANK=rank,
            LOCAL_RANK=rank,
        )
        for rank in "01"
    ]
    try:
        wait_for_checkpoint(tmp_path / "run", 10, processes[0])
        os.kill(processes[1].pid, sent)
        assert processes[0].wait(timeout=60) != 0
        assert "RuntimeError" in (tmp_path / "errors").read_text()
    finally:
        for process in processes:
            process.kill()


def test_processes_that_cannot_share_a_step_do_not_resume(corpus, tmp_path):
    run = build_run(TrainConfig(**lm_fields(corpus, max_steps=2, output_dir=str(tmp_path))))
    run.train()
    three = SimpleNamespace(
        is_main_process=True, num_processes=3, process_index=0, wait_for_everyone=lambda: None
    )
    learner: Any = dataclasses.replace(run.learner, accelerator=three)
    checkpoints: Any = Checkpoints(run.folder.checkpoints, learner, 1)
    with pytest.raises(
        ValueError, match="by 1 processes, whose steps take 1 batches, and this run"
    ):
        checkpoints.load(checkpoints.newest())
