"""The items task: next-item prediction on an interaction log, ranked against the whole catalogue.

Leave-one-out: a user's last item is for the final test, the one before it for validation in the
course of training, and what is left is trained on, the latest `sequence_length` items of each user.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from sce_lm import recsys
from sce_lm.recsys import metrics
from sce_lm.training.config import TrainConfig
from sce_lm.training.task import Task

DEPTH = 10
"""Length of the lists that are evaluated."""


class ItemsTask(Task):
    """Next-item prediction; figures are those of `recsys.evaluate_items` with seen items masked."""

    headline = (f"ndcg@{DEPTH}", f"hr@{DEPTH}")
    separate_test = True

    def __init__(
        self, log: pl.LazyFrame, tokenizer: PreTrainedTokenizerBase | None, config: TrainConfig
    ):
        """Take the log of `recsys.read_interactions`, and a tokenizer if the items have one already
        (else one is made from the catalogue)."""
        self.tokenizer = tokenizer or recsys.build_item_tokenizer(recsys.catalogue(log))
        self.config = config
        sequences = recsys.user_sequences(log, self.tokenizer)
        self.split = recsys.leave_one_out(sequences)
        self.train = recsys.training_dataset(self.split.train, config.sequence_length)
        self.num_rows = len(self.train)
        if self.split.test.is_empty():
            raise ValueError(
                f"None of the {len(sequences)} users has 3 events; leave-one-out takes one to "
                "train on, one for validation and one for the test; give a longer log."
            )
        self.collate = DataCollatorForSeq2Seq(self.tokenizer)

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return dict(self.collate([self.train[row] for row in rows]))

    def evaluate(
        self, model: PreTrainedModel, accelerator: Accelerator, *, final: bool
    ) -> dict[str, float]:
        """NDCG, HR, MRR and coverage at 10 over the whole catalogue, seen items masked.

        Where `eval_users` bounds the evaluation, a random sample of users is taken, the same each
        time; coverage is then that of their lists.
        """
        frame = self._evaluated_users(final)
        share = frame[accelerator.process_index :: accelerator.num_processes]
        items = recsys.item_tokens(self.tokenizer)
        ranks = torch.empty(0, dtype=torch.int64)
        best_positions = torch.full((len(items),), DEPTH + 1)
        if len(share):
            ranking = self._rank(model, share)
            ranks, best_positions = ranking.ranks, ranking.best_positions
        ranks = torch.tensor(gather_object(ranks.tolist()))
        together = accelerator.gather(best_positions[None].to(accelerator.device))
        assert isinstance(together, torch.Tensor)
        return _figures(ranks, together.amin(0).cpu())

    def baselines(self) -> dict[str, dict[str, float]]:
        """Popularity, counted over all but the test items, on the users of the final evaluation."""
        past = self.split.test["history"].to_list()
        scorer = recsys.popularity_scorer(past, recsys.item_tokens(self.tokenizer))
        ranking = self._rank(scorer, self._evaluated_users(final=True))
        return {"popularity": _figures(ranking.ranks, ranking.best_positions)}

    def _evaluated_users(self, final: bool) -> pl.DataFrame:
        frame = self.split.test if final else self.split.validation
        if self.config.eval_users and self.config.eval_users < len(frame):
            generator = np.random.default_rng(self.config.seed)
            sample = generator.choice(len(frame), self.config.eval_users, replace=False)
            frame = frame[np.sort(sample)]
        return frame

    def _rank(self, model: nn.Module | recsys.Scorer, frame: pl.DataFrame) -> recsys.ItemRanking:
        return recsys.rank_items(
            model,
            frame["history"].to_list(),
            frame["target"].to_list(),
            items=recsys.item_tokens(self.tokenizer),
            depth=DEPTH,
            max_length=self.config.sequence_length,
        )


def _figures(ranks: torch.Tensor, best_positions: torch.Tensor) -> dict[str, float]:
    return {
        f"ndcg@{DEPTH}": metrics.ndcg(ranks, DEPTH),
        f"hr@{DEPTH}": metrics.hit_rate(ranks, DEPTH),
        f"mrr@{DEPTH}": metrics.mrr(ranks, DEPTH),
        f"coverage@{DEPTH}": metrics.coverage(best_positions, DEPTH),
    }
