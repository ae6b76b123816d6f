"""Several processes train as one with as large a batch, started as accelerate starts them."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.training import NO_DROPOUT, ONE_THREAD, SMALL_SCE, figures, lm_fields, write_config

from sce_lm.training.config import TrainConfig
from sce_lm.training.loop import Run
from sce_lm.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]


def launch(config: Path, *options: str) -> None:
    """Train with `accelerate launch --cpu --num_processes 2`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    script = [str(ROOT / "scripts" / "train.py"), str(config), *options]
    subprocess.run([*command, *script], check=True, env=ONE_THREAD, capture_output=True)


@pytest.mark.distributed
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(corpus, tmp_path):
    """Exact loss, no dropout, accumulation; also held-out figures, which are summed over both."""
    fields = lm_fields(corpus, gradient_accumulation_steps=2, eval_batches=0)
    fields["model_config"] = {**fields["model_config"], **NO_DROPOUT}
    one, two = tmp_path / "one", tmp_path / "two"
    launch(write_config(tmp_path / "config.yaml", {**fields, "output_dir": str(two)}))
    Run(TrainConfig(**{**fields, "output_dir": str(one), "per_device_batch_size": 8})).train()

    left, right = read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl")
    assert len(left) == len(right) == 8
    for name in ("loss", "grad_norm", "nll", "accuracy", "learning_rate", "epoch"):
        expected = [record[name] for record in left if name in record]
        assert [record[name] for record in right if name in record] == pytest.approx(
            expected, rel=1e-5
        )


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("optimizer", "tied"),
    [("sparse_adam", True), pytest.param("rowwise_adagrad", False, marks=pytest.mark.slow)],
)
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
    Run(TrainConfig(**{**fields, "output_dir": str(one), "per_device_batch_size": 8})).train()

    left, right = read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl")
    assert len(left) == len(right) == 8
    for name in ("loss", "grad_norm", "nll"):
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
    with pytest.raises(ValueError, match="written by 2 processes and this run has 1"):
        Run(TrainConfig(**{**fields, "output_dir": str(stopped)}))
