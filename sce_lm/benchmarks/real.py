"""Problems of a model: its hidden states on a text, or on the data that it was trained on."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sce_lm import objectives
from sce_lm.benchmarks.loss_cost import save_inputs
from sce_lm.benchmarks.problem import Problem
from sce_lm.hf.adapter import apply_sce, lazy_logits
from sce_lm.training import models
from sce_lm.training.embedded.text import embedded_text
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.task import on_device
from sce_lm.training.task_sources import resume_task
from sce_lm.training.train_config import TrainConfig

ROW_LENGTH = 512
"""Tokens of a sequence of text, the one that starts it included."""

Batch = dict[str, torch.Tensor]
"""A model's inputs, with labels that are shifted by the model."""


def real_problem(
    folder: Path,
    source: Path,
    positions: int,
    dtype: str,
    *,
    gguf: str | None = None,
    text: Path | None = None,
    initial: bool = False,
    device: str = "cpu",
) -> Problem:
    """What enters the head of a model.

    Args:
        folder: where the problem goes.
        source: a run of sce-lm train, or a folder with a model of transformers.
        positions: labels wanted; the state has counted those of as many sequences as that at most.
        dtype: of the model.
        gguf: name of a GGUF file in ``source`` that holds the model.
        text: a text file. None: a run's own training data; for other models the embedded text.
        initial: the same model with fresh weights.

    Raises:
        ValueError: there is no model or tokenizer, its tokens are no text, a run's data have
            changed, or there are fewer labels than ``positions``.
    """
    run = RunFolder(source)
    is_run = run.model.is_dir()
    path = run.model if is_run else source
    config = run.fields() if is_run else {}
    if text is not None and config.get("task") == "items":
        raise ValueError(
            f"{source} is a recommender, whose tokens are items, and --text gives it a text; leave "
            "--text out, and its own training data are taken."
        )
    model = load_model(path, dtype, gguf)
    if initial:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model.config, dtype=getattr(torch, dtype))
    if is_run and text is None:
        task = resume_task(TrainConfig(**config), run)[0]
        batch_of, count = task.batch, task.num_rows
    else:
        ids = text_sequences(model, load_tokenizer(path, gguf), text)
        batch_of, count = (lambda i: {"input_ids": ids[i], "labels": ids[i]}), len(ids)
    batch, past = _take(batch_of, count, positions)
    apply_sce(model.to(device), objectives.get("exact"))
    title = source.name + " at initialisation" * initial
    problem = problem_of_batch(model, batch, folder, title, past)
    del model
    gc.collect()  # nothing of it stays beside what is measured
    torch.cuda.empty_cache()
    return problem


def problem_of_batch(
    model: PreTrainedModel,
    batch: Batch,
    folder: Path,
    title: str,
    past: torch.Tensor | None = None,
) -> Problem:
    """Write what enters the head for one batch of causal language modelling.

    Args:
        model: patched by ``apply_sce``; its transform of the logits must be a LogitTransform.
        folder: where the problem goes.
        past: labels that the state has counted; None: it has counted none.
    """
    inputs = on_device(batch, model.device)
    labels = inputs.pop("labels")[:, 1:]
    model.eval()
    with torch.no_grad(), lazy_logits(model):
        hidden_states, head = model(**inputs, use_cache=False).logits.parts()
    columns = [part for part in (head.weight, head.low_rank) if part is not None]
    weight = torch.cat(columns, dim=1) if len(columns) > 1 else head.weight
    valid = labels != -100
    tensors = {
        "hidden_states": hidden_states[:, :-1][valid],
        "weight": weight.detach(),
        "labels": labels[valid],
    }
    if head.bias is not None:
        tensors["bias"] = head.bias.detach()
    save_inputs(folder / "inputs.safetensors", tensors, head.post)
    return Problem.of(folder, title, labels.new_empty(0) if past is None else past)


def load_model(path: Path, dtype: str, gguf: str | None) -> Any:
    """The model of a folder, or of a GGUF file in it; ValueError if there is none."""
    if not (path / (gguf or "config.json")).is_file():
        raise ValueError(
            f"{path} has no {gguf or 'config.json'}; expected the folder of a finished run of "
            "sce-lm train, or one written by save_pretrained; check the path."
        )
    return models.load_model(path, dtype=dtype, **_file(gguf))


def load_tokenizer(path: Path, gguf: str | None) -> Any:
    """The tokenizer beside :func:`load_model`'s model; ValueError if there is none."""
    return models.load_tokenizer(path, **_file(gguf))


def _file(gguf: str | None) -> dict[str, Any]:
    return {"gguf_file": gguf} if gguf else {}


def _take(
    batch_of: Callable[[Sequence[int]], Batch], count: int, positions: int
) -> tuple[Batch, torch.Tensor]:
    """A batch of random sequences with exactly ``positions`` labels, and the labels of others."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    batch = batch_of(order[:positions])
    is_label = batch["labels"][:, 1:] != -100
    reached = is_label.sum(dim=1).cumsum(0)
    if not count or reached[-1] < positions:
        raise ValueError(
            f"the data have {int(is_label.sum()):,} labels and {positions:,} positions were asked "
            "for; give more text by --text, or fewer --tokens."
        )
    used = int((reached < positions).sum()) + 1
    past = batch["labels"][used:, 1:][is_label[used:]]
    batch = {name: tensor[:used].clone() for name, tensor in batch.items()}
    surplus = is_label[:used].nonzero()[positions:]
    batch["labels"][surplus[:, 0], surplus[:, 1] + 1] = -100
    return batch, past


def _read_text(path: Path | None) -> str:
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is no UTF-8 text (byte {error.start}: {error.reason}); give a text file."
            ) from None
    found = embedded_text(Path(TrainConfig.cache_dir).expanduser())
    with found.heldout.open(encoding="utf-8") as lines:
        return "\n\n".join(json.loads(line)["text"] for line in lines)


def text_sequences(model: Any, tokenizer: Any, path: Path | None) -> torch.Tensor:
    """Blocks of a text, int64 ``[sequences, length]``, each behind the token that starts a text.

    Args:
        path: of the text; None: the embedded text's held-out part.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", ROW_LENGTH)
    ids = torch.tensor(
        tokenizer(_read_text(path), add_special_tokens=False, verbose=False).input_ids
    )
    if tokenizer.unk_token_id is not None and (ids == tokenizer.unk_token_id).all():
        raise ValueError(
            f"{tokenizer.name_or_path} has a tokenizer that knows no word of the text, such as a "
            "recommender's; give the folder of its run, whose training data are then taken, or a "
            "text that it knows by --text."
        )
    start = ids.new_tensor([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id])
    own = min(limit, ROW_LENGTH) - len(start)
    blocks = ids[: len(ids) // own * own].view(-1, own).long()
    return torch.cat([start.long().expand(len(blocks), -1), blocks], dim=1)
