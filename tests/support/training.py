"""Small training runs on real text and real call sequences, for tests of sce_lm.training."""

from __future__ import annotations

import json
import pydoc
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from sce_lm.training.metrics_file import read_metrics
from sce_lm.training.train_config import TrainConfig

QUIET: dict[str, Any] = {
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
"""Arguments of a Trainer that logs each step, to itself alone."""

MODULES = ("argparse", "ast", "asyncio", "collections", "email", "json", "logging", "unittest")
END_OF_TEXT = "<|endoftext|>"


class Losses(TrainerCallback):
    """The losses that a Trainer logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def documentation() -> list[str]:
    """The documentation of some modules of the standard library, one text a module."""
    return [pydoc.plain(pydoc.render_doc(name))[:20_000] for name in MODULES]


def write_text(folder: Path) -> tuple[Path, Path]:
    """JSON lines with a document a line, and a folder with a byte-level BPE of 600 tokens."""
    documents = documentation()
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
    wrapped.save_pretrained(folder / "tokenizer")
    return path, folder / "tokenizer"


def lm_fields(folder: Path, **changes: Any) -> dict[str, Any]:
    """Fields of a language-model run on `write_text(folder)`; it has dropout."""
    fields = {
        "task": "lm",
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "data": str(folder / "text.jsonl"),
        "tokenizer": str(folder / "tokenizer"),
        "held_out_fraction": 0.15,
        "model_config": {
            "model_type": "gpt2",
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
        },
        "objective": "exact",
        "sequence_length": 32,
        "per_device_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "eval_every": 5,
        "eval_batches": 4,
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return {**fields, **changes}


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

SMALL_SCE = {
    "num_buckets": 4,
    "bucket_candidates": 16,
    "shared_frequent": 16,
    "tail_candidates": 32,
}


def write_config(path: Path, fields: dict[str, Any]) -> Path:
    """`fields` as a configuration file; checked on the way. JSON is YAML."""
    path.write_text(json.dumps(TrainConfig(**fields).to_dict()))
    return path


def figures(run: Path) -> list[dict[str, Any]]:
    """The records of a run without its timings."""
    return [
        {name: value for name, value in record.items() if "second" not in name}
        for record in read_metrics(run / "metrics.jsonl")
    ]
