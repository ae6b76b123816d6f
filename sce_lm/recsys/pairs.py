"""Pairs of user and item without order: a random split of each user's items, and its evaluation.

The protocol of collaborative filtering: some of a user's items are trained on and all others are
asked for at once, in one list a user from which the items of training are left out.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from sce_lm.recsys import metrics
from sce_lm.recsys.evaluation import check_list_lengths
from sce_lm.recsys.scoring import Scorer, as_tokens, model_scorer, seen_items, top_items
from sce_lm.recsys.sequences import as_lists


def random_split(sequences: pl.DataFrame, share: float = 0.2, *, seed: int = 0) -> pl.DataFrame:
    """Hold out a random share of each user's items, rounded to the nearest number.

    Args:
        sequences: as from ``user_sequences``, each item once a user.
        share: of a user's items, between 0 and 1.

    Returns:
        A row a user: ``user``, ``train`` and ``test`` (lists of tokens; that of a user with few
        items may be empty).

    Raises:
        ValueError: a share out of range, or no user has enough items.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; hold out a share between 0 and 1.")
    lengths = sequences["items"].list.len().to_numpy().astype(np.int64)
    held_out = lengths - np.rint((1 - share) * lengths).astype(np.int64)
    if not held_out.any():
        raise ValueError(
            f"No user has so many items that a share of {share:g} rounds to one or more; give a "
            "longer log, or hold out more."
        )
    user = np.repeat(np.arange(len(lengths)), lengths)
    noise = np.random.default_rng(seed).random(len(user))
    shuffled = sequences["items"].explode().to_numpy()[np.lexsort((noise, user))]
    place = np.arange(len(user)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    asked = place < held_out[user]
    return sequences.select("user").with_columns(
        train=as_lists(pl.Series(shuffled[~asked]), lengths - held_out),
        test=as_lists(pl.Series(shuffled[asked]), held_out),
    )


@dataclass(frozen=True)
class PairHits:
    """What the metrics are made from."""

    hits: Tensor
    """bool [users asked, depth]: whether each entry of a list is in the user's test, best first."""
    relevant: Tensor
    """int64 [users asked], items of the test."""
    best_positions: Tensor
    """int64 [items], an item's best place in any list; depth + 1 where it is in none."""


@torch.no_grad()
def pair_hits(
    model: nn.Module | Scorer,
    split: pl.DataFrame,
    *,
    items: range,
    depth: int,
    mask_seen: bool = True,
    batch_size: int = 256,
) -> PairHits:
    """The lists of the users who have something to be asked for; arguments as of
    :func:`evaluate_pairs`."""
    asked = np.flatnonzero(split["test"].list.len().to_numpy())
    train, test = split["train"], split["test"]
    best_positions = torch.full((len(items),), depth + 1)
    hits, relevant = [], torch.from_numpy(test.list.len().to_numpy()[asked].astype(np.int64))
    scoring = model_scorer(model) if isinstance(model, nn.Module) else nullcontext(model)
    with scoring as scorer:
        for users in np.array_split(asked, range(batch_size, len(asked), batch_size)):
            seen = seen_items([as_tokens(train[int(user)]) for user in users])
            scores = scorer(list(users[:, None]))
            top = top_items(scores, items, depth, masked=seen if mask_seen else None)[1].cpu()
            listed = torch.where(top >= 0, top - items.start, -1)
            metrics.update_best_positions(best_positions, listed)
            wanted = torch.zeros(len(users), items.stop, dtype=torch.bool)
            wanted[seen_items([as_tokens(test[int(user)]) for user in users])] = True
            hits.append(wanted.gather(1, top.clamp(min=0)) & (top >= 0))
    return PairHits(torch.cat(hits), relevant, best_positions)


def evaluate_pairs(
    model: nn.Module | Scorer,
    split: pl.DataFrame,
    *,
    items: range,
    k: Sequence[int] = (10, 20, 50),
    mask_seen: bool = True,
    batch_size: int = 256,
) -> dict[str, float]:
    """``"ndcg@k"``, ``"recall@k"`` and ``"coverage@k"`` over the whole catalogue, means over the
    users who have something to be asked for.

    Args:
        model: a two-tower model whose users are the rows of the split, or a baseline.
        split: of :func:`random_split`.
        items: tokens that are ranked.
        k: list lengths.
        mask_seen: leave the items of training out of the lists.
        batch_size: users at a time.
    """
    check_list_lengths(k, items)
    found = pair_hits(
        model, split, items=items, depth=max(k), mask_seen=mask_seen, batch_size=batch_size
    )
    report = {}
    for length in k:
        report[f"ndcg@{length}"] = metrics.set_ndcg(found.hits, found.relevant, length)
        report[f"recall@{length}"] = metrics.set_recall(found.hits, found.relevant, length)
        report[f"coverage@{length}"] = metrics.coverage(found.best_positions, length)
    return report
