"""The template of an objective is one: unbiased, differentiable, and taken by `apply_sce`."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sce_lm import apply_sce
from sce_lm.objectives.reference import exact_reference
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions

PATH = Path(__file__).resolve().parents[2] / "docs/templates/objective.py"


@pytest.fixture(scope="module")
def template():
    spec = importlib.util.spec_from_file_location("objective_template", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_it_estimates_the_exact_loss(template):
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 6), torch.randn(200, 6)
    labels = torch.randint(200, (30,))
    exact = exact_reference(Head(weight), Positions(hidden, labels))
    objective = template.Uniform(template.UniformConfig(num_draws=20_000))
    got = objective(hidden, weight, labels, reduction="none")
    torch.testing.assert_close(got, exact, atol=0.1, rtol=0.0)


def test_a_model_trains_with_it(template):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=90, num_attention_heads=2, num_key_value_heads=1, **sizes)
    model = apply_sce(LlamaForCausalLM(config), template.Uniform())
    ids = torch.randint(90, (2, 20))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
