"""Small causal language models, built from their configs with fixed weights."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

VOCAB_SIZE = 163
"""Odd, so that nothing works by alignment."""

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}

# name: (config class, sizes, what makes this model a case of its own)
_FAMILIES: dict[str, tuple[type[PretrainedConfig], dict, dict]] = {
    "llama": (LlamaConfig, _SIZES, {}),
    "qwen3": (Qwen3Config, _SIZES, {"head_dim": 8}),
    "gemma3": (Gemma3TextConfig, _SIZES, {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, _SIZES, {"head_dim": 8, "final_logit_softcapping": 0.5}),
    "gpt2": (GPT2Config, _GPT2_SIZES, {}),
    "granite": (GraniteConfig, _SIZES, {"logits_scaling": 3.0}),
    "cohere": (CohereConfig, _SIZES, {"logit_scale": 0.25}),
    "phi": (PhiConfig, _SIZES, {"num_key_value_heads": 4}),
    "mixtral": (
        MixtralConfig,
        _SIZES,
        {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1},
    ),
}

NAMES = tuple(_FAMILIES)
"""Tied, soft-capped, scaled, biased and router-loss heads are among them."""


def tiny_config(name: str, **changes) -> PretrainedConfig:
    """The config of a family with two layers of width 32; ``changes`` override its fields."""
    config_class, sizes, special = _FAMILIES[name]
    return config_class(**{**sizes, **special, **changes})


def tiny_model(name: str, seed: int = 0, **changes) -> PreTrainedModel:
    """An fp32 model of a family in training mode; the same seed gives the same weights.

    Weights are larger than at a usual initialisation, so that logits differ and soft caps bend.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def tiny_batch(seed: int = 0, batch: int = 3, length: int = 17) -> dict[str, torch.Tensor]:
    """``input_ids``, ``attention_mask``, ``labels`` (some ignored), each [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[-1, -4:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
