"""A trained recommender for use: of a run, or of any saved folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sce_lm.files import read_json
from sce_lm.training.models import load_model, load_tokenizer
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.stored_data import read_split, stored


def load_recommender(
    path: Path,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Model, on the GPU if there is one, tokenizer, and what the run was asked for ({} if the
    folder is no run's).

    Raises:
        ValueError: the folder holds no model that can be loaded, or one that reads no histories.
    """
    run = RunFolder(path)
    folder, trained_with = path, {}
    if run.model.is_dir():
        folder, trained_with = run.model, read_json(run.config)
    if not RunFolder(folder).config.exists():
        raise ValueError(
            f"{path} holds no model; give the folder of a finished run, or one written by "
            "save_pretrained."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, device_map=device).eval()
    if hasattr(model.config, "num_users"):
        raise ValueError(
            f"{path} holds a two_tower model, which knows users by number and reads no histories; "
            "use recsys.evaluate_pairs, or train a model of histories, such as sasrec."
        )
    return model, load_tokenizer(folder), trained_with


def asked_histories(path: Path, number: int) -> pl.Series | None:
    """So many histories (tokens) of a run's test questions, drawn with a fixed seed; None if the
    folder is no run's, or its data are gone."""
    run = RunFolder(path)
    if not run.stored_data.is_dir():
        return None
    with stored(run) as folder:
        histories = read_split(folder).test["history"]
    return histories.sample(min(number, len(histories)), seed=0)
