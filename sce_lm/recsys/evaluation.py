"""Next-item evaluation on the whole catalogue, exact and streamed (`sce_lm.recsys.scoring`).

A user's rank is the place of the target in the streamed top-k list: no metric at k tells ranks
beyond k apart, and no score is computed twice, so that rounding cannot decide between equal scores.
What grows with the number of users is their ranks, 8 bytes each, and nothing else.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sce_lm.recsys import metrics
from sce_lm.recsys.scoring import (
    Histories,
    Scorer,
    as_tokens,
    model_scorer,
    num_positions,
    seen_items,
    top_items,
)


@dataclass(frozen=True)
class ItemRanking:
    """What the metrics are made from."""

    ranks: Tensor
    """int64 [users], the target's 1-based rank; depth + 1 where it is not in the list."""
    best_positions: Tensor
    """int64 [items], an item's best 1-based position in any list; depth + 1 where it is in none."""
    times_listed: Tensor
    """int64 [items], the lists that hold an item, among the first ``depth``."""
    unrankable_targets: int = 0
    """Targets outside the catalogue."""

    @staticmethod
    def merged(parts: Sequence["ItemRanking"]) -> "ItemRanking":
        """The ranking of all the users of ``parts``, over the same catalogue to the same depth."""
        return ItemRanking(
            torch.cat([part.ranks for part in parts]),
            torch.stack([part.best_positions for part in parts]).amin(0),
            torch.stack([part.times_listed for part in parts]).sum(0),
            sum(part.unrankable_targets for part in parts),
        )


def evaluate_items(
    model: nn.Module | Scorer,
    histories: Histories,
    targets: Sequence[int] | pl.Series,
    *,
    items: range,
    k: Sequence[int] = (10,),
    mask_seen: bool = True,
    max_length: int | None = None,
    batch_size: int = 256,
    tile_size: int = 16_384,
    split: str = "leave-one-out",
    counts: Tensor | None = None,
    progress: bool = False,
) -> dict:
    """Metrics at each k over the whole catalogue, and the protocol behind them.

    Args:
        model: any causal language model over item tokens, or a baseline such as
            :func:`~sce_lm.recsys.popularity_scorer`.
        histories: [users] token ids of each user's past, oldest first, at least one a user; lists,
            arrays, or the column of a polars frame.
        targets: [users] token id of the item that came next.
        items: tokens that are ranked, e.g. ``item_tokens(tokenizer)``; special tokens and padding
            rows stay outside.
        k: list lengths, each at most ``len(items)``.
        mask_seen: leave the items of a user's whole history out of the list (never the target,
            should it be one).
        max_length: the model reads only this many of the latest items; None: as many as it has
            positions.
        batch_size: users at a time.
        tile_size: tokens at a time; scores take ``batch_size * tile_size`` numbers.
        split: what histories and targets are, e.g. ``Split.protocol``; recorded in the protocol.
        counts: int [items], events of each item in training, such as :func:`item_counts` of the
            tokenizer as a tensor: the report then holds the novelty of the longest lists, too.
        progress: show a progress bar.

    Returns:
        JSON-ready, see :func:`ranking_report`.

    Raises:
        ValueError: no users, lengths that differ, an empty history, a k outside 1..items, or scores
            that are NaN.
    """
    check_list_lengths(k, items)
    ranking = rank_items(
        model,
        histories,
        targets,
        items=items,
        depth=max(k),
        mask_seen=mask_seen,
        max_length=max_length,
        batch_size=batch_size,
        tile_size=tile_size,
        progress=progress,
    )
    if max_length is None and isinstance(model, nn.Module):
        max_length = num_positions(model)
    report = ranking_report(ranking, k=k, split=split, mask_seen=mask_seen, max_length=max_length)
    if counts is not None:
        report[f"novelty@{max(k)}"] = metrics.novelty(ranking.times_listed, counts)
    return report


