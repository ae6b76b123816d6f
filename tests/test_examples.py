"""The example programs run as they stand."""

import math
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from support.launch import ONE_THREAD

from sce_lm.training.command_line import parse_config
from sce_lm.training.embedded.api_calls import embedded_interactions

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *options: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fine_tune(name: str, folder: Path) -> None:
    printed = run(name, "--steps", 4, "--length", 48, "--output_dir", folder)
    assert "held-out exact loss" in printed


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("trainer.py", "model.safetensors"),
        pytest.param("peft_lora.py", "adapter_config.json", marks=pytest.mark.slow),
    ],
)
def test_fine_tuning_with_the_trainer(name, saved, tmp_path):
    fine_tune(name, tmp_path)
    assert list(tmp_path.glob(f"*/{saved}"))
    assert (tmp_path / "checkpoint-4" / "sce_state_rank0.safetensors").is_file()


def test_lightning_example_keeps_the_state_in_its_checkpoints(tmp_path):
    pytest.importorskip("lightning")
    fine_tune("lightning_module.py", tmp_path)
    assert (tmp_path / "final" / "model.safetensors").is_file()
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["sce_state"]
    assert int(state["step"]) == 4
    assert int(state["counts"].sum()) == 4 * 8 * 47


def test_plain_loop():
    lines = run("plain_loop.py", "--steps", 30).strip().split("\n")
    nats = [float(line.split(":")[1].split()[0]) for line in lines[1:]]
    # Predicting each of some 4,000 words with the same probability costs 8.3 nats.
    assert len(nats) == 2
    assert max(nats) < 6.5


def test_dynamic_fine_tuning_learns():
    nats = float(run("dynamic_fine_tuning.py", "--steps", 16).split(" nats")[0])
    assert nats < 5.0  # log 256 = 5.5 before the first step


def test_multi_token_prediction_learns_every_head():
    printed = run("multi_token_prediction.py", "--steps", 12, "--depth", 3)
    losses = [float(line.split()[-4]) for line in printed.splitlines() if "ahead" in line]
    words = int(printed.split(" words, ")[1].split()[0].replace(",", ""))
    assert len(losses) == 3
    assert max(losses) < math.log(words)
    table = printed.split("exact       SCE\n")[1].splitlines()
    assert [row.split()[0] for row in table] == ["1", "2", "3"]


def test_item_tokens(tmp_path):
    log = embedded_interactions(tmp_path, packages=("asyncio", "email", "json"), progress=False)
    output = tmp_path / "run"
    printed = run("item_tokens.py", log.path, "--steps", 30, "--output", output)
    assert '"ndcg@10"' in printed
    assert "after [" in printed
    assert (output / "model" / "tokenizer.json").exists()


def test_recommender_end_to_end(tmp_path):
    pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)
    rows = [(f"u{u}", f"i{(3 * u + t) % 31}", t) for t in range(8) for u in range(90)]
    log = tmp_path / "log.csv"
    pl.DataFrame(rows, schema=["who", "what", "when"], orient="row").write_csv(log)
    columns = ("--user", "who", "--item", "what", "--time", "when")
    printed = run(
        "recommender_end_to_end.py", log, *columns, "--steps", 40, "--output", tmp_path / "out"
    )
    figures = re.findall(
        r"^(popularity|Markov chain|model) +NDCG@10 ([.\d]+)", printed, re.MULTILINE
    )
    ndcg = {name: float(value) for name, value in figures}
    assert ndcg["popularity"] < ndcg["model"]  # the next item follows from the last one
    lists = pl.read_parquet(tmp_path / "out" / "lists.parquet")
    assert lists["user"].n_unique() == 90
    assert len(lists) == 900
    assert "31 vectors of 64 numbers" in printed
    # The first user has seen items 0 to 7, each time in this order.
    assert "after ['i3', 'i4', 'i5', 'i6', 'i7']: ['i8'" in printed


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/*.yaml")), ids=lambda p: p.stem)
def test_example_configurations_are_accepted(path):
    assert parse_config([str(path)]).task in path.stem
