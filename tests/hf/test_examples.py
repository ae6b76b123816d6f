import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(program, folder):
    command = [sys.executable, EXAMPLES / f"{program}.py", "--steps", "4", "--length", "48"]
    result = subprocess.run(
        [*command, "--output_dir", folder], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert "held-out exact loss" in result.stdout


@pytest.mark.parametrize(
    ("program", "saved"), [("trainer", "model.safetensors"), ("peft_lora", "adapter_config.json")]
)
def test_example_runs(program, saved, tmp_path):
    run_example(program, tmp_path)
    assert list(tmp_path.glob(f"*/{saved}"))
    assert (tmp_path / "checkpoint-4" / "sce_state_rank0.safetensors").is_file()


def test_lightning_example_keeps_the_state_in_its_checkpoints(tmp_path):
    pytest.importorskip("lightning")
    run_example("lightning_module", tmp_path)
    assert (tmp_path / "final" / "model.safetensors").is_file()
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=False)["sce_state"]
    assert int(state["step"]) == 4
    assert int(state["counts"].sum()) == 4 * 8 * 47


def test_multi_token_prediction_learns_every_head():
    command = [sys.executable, EXAMPLES / "multi_token_prediction.py", "--steps", "12"]
    result = subprocess.run([*command, "--depth", "3"], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    losses = [float(line.split()[-4]) for line in result.stdout.splitlines() if "ahead" in line]
    words = int(result.stdout.split(" words, ")[1].split()[0].replace(",", ""))
    assert len(losses) == 3
    assert max(losses) < math.log(words)
    table = result.stdout.split("exact       SCE\n")[1].splitlines()
    assert [row.split()[0] for row in table] == ["1", "2", "3"]
