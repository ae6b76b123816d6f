"""The example programs run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.launch import ONE_THREAD

from sce_lm.training.command_line import parse_config
from sce_lm.training.embedded.api_calls import embedded_interactions

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=ONE_THREAD
    ).stdout


def test_plain_loop():
    lines = run("plain_loop.py", "--steps", "30").strip().split("\n")
    nats = [float(line.split(":")[1].split()[0]) for line in lines[1:]]
    # Predicting each of some 4,000 words with the same probability costs 8.3 nats.
    assert len(nats) == 2
    assert max(nats) < 6.5


def test_item_tokens(tmp_path):
    log = embedded_interactions(tmp_path, packages=("asyncio", "email", "json"), progress=False)
    output = tmp_path / "run"
    printed = run("item_tokens.py", str(log.path), "--steps", "30", "--output", str(output))
    assert '"ndcg@10"' in printed
    assert "after [" in printed
    assert (output / "model" / "tokenizer.json").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/*.yaml")), ids=lambda p: p.stem)
def test_example_configurations_are_accepted(path):
    assert parse_config([str(path)]).task in path.stem
