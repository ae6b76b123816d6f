"""The model and tokenizer of a run: loaded, or from scratch, and checked to fit each other."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sce_lm.files import in_one_line
from sce_lm.requirements import require
from sce_lm.training.kinds import nearest
from sce_lm.training.train_config import TrainConfig


def load_tokenizer(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder; ValueError if there is none, or it is code.

    Args:
        options: further ones of `AutoTokenizer.from_pretrained`.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # the hub, the file system and several parsers stand behind this
        raise _unreadable("tokenizer", source, error) from error


def load_model(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The causal language model of a run's or another saved folder, of which no code is run.

    Args:
        options: further ones of `AutoModelForCausalLM.from_pretrained`.

    Raises ValueError if there is none, if its weights are not safetensors (or, with `gguf_file`,
    GGUF), or if it needs code that lies in the folder.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, **options
        )
    except Exception as error:  # the hub, the file system and several parsers stand behind this
        raise _unreadable("model", folder, error) from error


def build_model(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, **decided: Any
) -> PreTrainedModel:
    """The causal language model that `config` names, with a row for every token.

    Args:
        decided: fields that the data decide of the configuration of a model from scratch.

    Raises ValueError for a model that cannot be read, an unknown model type or field of its
    configuration, a vocabulary smaller than the tokenizer's, or too few positions.
    """
    dtype = getattr(torch, config.dtype)
    if config.model is not None:
        try:
            # From the hub also older files of weights than safetensors: read as numbers only.
            model = AutoModelForCausalLM.from_pretrained(
                config.model, dtype=dtype, weights_only=True, trust_remote_code=False
            )
        except Exception as error:  # as above
            raise _unreadable("model", config.model, error) from error
    else:
        model = AutoModelForCausalLM.from_config(_config(config, tokenizer, decided), dtype=dtype)
    text_config = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    rows = head.weight.shape[0]
    if rows < len(tokenizer):
        raise ValueError(
            f"The model has {rows} token embeddings and the tokenizer {len(tokenizer)} tokens; "
            "every token needs a row; use the tokenizer that belongs to the model, or set "
            "vocab_size."
        )
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and positions < config.sequence_length:
        raise ValueError(
            f"sequence_length is {config.sequence_length} and the model has {positions} positions; "
            "shorten the sequences, or give a model from scratch more max_position_embeddings."
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def add_lora(model: PreTrainedModel, rank: int) -> Any:
    """The model, frozen, with LoRA adapters of that rank on all linear layers."""
    require("LoRA", "peft")
    from peft import LoraConfig, TaskType, get_peft_model  # takes seconds, and is seldom needed

    adapters = LoraConfig(r=rank, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    return get_peft_model(model, adapters)


def _config(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, decided: dict[str, Any]):
    """The configuration of a model from scratch, its special tokens taken from the tokenizer."""
    given = dict(config.model_config)
    model_type = given.pop("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model_config names the model_type {model_type!r}, which transformers does not know; "
            f"did you mean {nearest(str(model_type), CONFIG_MAPPING)!r}?"
        )
    # A configuration class takes unknown fields without a word, so a misspelt one would be lost.
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map}
    options: dict[str, Any] = dict(decided)
    for name, value in given.items():
        if name not in known and not hasattr(default, name):
            raise ValueError(
                f"model_config sets {name!r}, which is no field of {model_type}; did you mean "
                f"{nearest(name, known)!r}?"
            )
        # By another name the class would take any type, and either of two values.
        field = default.attribute_map.get(name, name)
        if field in options:
            twice = [other for other in given if default.attribute_map.get(other, other) == field]
            raise ValueError(
                f"model_config sets {' and '.join(twice)}, two names of one field of {model_type}; "
                "keep one of them."
            )
        options[field] = _number_like(getattr(default, field, None), value)
    for role in ("bos", "eos", "pad"):
        options.setdefault(f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    options.setdefault("vocab_size", len(tokenizer))
    try:
        return AutoConfig.for_model(model_type, **options)
    except Exception as error:  # validation errors of several libraries
        raise ValueError(
            f"model_config is not accepted by {model_type} ({in_one_line(error)}); correct it."
        ) from error


def _number_like(default: Any, value: Any) -> Any:
    """A whole float as an int where the default is one, and an int as a float."""
    if type(default) is int and type(value) is float and value.is_integer():
        return int(value)
    return float(value) if type(default) is float and type(value) is int else value


def _unreadable(what: str, source: str | Path, error: Exception) -> ValueError:
    return ValueError(
        f"The {what} {str(source)!r} cannot be loaded ({_first_line(error)}); expected a hub id or "
        "a folder written by save_pretrained; check the name and that its files are complete."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300].rstrip(".") or type(error).__name__
