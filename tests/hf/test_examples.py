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


def test_dynamic_fine_tuning_example_learns():
    command = [sys.executable, EXAMPLES / "dynamic_fine_tuning.py", "--steps", "16"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split(" nats")[0]) < 5.0  # log 256 = 5.5 before the first step
