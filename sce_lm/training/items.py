"""The items task: next-item prediction on an interaction log, ranked against the whole catalogue.

The log is filtered, split and tokenised as the configuration says. What is left for training is
trained on, the latest `sequence_length` items of each user, several users to a row; validation
questions are asked in the course of training, and test questions at the end.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sce_lm import recsys
from sce_lm.recsys.histories import TrainingHistories, can_pack, training_rows
from sce_lm.recsys.metrics import popularity_profile
from sce_lm.training.config import TrainConfig
from sce_lm.training.task import Task


class ItemsTask(Task):
    """Next-item prediction; figures are those of `recsys.evaluate_items`."""

    higher_is_better = True
    separate_test = True

    def __init__(
        self, log: pl.LazyFrame, tokenizer: PreTrainedTokenizerBase | None, config: TrainConfig
    ):
        """Take the log of `recsys.read_interactions`, and a tokenizer if the items have one already
        (else one is made from the catalogue)."""
        self.config = config
        log = recsys.filter_interactions(
            log,
            duplicates=config.duplicates,
            min_user_events=config.min_user_events,
            min_item_events=config.min_item_events,
            iterate=config.iterate_filters,
        )
        self.tokenizer = tokenizer or recsys.build_item_tokenizer(recsys.catalogue(log))
        self.items = recsys.item_tokens(self.tokenizer)
        recsys.check_list_lengths(config.eval_k, self.items)
        sequences = recsys.user_sequences(log, self.tokenizer)
        self.split = _split(sequences, config)
        recsys.count_items(self.tokenizer, self.split.train)
        self._description = {
            **recsys.statistics(sequences),
            "catalogue": len(self.items),
            **self.split.summary(),
        }
        self.train = TrainingHistories(training_rows(self.split.train, config.sequence_length))
        self.num_rows = len(self.train)
        first = config.eval_k[0]
        self.headline = (f"ndcg@{first}", f"hr@{first}")

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

    def held_out_batch(self) -> dict[str, torch.Tensor]:
        """Validation items behind their histories."""
        frame = self.split.validation.head(self.config.per_device_batch_size)
        items = frame.select(items=pl.col("history").list.concat(pl.concat_list("target")))
        rows = TrainingHistories(training_rows(items, self.config.sequence_length))
        return self._inputs(rows, range(len(rows)))

    def evaluate(
        self, model: PreTrainedModel, accelerator: Accelerator, *, final: bool
    ) -> dict[str, Any]:
        """NDCG, HR, MRR and coverage at each of `eval_k`, over the whole catalogue; a final
        evaluation is the report of `recsys.ranking_report`, with the list entries by popularity.

        Where `eval_users` bounds the evaluation, a random sample of questions is taken, the same
        each time; coverage is then that of their lists.
        """
        report = self._report(model, final)
        return report if final else {k: v for k, v in report.items() if "@" in k}

    def baselines(self) -> dict[str, dict[str, Any]]:
        """Popularity and the first-order Markov chain, counted over all that precedes the test."""
        past = self.split.before_test()
        scorers = {
            "popularity": recsys.popularity_scorer(past, self.items),
            "Markov chain": recsys.markov_scorer(past, self.items),
        }
        return {name: self._report(scorer, final=True) for name, scorer in scorers.items()}

    def _report(self, model: nn.Module | recsys.Scorer, final: bool) -> dict[str, Any]:
        frame = self._questions(final)
        ranking = self._rank(model, frame)
        report = recsys.ranking_report(
            ranking,
            k=self.config.eval_k,
            split=self.split.protocol,
            mask_seen=self.config.mask_seen,
            max_length=self.config.sequence_length if isinstance(model, nn.Module) else None,
        )
        counts = np.bincount(self.train.tokens, minlength=self.items.stop)[self.items.start :]
        return {
            **report,
            "list_entries_by_popularity": popularity_profile(
                ranking.times_listed, torch.from_numpy(counts)
            ),
        }

    def _questions(self, final: bool) -> pl.DataFrame:
        frame = self.split.test if final else self.split.validation
        if self.config.eval_users and self.config.eval_users < len(frame):
            generator = np.random.default_rng(self.config.seed)
            sample = generator.choice(len(frame), self.config.eval_users, replace=False)
            frame = frame[np.sort(sample)]
        return frame

    def _rank(self, model: nn.Module | recsys.Scorer, frame: pl.DataFrame) -> recsys.ItemRanking:
        """Each process ranks its share, and all get the ranking of everybody."""
        processes = PartialState()
        share = frame[processes.process_index :: processes.num_processes]
        parts = []
        if len(share):
            parts.append(
                recsys.rank_items(
                    model,
                    share["history"],
                    share["target"],
                    items=self.items,
                    depth=max(self.config.eval_k),
                    mask_seen=self.config.mask_seen,
                    max_length=self.config.sequence_length,
                )
            )
        return recsys.ItemRanking.merged(gather_object(parts))


def _split(sequences: pl.DataFrame, config: TrainConfig) -> recsys.Split:
    if config.split == "temporal":
        return recsys.temporal_split(
            sequences,
            config.split_quantile if config.split_time is None else config.split_time,
            past=config.split_past,
            cold_items=config.split_cold_items,
        )
    return recsys.last_n(sequences, config.split_n if config.split == "last_n" else 1)
