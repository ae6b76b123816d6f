import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("program", "saved"), [("trainer", "model.safetensors"), ("peft_lora", "adapter_config.json")]
)
def test_example_runs(program, saved, tmp_path):
    command = [sys.executable, EXAMPLES / f"{program}.py", "--steps", "4", "--length", "48"]
    result = subprocess.run(
        [*command, "--output_dir", tmp_path], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert "held-out exact loss" in result.stdout
    assert list(tmp_path.glob(f"*/{saved}"))
    assert (tmp_path / "checkpoint-4" / "sce_state_rank0.safetensors").is_file()