def ranking_report(
    ranking: ItemRanking,
    *,
    k: Sequence[int],
    split: str,
    mask_seen: bool = True,
    max_length: int | None = None,
) -> dict:
    """The figures of a ranking, which may have been merged from several, and their protocol.

    Args:
        ranking: with a depth of at least the largest k.
        k: list lengths.
        split, mask_seen, max_length: how the ranking was made; recorded.

    Returns:
        JSON-ready: ``"ndcg@10"``, ``"hr@10"``, ``"mrr@10"``, ``"precision@10"``, ``"recall@10"``,
        ``"map@10"``, ``"coverage@10"`` and so on for each k (with one relevant item a user recall
        is HR and MAP is MRR); ``"intervals"``, the 95 % bootstrap interval over users of all of
        these but coverage;
        ``"users"``, ``"items"``, ``"unrankable_targets"`` (targets outside the catalogue, for
        instance unknown items; each counts as a miss) and ``"protocol"``.
    """
    report: dict = {}
    intervals: dict[str, list[float]] = {}
    for length in k:
        for name, metric in metrics.RANK_METRICS.items():
            report[f"{name}@{length}"] = metric(ranking.ranks, length)
        report[f"coverage@{length}"] = metrics.coverage(ranking.best_positions, length)
        for name, interval in metrics.bootstrap_intervals(ranking.ranks, length).items():
            intervals[f"{name}@{length}"] = list(interval)
    return report | {
        "intervals": intervals,
        "users": len(ranking.ranks),
        "items": len(ranking.best_positions),
        "unrankable_targets": ranking.unrankable_targets,
        "protocol": {
            "split": split,
            "candidates": "whole catalogue",
            "seen_items": "masked, the target excepted" if mask_seen else "kept",
            "ties": metrics.TIE_RULE,
            "max_length": max_length,
            "intervals": metrics.INTERVAL_RULE,
        },
    }


def check_list_lengths(k: Sequence[int], items: range) -> None:
    """Raise ValueError unless every k is at least 1 and at most the size of the catalogue."""
    if not k or min(k) < 1 or max(k) > len(items):
        raise ValueError(
            f"k is {tuple(k)}, but a list from this catalogue has 1 to {len(items)} items; "
            "choose every k within."
        )


@torch.no_grad()
def rank_items(
    model: nn.Module | Scorer,
    histories: Histories,
    targets: Sequence[int] | pl.Series,
    *,
    items: range,
    depth: int,
    mask_seen: bool = True,
    max_length: int | None = None,
    batch_size: int = 256,
    tile_size: int = 16_384,
    progress: bool = False,
) -> ItemRanking:
    """Rank each target among the first ``depth`` items; arguments as of :func:`evaluate_items`.

    A process of several takes its share of the users and merges the rankings before the metrics.
    """
    lengths = np.fromiter(map(len, histories), dtype=np.int64, count=len(histories))
    if len(lengths) != len(targets) or not len(lengths):
        raise ValueError(
            f"There are {len(lengths)} histories and {len(targets)} targets; "
            "give one of each a user, for at least one user."
        )
    if not lengths.all():
        raise ValueError(
            f"The history of user {int(lengths.argmin())} is empty; give at least one item."
        )
    all_targets = torch.from_numpy(np.array(targets, dtype=np.int64))
    ranks = torch.full((len(lengths),), depth + 1)
    best_positions = torch.full((len(items),), depth + 1)
    times_listed = torch.zeros(len(items), dtype=torch.int64)
    # Users of like length share a batch, which saves padding; the longest come first, so that a
    # lack of memory shows at once.
    by_length = np.argsort(-lengths, kind="stable")
    batches = np.array_split(by_length, range(batch_size, len(lengths), batch_size))
    scoring = (
        model_scorer(model, max_length) if isinstance(model, nn.Module) else nullcontext(model)
    )
    with scoring as scorer:
        for users in tqdm(
            batches, desc="ranking items", delay=2, disable=not progress, leave=False
        ):
            batch = [as_tokens(histories[int(user)]) for user in users]
            target = all_targets[users]
            masked = None
            if mask_seen:
                rows, tokens = seen_items(batch)
                eligible = tokens != target[rows]
                masked = rows[eligible], tokens[eligible]
            _, top = top_items(scorer(batch), items, depth, masked=masked, tile_size=tile_size)
            top = top.cpu()
            user, position = (top == target[:, None]).nonzero(as_tuple=True)
            ranks[torch.from_numpy(users)[user]] = position + 1
            listed = torch.where(top >= 0, top - items.start, -1)
            metrics.update_best_positions(best_positions, listed)
            times_listed += torch.bincount(listed[listed >= 0], minlength=len(items))
    unrankable = (all_targets < items.start) | (all_targets >= items.stop)
    return ItemRanking(ranks, best_positions, times_listed, int(unrankable.sum()))
