"""What to recommend next for raw histories, new users included: lists over the whole catalogue.

    model, tokenizer = AutoModelForCausalLM.from_pretrained(f), AutoTokenizer.from_pretrained(f)
    found = recommend(model, tokenizer, [["B001", "B007"], ["B100"]], k=10)
    found.items[0], found.scores[0]

A list is the k best of all items by the model's own logits, equal scores in the order of the
catalogue; the catalogue is scored a tile at a time (`sce_lm.recsys.scoring`), or an approximate
index proposes what to score (`sce_lm.recsys.item_index`). Items that the
tokenizer does not know are skipped and counted. A user of whose history nothing is known gets the
most popular items, marked as such, where the tokenizer carries the counts of a training (that of a
run of sce-lm train does), and else an empty list.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sce_lm.recsys.ids import id_text
from sce_lm.recsys.item_index import ItemIndex
from sce_lm.recsys.scoring import (
    ScoreTile,
    encoded_scores,
    history_encoder,
    only_pairs,
    seen_items,
    top_items,
)
from sce_lm.recsys.tokenizer import item_counts, item_tokens

Source = Literal["model", "popularity", "none"]
"""What a list was made by; "none": it is empty."""


@dataclass(frozen=True)
class Recommendations:
    """Lists for some histories, in their order."""

    items: list[list[str]]
    """[users] item ids, best first; fewer than k where a user has fewer items left."""
    scores: list[list[float]]
    """[users] what the items were ordered by. A model's are its logits: they compare the items of
    one user, and neither users nor models; they are no probabilities. Those of a popularity list
    say how often the item occurs in the training data."""
    sources: list[Source]
    """[users] "model"; "popularity" where nothing is known of a user; "none" where there is no
    list, since nothing is known of the user and no popularity either, or no item is left."""
    unknown_items: int
    """Items of the histories that the tokenizer does not know; they were skipped."""
    users_without_history: int
    """Users of whose history nothing is known."""
    unknown_candidates: int
    """Ids of ``candidates`` that the tokenizer does not know, which can be in no list."""
    unknown_user_candidates: int
    """The same of ``user_candidates``."""
    unknown_excluded: int
    """Ids of ``exclude`` that the tokenizer does not know, which are in no list anyway."""


@torch.no_grad()
def recommend(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    histories: Any,
    k: int = 10,
    *,
    exclude_seen: bool = True,
    candidates: Iterable[object] | None = None,
    exclude: Iterable[object] = (),
    user_candidates: Any = None,
    trained_only: bool = False,
    max_length: int | None = None,
    index: ItemIndex | None = None,
    batch_size: int = 256,
    tile_size: int = 16_384,
    progress: bool = False,
) -> Recommendations:
    """The k best next items for each history.

    Args:
        model: any causal language model over item tokens.
        tokenizer: its item tokenizer.
        histories: [users] item ids as in the log (of any type, compared as text), oldest first:
            lists of lists, a pandas, polars or Arrow column of lists, or a table with such a column
            ``history``, as from :func:`~sce_lm.recsys.read_histories`.
        k: length of the lists, at most the number of items to choose from.
        exclude_seen: leave out the items of a user's whole history.
        candidates: the only items to choose from; None: the whole catalogue.
        exclude: items to recommend to nobody.
        user_candidates: [users] the only of these items to choose from for each user, lists of
            ids as ``histories`` are; None for a user whom nothing binds. They are scored whether
            there is an index or not.
        trained_only: leave out the items that do not occur in the training data, such as appended
            ones, whose place in a list may mean nothing.
        max_length: the model reads only this many of the latest items; None: as many as it has
            positions.
        index: proposes the items that are scored; lists may lack some of the best. None: all items
            are scored.
        batch_size: users at a time.
        tile_size: tokens scored at a time; scores take ``batch_size * tile_size`` numbers.
        progress: show a progress bar.

    Raises:
        TypeError: a history, ``candidates`` or ``exclude`` is no list.
        ValueError: ``k`` is below 1 or above the number of items to choose from, there are none to
            choose from, another number is below 1, a table has no column ``history``, the index is
            not of this model's items, or ``trained_only`` is asked for and the tokenizer does not
            carry the counts of a training.
    """
    sizes = {"max_length": max_length, "batch_size": batch_size, "tile_size": tile_size}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give a whole number of at least 1.")
    wanted, unknown_candidates = _known(tokenizer, "candidates", candidates)
    unwanted, unknown_excluded = _known(tokenizer, "exclude", exclude)
    catalogue = item_tokens(tokenizer)
    allowed = torch.zeros(catalogue.stop, dtype=torch.bool)
    allowed[catalogue.start :] = candidates is None
    allowed[wanted] = True
    allowed[unwanted] = False
    choice = int(allowed.sum())
    if not choice:
        raise ValueError(
            f"There are no items to choose from: {len(wanted)} candidates are in the catalogue, "
            f"{unknown_candidates} are not, and exclude takes away {len(unwanted)} items; give "
            "other candidates, or exclude fewer."
            if candidates is not None
            else "There are no items to choose from: exclude takes away the whole catalogue; "
            "exclude fewer."
        )
    if trained_only:
        allowed[catalogue.start :] &= _trained(tokenizer)
        choice = int(allowed.sum())
    if not 1 <= k <= choice:
        raise ValueError(
            f"k is {k}, but there are {choice} items to choose from; choose k from 1 to {choice}."
        )
    tokens, unknown = _encode(tokenizer, _as_lists(histories))
    own: list[np.ndarray | None] = [None] * len(tokens)
    unknown_own = 0
    if user_candidates is not None:
        given = list(_as_lists(user_candidates))
        if len(given) != len(tokens):
            raise ValueError(
                f"There are {len(given)} lists of user_candidates for {len(tokens)} histories; "
                "give one for each, or None."
            )
        encoded_lists, unknown_own = _encode(tokenizer, given)
        own = [None if raw is None else ids for raw, ids in zip(given, encoded_lists)]

    def best_of(score_tile: ScoreTile, users: list[int], **filters: Any) -> tuple:
        """The exact lists of some users, each of what may be listed for that user."""
        bound = [row for row, user in enumerate(users) if own[user] is not None]
        if not bound:
            return top_items(score_tile, catalogue, k, allowed=allowed, **filters)
        pairs = seen_items([ids for user in users if (ids := own[user]) is not None])
        rows = torch.tensor(bound)[pairs[0]]
        may = allowed
        if len(bound) == len(users):  # tiles without a candidate of anybody are not scored
            may = torch.zeros_like(allowed)
            may[pairs[1]] = allowed[pairs[1]]
        if not may.any():
            return torch.full((len(users), k), -torch.inf), torch.full((len(users), k), -1)
        score_own = only_pairs(score_tile, torch.tensor(bound), rows, pairs[1])
        return top_items(score_own, catalogue, k, allowed=may, **filters)

    items: list[list[str]] = [[] for _ in tokens]
    scores: list[list[float]] = [[] for _ in tokens]
    sources: list[Source] = ["none" for _ in tokens]

    def take(users: Iterable[int], source: Source, values: list, listed: list) -> None:
        """Note the lists of some users: scores and tokens, -1 where there is none."""
        for user, of_user, best in zip(users, values, listed, strict=True):
            best = [token for token in best if token >= 0]
            items[user] = list(tokenizer.convert_ids_to_tokens(best))
            scores[user] = of_user[: len(best)]
            sources[user] = source if best else "none"

    lengths = np.array([len(history) for history in tokens], dtype=np.int64)
    by_length = np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())]
    with (
        history_encoder(model, max_length) as encode,
        tqdm(total=len(by_length), unit=" users", disable=not progress, leave=False) as bar,
    ):
        for start in range(0, len(by_length), batch_size):
            users = by_length[start : start + batch_size].tolist()
            batch = [tokens[user] for user in users]
            encoded, masked = encode(batch), seen_items(batch) if exclude_seen else None
            filters = {"masked": masked, "tile_size": tile_size}
            if index is None or any(own[user] is not None for user in users):
                best_scores, best = best_of(encoded_scores(encoded), users, **filters)
            else:
                best_scores, best = index.top_items(
                    encoded, catalogue, k, allowed=allowed, **filters
                )
            take(users, "model", best_scores.tolist(), best.tolist())
            bar.update(len(users))
    nothing_known = np.flatnonzero(lengths == 0).tolist()
    counts = item_counts(tokenizer) if nothing_known else None
    if counts is not None:
        popularity = torch.from_numpy(counts).double()[None]

        def score_tile(start: int, stop: int) -> torch.Tensor:
            return popularity[:, start - catalogue.start : stop - catalogue.start].clone()

        unbound = [user for user in nothing_known if own[user] is None]
        for users in filter(None, [unbound, *([u] for u in nothing_known if own[u] is not None)]):
            best_scores, best = best_of(score_tile, users[:1], tile_size=tile_size)
            many = len(users)
            take(users, "popularity", best_scores.tolist() * many, best.tolist() * many)
    return Recommendations(
        items,
        scores,
        sources,
        unknown_items=unknown,
        users_without_history=len(nothing_known),
        unknown_candidates=unknown_candidates,
        unknown_user_candidates=unknown_own,
        unknown_excluded=unknown_excluded,
    )


def _as_lists(histories: Any) -> Iterable[Any]:
    """Histories of any kind as something that gives one after the other."""
    if hasattr(histories, "columns"):  # a pandas, polars or Arrow table
        table = pl.DataFrame(histories)
        if "history" not in table.columns:
            raise ValueError(
                f"The table of histories has the columns {', '.join(map(repr, table.columns))} and "
                "not 'history'; make one of a log by read_histories(table, user=..., item=...)."
            )
        histories = table["history"]
    for to_lists in ("to_pylist", "to_list"):  # an Arrow column; one of pandas or polars
        if hasattr(histories, to_lists):
            return getattr(histories, to_lists)()
    return histories


def _encode(
    tokenizer: PreTrainedTokenizerBase, histories: Iterable[Any]
) -> tuple[list[np.ndarray], int]:
    """The known items of each history as tokens, and how many are unknown."""
    first = item_tokens(tokenizer).start
    tokens, unknown = [], 0
    for history in histories:
        if isinstance(history, str) or not isinstance(history, Iterable | None):
            kind = "string" if isinstance(history, str) else type(history).__name__
            raise TypeError(
                f"The history {history!r} is a {kind}; a history is a list of item ids, and "
                "histories are a list of those."
            )
        # A missing id is as good as one that nobody knows.
        names = [id_text(item) or "" for item in (() if history is None else history)]
        ids = np.array(tokenizer.convert_tokens_to_ids(names), dtype=np.int64)
        known = ids[ids >= first]
        unknown += len(ids) - len(known)
        tokens.append(known)
    return tokens, unknown


def _trained(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """bool [items], which of them occur in the training data."""
    counts = item_counts(tokenizer)
    if counts is None:
        raise ValueError(
            "trained_only needs to know which items were trained, and the tokenizer does not carry "
            "the counts of a training; note them by count_items."
        )
    return torch.from_numpy(counts > 0)


def _known(
    tokenizer: PreTrainedTokenizerBase, name: str, listed: Iterable[object] | None
) -> tuple[torch.Tensor, int]:
    """The distinct tokens of a list of ids, int64 [known], and how many ids are unknown."""
    if isinstance(listed, str):
        raise TypeError(f"{name} is the string {listed!r}; give a list of item ids.")
    names = {id_text(item) or "" for item in (() if listed is None else listed)}
    tokens = torch.tensor(tokenizer.convert_tokens_to_ids(list(names)), dtype=torch.int64)
    known = tokens[tokens >= item_tokens(tokenizer).start]
    return known, len(tokens) - len(known)
