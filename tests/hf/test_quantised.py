"""Quantised backbones with LoRA on them and on the head, beside stock."""

import importlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import tiny_batch, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from sce_lm import objectives
from sce_lm.hf import apply_sce


def torchao_int8():
    quantization = importlib.import_module("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


KINDS = {
    "bitsandbytes 8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes 4": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True)),
    "torchao 8": ("torchao", torchao_int8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_a_quantised_model_equals_stock(kind, tmp_path):
    package, config = KINDS[kind]
    pytest.importorskip(package)
    tiny_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM")
    losses, models = [], []
    for patch in (lambda m: m, lambda m: apply_sce(m, objectives.get("exact"))):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config(), device_map="cpu"
        )
        torch.manual_seed(0)
        model = patch(get_peft_model(model, lora)).train()
        torch.nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
        losses.append(model(**tiny_batch()).loss)
        losses[-1].backward()
        models.append(model)
    layer = models[1].base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert type(layer) is not torch.nn.Linear or "torchao" in type(layer.weight).__module__
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for (name, p), q in zip(models[1].named_parameters(), models[0].parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)
