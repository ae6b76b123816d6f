"""The items task: next-item prediction on an interaction log, ranked against the whole catalogue.

The log is filtered, split and tokenised as the configuration says, once: the run keeps the split.
What is left for training is trained on, the latest `sequence_length` items of each user, several
users to a row; validation questions are asked in the course of training, and test questions at the
end.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sce_lm import recsys
from sce_lm.files import read_json
from sce_lm.recsys.events import Duplicates, read_events
from sce_lm.recsys.histories import TrainingHistories, can_pack, training_rows
from sce_lm.recsys.metrics import novelty, popularity_profile
from sce_lm.training.fingerprint import Fingerprint, of_log
from sce_lm.training.models import load_tokenizer
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.stored_data import read_source, read_split, stored, write_split
from sce_lm.training.task import HeldOut, Task
from sce_lm.training.train_config import TrainConfig


def read_sequences(
    log: pl.LazyFrame,
    tokenizer: PreTrainedTokenizerBase | None,
    config: TrainConfig,
    duplicates: Duplicates,
) -> tuple[pl.DataFrame, PreTrainedTokenizerBase, dict[str, Fingerprint]]:
    """Each user's items in a log that is filtered as configured, the tokenizer (made of the
    catalogue, if None is given), and what the log was."""
    events = read_events(log)
    source = {"data": of_log(events)}
    events = recsys.filter_interactions(
        events,
        duplicates=duplicates,
        min_user_events=config.min_user_events,
        min_item_events=config.min_item_events,
        iterate=config.iterate_filters,
    )
    tokenizer = tokenizer or recsys.build_item_tokenizer(recsys.catalogue(events))
    recsys.check_list_lengths(config.eval_k, recsys.item_tokens(tokenizer))
    return recsys.user_sequences(events, tokenizer), tokenizer, source


class ItemsTask(Task):
    """Next-item prediction; figures are those of `recsys.evaluate_items`."""

    higher_is_better = True
    separate_test = True

    def __init__(
        self,
        split: recsys.Split,
        tokenizer: PreTrainedTokenizerBase,
        description: dict[str, Any],
        source: dict[str, Fingerprint],
        config: TrainConfig,
    ):
        """A split and the tokenizer of its items, with the description and source of its log."""
        self.config = config
        self.split = split
        self.tokenizer = tokenizer
        self.source = source
        self._description = description
        self.items = recsys.item_tokens(tokenizer)
        recsys.check_list_lengths(config.eval_k, self.items)
        self.train = TrainingHistories(training_rows(split.train, config.sequence_length))
        self.num_rows = len(self.train)
        first = config.eval_k[0]
        self.headline = (f"ndcg@{first}", f"hr@{first}")

    @classmethod
    def of_log(
        cls, log: pl.LazyFrame, tokenizer: PreTrainedTokenizerBase | None, config: TrainConfig
    ) -> "ItemsTask":
        """Take the log of `recsys.read_interactions`, and a tokenizer if the items have one already
        (else one is made from the catalogue)."""
        sequences, tokenizer, source = read_sequences(log, tokenizer, config, config.duplicates)
        split = _split(sequences, config)
        recsys.count_items(tokenizer, split.train)
        description = {
            **recsys.statistics(sequences),
            "catalogue": len(recsys.item_tokens(tokenizer)),
            **split.summary(),
        }
        return cls(split, tokenizer, description, source, config)

    @classmethod
    def stored(cls, run: RunFolder, config: TrainConfig) -> "ItemsTask":
        """The task of a run as it was when the run began, from its folder alone."""
        with stored(run) as folder:
            split = read_split(folder)
            tokenizer = load_tokenizer(str(folder / "tokenizer"))
            description = read_json(run.data)
        return cls(split, tokenizer, description, read_source(run), config)

    def store(self, folder: Path) -> None:
        write_split(self.split, folder)

    def describe(self) -> dict[str, Any]:
        return self._description

    def check_model(self, model: PreTrainedModel) -> None:
        if self.config.packing and not can_pack(model):
            raise ValueError(
                f"A {model.config.model_type} model does not keep histories in one row apart by "
                "their position_ids; set packing to false."
            )

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return self._inputs(self.train, rows)

    def _inputs(self, histories: TrainingHistories, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return histories.packed(rows) if self.config.packing else histories.padded(rows)

    def validation_batch(self) -> dict[str, torch.Tensor]:
        """Validation items behind their histories."""
        frame = self.split.validation.head(self.config.per_device_batch_size)
        items = frame.select(items=pl.col("history").list.concat(pl.concat_list("target")))
        rows = TrainingHistories(training_rows(items, self.config.sequence_length))
        return self._inputs(rows, range(len(rows)))

    def evaluate(
        self, model: PreTrainedModel, accelerator: Accelerator, on: HeldOut
    ) -> dict[str, Any]:
        """The report of `recsys.ranking_report`: NDCG, HR, MRR and coverage at each of `eval_k`,
        over the whole catalogue; with the list entries by popularity.

        Where `eval_users` bounds the evaluation, a random sample of questions is taken, the same
        each time; coverage is then that of their lists.
        """
        return self._report(model, on)

    def baselines(self, on: HeldOut = "test") -> dict[str, dict[str, Any]]:
        """Popularity, the first-order Markov chain and item-kNN, counted over what is trained on
        and, for the test, the validation items; and popularity in the last days before a cut in
        time."""
        past = self.split.before_test() if on == "test" else self.split.train["items"]
        scorers = {"popularity": recsys.popularity_scorer(past, self.items)}
        for days in self.config.popularity_days if "times" in self.split.train.columns else ():
            recent = recsys.of_last_days(self.split.train, days)
            if recent is not None:
                name = f"popularity, last {days} days"
                scorers[name] = recsys.popularity_scorer(recent, self.items)
        scorers["Markov chain"] = recsys.markov_scorer(past, self.items)
        scorers["item-kNN"] = recsys.item_knn_scorer(past, self.items)
        return {name: self._report(scorer, on) for name, scorer in scorers.items()}

    def _report(self, model: nn.Module | recsys.Scorer, on: HeldOut) -> dict[str, Any]:
        ranking, report = rank_questions(
            model, self._questions(on), self.items, self.split.protocol, self.config
        )
        counts = torch.bincount(torch.from_numpy(self.train.tokens), minlength=self.items.stop)
        counts = counts[self.items.start :]
        return {
            **report,
            f"novelty@{max(self.config.eval_k)}": novelty(ranking.times_listed, counts),
            "list_entries_by_popularity": popularity_profile(ranking.times_listed, counts),
        }

    def _questions(self, on: HeldOut) -> pl.DataFrame:
        frame = self.split.test if on == "test" else self.split.validation
        if self.config.eval_users and self.config.eval_users < len(frame):
            generator = np.random.default_rng(self.config.seed)
            sample = generator.choice(len(frame), self.config.eval_users, replace=False)
            frame = frame[np.sort(sample)]
        return frame


def rank_questions(
    model: nn.Module | recsys.Scorer,
    questions: pl.DataFrame,
    items: range,
    protocol: str,
    config: TrainConfig,
) -> tuple[recsys.ItemRanking, dict[str, Any]]:
    """The ranking of the items that are asked for, and its report; each process ranks its share,
    and all get those of everybody.

    Args:
        model: a model of item tokens, or a baseline.
        questions: `history` and `target`, as in `recsys.Split`.
        items: tokens that are ranked.
        protocol: what the questions are.
        config: `eval_k`, `mask_seen` and `sequence_length`.
    """
    processes = PartialState()
    share = questions[processes.process_index :: processes.num_processes]
    parts = []
    if len(share):
        parts.append(
            recsys.rank_items(
                model,
                share["history"],
                share["target"],
                items=items,
                depth=max(config.eval_k),
                mask_seen=config.mask_seen,
                max_length=config.sequence_length,
            )
        )
    ranking = recsys.ItemRanking.merged(gather_object(parts))
    report = recsys.ranking_report(
        ranking,
        k=config.eval_k,
        split=protocol,
        mask_seen=config.mask_seen,
        max_length=config.sequence_length if isinstance(model, nn.Module) else None,
    )
    return ranking, report


def _split(sequences: pl.DataFrame, config: TrainConfig) -> recsys.Split:
    if config.split == "temporal":
        return recsys.temporal_split(
            sequences,
            config.split_quantile if config.split_time is None else config.split_time,
            past=config.split_past,
            cold_items=config.split_cold_items,
        )
    return recsys.last_n(sequences, config.split_n if config.split == "last_n" else 1)
