"""What to recommend next for raw histories, new users included: exact lists over the catalogue.

    model, tokenizer = AutoModelForCausalLM.from_pretrained(f), AutoTokenizer.from_pretrained(f)
    found = recommend(model, tokenizer, [["B001", "B007"], ["B100"]], k=10)
    found.items[0], found.scores[0]

A list is the k best of all items by the model's own logits, equal scores in the order of the
catalogue; the catalogue is scored a tile at a time (`sce_lm.recsys.scoring`). Items that the
tokenizer does not know are skipped and counted, and a history of nothing else gets an empty list.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sce_lm.recsys.scoring import model_scorer, seen_items, top_items
from sce_lm.recsys.tokenizer import item_tokens


@dataclass(frozen=True)
class Recommendations:
    """Lists for some histories, in their order."""

    items: list[list[str]]
    """[users] item ids, best first; fewer than k where a user has fewer items left."""
    scores: list[list[float]]
    """[users] the model's logits of those items."""
    unknown_items: int
    """Items of the histories that the tokenizer does not know; they were skipped."""
    users_without_history: int
    """Users of whose history nothing is known; their lists are empty."""


@torch.no_grad()
def recommend(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    histories: Sequence[Sequence[object]],
    k: int = 10,
    *,
    exclude_seen: bool = True,
    candidates: Iterable[object] | None = None,
    exclude: Iterable[object] = (),
    max_length: int | None = None,
    batch_size: int = 256,
    tile_size: int = 16_384,
    progress: bool = False,
) -> Recommendations:
    """The k best next items for each history.

    Args:
        model: any causal language model over item tokens.
        tokenizer: its item tokenizer.
        histories: [users] item ids as in the log (of any type, compared as text), oldest first.
        k: length of the lists, at most the number of items to choose from.
        exclude_seen: leave out the items of a user's whole history.
        candidates: the only items to choose from; None: the whole catalogue.
        exclude: items to recommend to nobody.
        max_length: the model reads only this many of the latest items; None: as many as it has
            positions.
        batch_size: users at a time.
        tile_size: tokens scored at a time; scores take ``batch_size * tile_size`` numbers.
        progress: show a progress bar.

    Raises:
        TypeError: a history is a string.
        ValueError: k is below 1 or above the number of items to choose from, or ``candidates`` or
            ``exclude`` name items that the tokenizer does not know.
    """
    allowed = _allowed(tokenizer, candidates, exclude)
    choice = int(allowed.sum())
    if not 1 <= k <= choice:
        raise ValueError(
            f"k is {k}, but there are {choice} items to choose from; choose k from 1 to {choice}."
        )
    tokens, unknown = _encode(tokenizer, histories)
    score = model_scorer(model, max_length)
    items: list[list[str]] = [[] for _ in tokens]
    scores: list[list[float]] = [[] for _ in tokens]
    lengths = np.array([len(history) for history in tokens])
    by_length = np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())]
    with tqdm(total=len(by_length), unit=" users", disable=not progress, leave=False) as bar:
        for start in range(0, len(by_length), batch_size):
            users = by_length[start : start + batch_size]
            batch = [tokens[user] for user in users]
            best_scores, best = top_items(
                score(batch),
                item_tokens(tokenizer),
                k,
                masked=seen_items(batch) if exclude_seen else None,
                allowed=allowed,
                tile_size=tile_size,
            )
            for user, values, listed in zip(users, best_scores.tolist(), best.tolist()):
                listed = [token for token in listed if token >= 0]
                items[user] = list(tokenizer.convert_ids_to_tokens(listed))
                scores[user] = values[: len(listed)]
            bar.update(len(users))
    return Recommendations(items, scores, unknown, len(tokens) - len(by_length))


def _encode(
    tokenizer: PreTrainedTokenizerBase, histories: Sequence[Sequence[object]]
) -> tuple[list[np.ndarray], int]:
    """The known items of each history as tokens, and how many are unknown."""
    first = item_tokens(tokenizer).start
    tokens, unknown = [], 0
    for history in histories:
        if isinstance(history, str):
            raise TypeError(
                f"The history {history!r} is a string; a history is a list of item ids, and "
                "histories are a list of those."
            )
        ids = np.array(tokenizer.convert_tokens_to_ids([str(i) for i in history]), dtype=np.int64)
        known = ids[ids >= first]
        unknown += len(ids) - len(known)
        tokens.append(known)
    return tokens, unknown


def _allowed(
    tokenizer: PreTrainedTokenizerBase,
    candidates: Iterable[object] | None,
    exclude: Iterable[object],
) -> torch.Tensor:
    """bool [tokens]: what may be recommended at all."""
    items = item_tokens(tokenizer)
    allowed = torch.zeros(items.stop, dtype=torch.bool)
    allowed[items.start :] = candidates is None
    for name, listed, value in (("candidates", candidates, True), ("exclude", exclude, False)):
        names = [str(item) for item in listed or ()]
        if not names:
            continue
        tokens = torch.tensor(tokenizer.convert_tokens_to_ids(names))
        unknown = (tokens < items.start).nonzero().squeeze(1)
        if len(unknown):
            raise ValueError(
                f"{name} names {len(unknown)} items that are not in the catalogue, for instance "
                f"{names[int(unknown[0])]!r}; leave them out."
            )
        allowed[tokens] = value
    return allowed
