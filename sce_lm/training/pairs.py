"""The items task on pairs without order: a two-tower model on a random split of a user's items."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sce_lm import recsys
from sce_lm.files import read_json
from sce_lm.recsys.histories import IGNORE
from sce_lm.training.fingerprint import Fingerprint
from sce_lm.training.items import read_sequences
from sce_lm.training.models import load_tokenizer
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.stored_data import read_source, stored
from sce_lm.training.task import HeldOut, Task
from sce_lm.training.train_config import TrainConfig


class PairsTask(Task):
    """A user's items, each pair a row; figures are those of `recsys.evaluate_pairs`.

    Nothing is held out for validation: what is asked in the course of training is the test.
    """

    higher_is_better = True
    separate_test = False

    def __init__(
        self,
        split: pl.DataFrame,
        tokenizer: PreTrainedTokenizerBase,
        description: dict[str, Any],
        source: dict[str, Fingerprint],
        config: TrainConfig,
    ):
        """A split of `recsys.random_split` and the tokenizer of its items."""
        self.config, self.split, self.tokenizer = config, split, tokenizer
        self.source, self._description = source, description
        self.items = recsys.item_tokens(tokenizer)
        recsys.check_list_lengths(config.eval_k, self.items)
        self.users, self.tokens = _pairs(split["train"])
        self.num_rows = len(self.tokens)
        first = config.eval_k[0]
        self.headline = (f"ndcg@{first}", f"recall@{first}")

    @classmethod
    def of_log(
        cls, log: pl.LazyFrame, tokenizer: PreTrainedTokenizerBase | None, config: TrainConfig
    ) -> "PairsTask":
        """Take a log as `ItemsTask.of_log` does; of equal pairs the first is kept."""
        sequences, tokenizer, source = read_sequences(log, tokenizer, config, "first")
        split = recsys.random_split(sequences, seed=config.seed)
        recsys.count_items(tokenizer, split.select("user", items="train"))
        description = {
            **recsys.statistics(sequences),
            "catalogue": len(recsys.item_tokens(tokenizer)),
            "protocol": f"a random fifth of each user's items is asked for, seed {config.seed}",
            "training_events": int(split["train"].list.len().sum()),
            "test_events": int(split["test"].list.len().sum()),
        }
        return cls(split, tokenizer, description, source, config)

    @classmethod
    def stored(cls, run: RunFolder, config: TrainConfig) -> "PairsTask":
        """The task of a run as it was when the run began, from its folder alone."""
        with stored(run) as folder:
            split = pl.read_parquet(folder / "pairs.parquet")
            tokenizer = load_tokenizer(str(folder / "tokenizer"))
            description = read_json(run.data)
        return cls(split, tokenizer, description, read_source(run), config)

    def store(self, folder: Path) -> None:
        self.split.write_parquet(folder / "pairs.parquet")

    def describe(self) -> dict[str, Any]:
        return self._description

    def model_fields(self) -> dict[str, Any]:
        return {"num_users": len(self.split)}

    def check_model(self, model: PreTrainedModel) -> None:
        users = getattr(model.config, "num_users", 0)
        if users != len(self.split):
            raise ValueError(
                f"The split is random and has {len(self.split)} users, and the model {users} "
                "(a model of histories has none); start from a two_tower model of these users, or "
                "choose another split."
            )

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """A pair a row: its user twice, and its item as the second label."""
        chosen = np.asarray(rows)
        return _inputs(self.users[chosen], self.tokens[chosen])

    def validation_batch(self) -> dict[str, torch.Tensor]:
        return self.held_out(self.config.per_device_batch_size)

    def held_out(self, number: int) -> dict[str, torch.Tensor]:
        """As `batch`, of so many test pairs, always the same."""
        users, tokens = _pairs(self.split["test"])
        some = np.random.default_rng(0).permutation(len(users))[:number]
        return _inputs(users[some], tokens[some])

    def evaluate(
        self, model: PreTrainedModel, accelerator: Accelerator, on: HeldOut
    ) -> dict[str, Any]:
        return self._report(model)

    def baselines(self, on: HeldOut = "test") -> dict[str, dict[str, Any]]:
        """Popularity in training."""
        trained = self.split.filter(pl.col("train").list.len() > 0)["train"]
        return {"popularity": self._report(recsys.popularity_scorer(trained, self.items))}

    def _report(self, model: nn.Module | recsys.Scorer) -> dict[str, Any]:
        return recsys.evaluate_pairs(
            model,
            self.split,
            items=self.items,
            k=self.config.eval_k,
            mask_seen=self.config.mask_seen,
        )


def _pairs(rows: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Users (numbers) and items (tokens) of lists a user."""
    users = np.repeat(np.arange(len(rows)), rows.list.len().to_numpy())
    return users, rows.explode().drop_nulls().to_numpy().astype(np.int64)


def _inputs(users: np.ndarray, tokens: np.ndarray) -> dict[str, torch.Tensor]:
    labels = np.stack((np.full_like(tokens, IGNORE), tokens), 1)
    input_ids = np.stack((users, users), 1)
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
