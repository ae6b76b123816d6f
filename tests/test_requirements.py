"""The core runs with torch, transformers, safetensors and triton; what else is missing is said in
one sentence."""

import subprocess
import sys

import pytest
from support.missing import NOT_IN_THE_CORE, environment

from sce_lm.requirements import require

LOSSES = """
import torch
from sce_lm import SCEConfig, objectives, sce_loss
hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(90, 8, requires_grad=True)
labels = torch.randint(90, (40,))
sce_loss(hidden, weight, labels, config=SCEConfig()).backward()
for name in objectives.names():
    objectives.get(name)(hidden, weight, labels).backward()
"""
MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from sce_lm import SCECallback, SCEConfig, apply_sce, remove_sce
sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
config = LlamaConfig(vocab_size=90, num_attention_heads=2, num_key_value_heads=1, **sizes)
model = apply_sce(LlamaForCausalLM(config), SCEConfig())
ids = torch.randint(90, (2, 20))
model(input_ids=ids, labels=ids).loss.backward()
remove_sce(model)
"""


def run(tmp_path, missing, *command, network=True):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment(tmp_path / "first", missing, network=network),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("code", "more"),
    [(LOSSES, ("transformers", "tokenizers", "tqdm", "yaml")), (MODEL, ())],
    ids=["losses", "model"],
)
def test_the_core_needs_nothing_else(tmp_path, code, more):
    result = run(tmp_path, (*NOT_IN_THE_CORE, *more), "-c", code, network=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_the_benchmark_of_the_loss_needs_nothing_else(tmp_path):
    sizes = ("--tokens", 48, "--vocab", 300, "--dim", 8, "--repeats", 1)
    # Each method takes processes of its own.
    methods = ("--methods", "stock", "liger", "sce-tail", "--draws", 1)
    result = run(
        tmp_path, NOT_IN_THE_CORE, "scripts/benchmark.py", "loss", *sizes, *methods, network=False
    )
    assert result.returncode == 0, result.stderr
    assert "failed" not in result.stdout
    assert "Liger: skipped; not installed: pip install liger-kernel" in result.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("scripts/train.py", "none.yaml"), "train.py: sce_lm.training needs accelerate,"),
        (("scripts/evaluate.py", "none"), "evaluate.py: sce_lm.training needs accelerate,"),
        (("scripts/recommend.py", "none", "--history", "a"), "recommend.py: sce_lm.recsys needs"),
        (("scripts/benchmark.py", "train", "none.yaml"), "benchmark.py: sce_lm.training needs"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_commands_say_what_is_missing(tmp_path, command, said):
    result = run(tmp_path, NOT_IN_THE_CORE, *command)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(said)
    assert "pip install" in line


def test_the_sentence_names_packages_as_pip_does():
    require("a test", "json", "torch")
    with pytest.raises(ImportError, match=r"^a test needs no_such, which .*: pip install no_such$"):
        require("a test", "torch", "no_such")
