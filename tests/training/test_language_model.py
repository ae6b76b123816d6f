"""Evaluation of a language model is the likelihood that a stock computation gives."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from support.training import lm_fields
from transformers import AutoModelForCausalLM, AutoTokenizer

from sce_lm.hf import apply_sce
from sce_lm.objectives import get
from sce_lm.training.language_model import LanguageModelTask
from sce_lm.training.models import build_model
from sce_lm.training.text_blocks import hold_out, read_documents
from sce_lm.training.train_config import TrainConfig


@pytest.mark.parametrize(
    "model_config",
    [
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2},
        {
            "model_type": "mixtral",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_local_experts": 2,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.5,
        },
    ],
    ids=["gpt2", "mixtral"],
)
def test_figures_equal_those_of_stock_logits(corpus, model_config):
    fields = lm_fields(corpus, model_config=model_config, eval_batches=3)
    config = TrainConfig(**fields)
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    task = LanguageModelTask(*hold_out(read_documents(config)[0], config), tokenizer, config)
    torch.manual_seed(0)
    model = build_model(config, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # so that predictions differ from one position to the next
    stock = AutoModelForCausalLM.from_config(model.config)
    stock.load_state_dict(model.state_dict())
    apply_sce(model, get("sce", num_buckets=0, tail_candidates=8))

    figures = task.evaluate(model.eval(), Accelerator(), on="test")

    blocks = torch.stack([torch.from_numpy(block) for block in task.held_out])
    with torch.no_grad():
        logits = stock.eval()(blocks).logits[:, :-1].double()
    labels = blocks[:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert figures["nll"] == pytest.approx(nll, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    confidence, predicted = logits.softmax(-1).max(-1)
    hits = (predicted == labels).double()
    assert figures["accuracy"] == pytest.approx(hits.mean().item(), abs=2 / labels.numel())
    ece, edges = 0.0, np.linspace(0, 1, 16)
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = hits[inside].mean() - confidence[inside].mean()
            ece += inside.double().mean().item() * abs(gap.item())
    assert figures["ece"] == pytest.approx(ece, abs=4 / labels.numel())


def test_a_diverged_model_has_figures_that_say_so(corpus):
    config = TrainConfig(**lm_fields(corpus))
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    task = LanguageModelTask(*hold_out(read_documents(config)[0], config), tokenizer, config)
    model = apply_sce(build_model(config, tokenizer), get("exact")).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    figures = task.evaluate(model, Accelerator(), on="test")
    assert math.isnan(figures["nll"])
    assert math.isnan(figures["ece"])


def test_an_evaluation_in_the_course_of_training_is_bounded(corpus, monkeypatch):
    config = TrainConfig(**lm_fields(corpus, eval_batches=2))
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    task = LanguageModelTask(*hold_out(read_documents(config)[0], config), tokenizer, config)
    model = apply_sce(build_model(config, tokenizer), get("exact")).eval()
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    task.evaluate(model, Accelerator(), on="validation")
    assert sizes == [config.per_device_batch_size] * 2
    hook.remove()
