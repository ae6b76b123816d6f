"""Next-item evaluation on the whole catalogue, exact and streamed.

For a batch of users a *scorer* encodes their histories and hands back a function that scores any
range of tokens. The catalogue is walked in tiles; a running top-k, merged tile by tile, is all that
is kept, so neither ``[users, V]`` nor ``[users, positions, V]`` ever exists. A user's rank is the
place of the target in that list: no metric at k tells ranks beyond k apart, and no score is
computed twice, so that rounding cannot decide between equal scores.

A model scores with its own logits (bias, scale and soft cap included), in fp32 even where its
weights are bf16 or fp16. Histories are padded on the right. In a causal model no real position sees
what stands to its right, and absolute positions start at 0, so this equals the unpadded forward
whether positions are learned, rotary, ALiBi, counted from the mask or implicit in a recurrence;
left padding is right for only some of these.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from sce_lm import objectives
from sce_lm.hf.adapter import apply_sce, lazy_logits, objective_of, remove_sce
from sce_lm.hf.lazy_logits import LazyLogits
from sce_lm.recsys import metrics

History = Sequence[int] | np.ndarray
ScoreTile = Callable[[int, int], Tensor]
"""(start, stop) -> scores [users, stop - start], at least fp32, which the caller may overwrite."""
Scorer = Callable[[Sequence[History]], ScoreTile]
"""A batch of histories (token ids, oldest first) -> their scores, a tile at a time."""


@dataclass(frozen=True)
class ItemRanking:
    """What the metrics are made from; parts of the users merge by ``cat`` and ``minimum``."""

    ranks: Tensor
    """int64 [users], the target's 1-based rank; depth + 1 where it is not in the list."""
    best_positions: Tensor
    """int64 [items], an item's best 1-based position in any list; depth + 1 where it is in none."""


def evaluate_items(
    model: nn.Module | Scorer,
    histories: Sequence[History],
    targets: Sequence[int],
    *,
    items: range,
    k: Sequence[int] = (10,),
    mask_seen: bool = True,
    max_length: int | None = None,
    batch_size: int = 256,
    tile_size: int = 16_384,
    split: str = "leave-one-out",
    progress: bool = False,
) -> dict:
    """NDCG@k, HR@k, MRR@k and coverage@k over the whole catalogue, and the protocol behind them.

    Args:
        model: any causal language model over item tokens, or a baseline such as
            :func:`popularity_scorer`.
        histories: [users] token ids of each user's past, oldest first, at least one a user.
        targets: [users] token id of the item that came next.
        items: tokens that are ranked, e.g. ``item_tokens(tokenizer)``; special tokens and padding
            rows stay outside.
        k: list lengths, each at most ``len(items)``.
        mask_seen: leave the items of a user's whole history out of the list (never the target,
            should it be one).
        max_length: the model reads only this many of the latest items; None: all.
        batch_size: users at a time.
        tile_size: tokens at a time; scores take ``batch_size * tile_size`` numbers.
        split: what histories and targets are; recorded in the protocol.
        progress: show a progress bar.

    Returns:
        JSON-ready: ``"ndcg@10"``, ``"hr@10"``, ``"mrr@10"``, ``"coverage@10"`` and so on for each
        k, ``"users"``, ``"items"``, ``"unrankable_targets"`` (targets outside ``items``, for
        instance unknown items; each counts as a miss) and ``"protocol"``.

    Raises:
        ValueError: no users, lengths that differ, an empty history, a k outside 1..items, or scores
            that are NaN.
    """
    depth = max(k)
    if min(k) < 1 or depth > len(items):
        raise ValueError(
            f"k is {tuple(k)}, but a list from this catalogue has 1 to {len(items)} items; "
            "choose every k within."
        )
    ranking = rank_items(
        model,
        histories,
        targets,
        items=items,
        depth=depth,
        mask_seen=mask_seen,
        max_length=max_length,
        batch_size=batch_size,
        tile_size=tile_size,
        progress=progress,
    )
    report: dict = {}
    for length in k:
        report[f"ndcg@{length}"] = metrics.ndcg(ranking.ranks, length)
        report[f"hr@{length}"] = metrics.hit_rate(ranking.ranks, length)
        report[f"mrr@{length}"] = metrics.mrr(ranking.ranks, length)
        report[f"coverage@{length}"] = metrics.coverage(ranking.best_positions, length)
    return report | {
        "users": len(targets),
        "items": len(items),
        "unrankable_targets": sum(int(target) not in items for target in targets),
        "protocol": {
            "split": split,
            "candidates": "whole catalogue",
            "seen_items": "masked, the target excepted" if mask_seen else "kept",
            "ties": metrics.TIE_RULE,
            "max_length": max_length,
        },
    }


@torch.no_grad()
def rank_items(
    model: nn.Module | Scorer,
    histories: Sequence[History],
    targets: Sequence[int],
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
    arrays = [np.array(history, dtype=np.int64) for history in histories]
    lengths = np.array([len(history) for history in arrays])
    if len(lengths) != len(targets) or not len(lengths):
        raise ValueError(
            f"There are {len(lengths)} histories and {len(targets)} targets; "
            "give one of each a user, for at least one user."
        )
    if not lengths.all():
        raise ValueError(
            f"The history of user {int(lengths.argmin())} is empty; give at least one item."
        )
    scorer = model_scorer(model, max_length) if isinstance(model, nn.Module) else model

    all_targets = torch.from_numpy(np.array(targets, dtype=np.int64))
    ranks = torch.full((len(lengths),), depth + 1)
    best_positions = torch.full((len(items),), depth + 1)
    # Users of like length share a batch, which saves padding; the longest come first, so that a
    # lack of memory shows at once.
    by_length = np.argsort(-lengths, kind="stable")
    batches = np.array_split(by_length, range(batch_size, len(lengths), batch_size))
    for users in tqdm(batches, desc="ranking items", disable=not progress, leave=False):
        batch = [arrays[user] for user in users]
        target = all_targets[users]
        masked = _seen(batch, target) if mask_seen else None
        _, top = top_items(scorer(batch), items, depth, masked=masked, tile_size=tile_size)
        top = top.cpu()
        user, position = (top == target[:, None]).nonzero(as_tuple=True)
        ranks[torch.from_numpy(users)[user]] = position + 1
        metrics.update_best_positions(best_positions, torch.where(top >= 0, top - items.start, -1))
    return ItemRanking(ranks, best_positions)


def _seen(histories: list[np.ndarray], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Users and tokens of all seen items, except that a target stays eligible."""
    rows = torch.repeat_interleave(torch.tensor([len(history) for history in histories]))
    tokens = torch.from_numpy(np.concatenate(histories))
    keep = tokens != targets[rows]
    return rows[keep], tokens[keep]


@torch.no_grad()
def top_items(
    score_tile: ScoreTile,
    items: range,
    k: int,
    *,
    masked: tuple[Tensor, Tensor] | None = None,
    tile_size: int = 16_384,
) -> tuple[Tensor, Tensor]:
    """The k best of a range of tokens for each user of a batch, in order; ties by lowest token id.

    Args:
        score_tile: the batch's scores.
        items: tokens to choose from.
        k: length of the lists.
        masked: (users, tokens), both int64 [pairs]: what may not be listed.
        tile_size: tokens scored at a time.

    Returns:
        Scores [users, k] and token ids int64 [users, k]; where a user has fewer than k items to
        list, the score is -inf and the id -1.

    Raises:
        ValueError: a score is NaN, or the scores end before the items do.
    """
    best_scores = best_tokens = None
    for start in range(items.start, items.stop, tile_size):
        stop = min(start + tile_size, items.stop)
        scores = score_tile(start, stop)
        if scores.shape[1] < stop - start:
            raise ValueError(
                f"The items are the tokens up to {items.stop - 1}, but scores end at token "
                f"{start + scores.shape[1] - 1}; resize the model to its tokenizer."
            )
        if masked is not None:
            users, tokens = masked
            here = (tokens >= start) & (tokens < stop)
            scores[
                users[here].to(scores.device), tokens[here].to(scores.device) - start
            ] = -torch.inf
        scores, columns = _top_columns(scores, k)
        tokens = columns + start
        if best_scores is not None and best_tokens is not None:
            # All tokens so far have lower ids than this tile's: a stable sort keeps ties by id.
            scores = torch.cat((best_scores, scores), 1)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            tokens = torch.cat((best_tokens, tokens), 1).gather(1, order)
        best_scores, best_tokens = scores[:, :k], tokens[:, :k]
    if best_scores is None or best_tokens is None:
        raise ValueError(f"There is nothing to choose from: the range of items {items} is empty.")
    missing = k - best_scores.shape[1]
    best_scores = nn.functional.pad(best_scores, (0, missing), value=-torch.inf)
    best_tokens = nn.functional.pad(best_tokens, (0, missing), value=-1)
    return best_scores, best_tokens.masked_fill(best_scores == -torch.inf, -1)


def _top_columns(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, in order of (value descending, column ascending)."""
    k = min(k, scores.shape[1])
    # One more than asked for shows where equal scores straddle the end of the list: there topk
    # chooses freely, and the lowest columns have to be picked by hand.
    values, columns = scores.topk(min(k + 1, scores.shape[1]))
    if values[:, 0].isnan().any():  # topk counts NaN as the largest value
        raise ValueError(
            "Item scores are NaN where numbers are expected: the model has diverged; "
            "go back to an earlier checkpoint or train with a lower learning rate."
        )
    if values.shape[1] > k:
        straddling = (values[:, k - 1] == values[:, k]).nonzero().squeeze(1)
        columns = columns[:, :k].contiguous()
        if len(straddling):
            tied = values[straddling, k - 1, None]
            num_better = (values[straddling, :k] > tied).sum(1)
            rows, equal = (scores[straddling] == tied).nonzero(as_tuple=True)  # by row, by column
            first_of_row = torch.searchsorted(
                rows, torch.arange(len(straddling), device=rows.device)
            )
            place = torch.arange(len(rows), device=rows.device) - first_of_row[rows]
            place += num_better[rows]
            fits = place < k
            columns[straddling[rows[fits]], place[fits]] = equal[fits]
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def model_scorer(model: nn.Module, max_length: int | None = None) -> Scorer:
    """Score histories with a causal language model, in evaluation mode and without gradients.

    Args:
        model: any ``AutoModelForCausalLM`` over item tokens, wrapped or not.
        max_length: read only this many of the latest items of a history; None: all.
    """

    @torch.no_grad()
    def score(histories: Sequence[History]) -> ScoreTile:
        device = next(model.parameters()).device
        start = None if max_length is None else -max_length
        recent = [torch.as_tensor(history[start:]) for history in histories]
        last = torch.tensor([len(history) - 1 for history in recent], device=device)
        input_ids = pad_sequence(recent, batch_first=True).to(device)
        attention_mask = (torch.arange(input_ids.shape[1], device=device) <= last[:, None]).long()
        was_training = model.training
        model.eval()
        try:
            with _lazy_head(model):
                out = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            model.train(was_training)
        logits, users = out.logits, torch.arange(len(recent), device=device)
        if not isinstance(logits, LazyLogits) or logits.transform is None:
            # The model did more to its logits than scale and cap them: take the real ones.
            logits = logits[users, last]
            return lambda start, stop: logits[:, start:stop].to(_score_dtype(logits), copy=True)
        head = logits.parts()
        return head_scores(head.hidden_states[users, last], head.weight, head.bias, head.post)

    return score


@contextmanager
def _lazy_head(model: nn.Module) -> Iterator[None]:
    """``lazy_logits`` for any causal language model; one that ``apply_sce`` left alone stays so."""
    is_stock = objective_of(model) is None
    if is_stock:
        apply_sce(model, objectives.get("exact"))
    try:
        with lazy_logits(model):
            yield
    finally:
        if is_stock:
            remove_sce(model)


def head_scores(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, post: Callable[[Tensor], Tensor]
) -> ScoreTile:
    """Logits of a linear head, a tile of the vocabulary at a time, in fp32 (fp64 stays fp64).

    Args:
        hidden_states: [users, d].
        weight: [V, d].
        bias: [V] or None.
        post: what the model does to its raw logits.
    """
    dtype = _score_dtype(hidden_states)
    hidden_states = hidden_states.to(dtype)

    def score_tile(start: int, stop: int) -> Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            scores = hidden_states @ weight[start:stop].to(dtype).T
            if bias is not None:
                scores += bias[start:stop].to(dtype)
            return post(scores)

    return score_tile


def _score_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def popularity_scorer(past: Sequence[History], items: range) -> Scorer:
    """The baseline that recommends to everyone what has occurred most often.

    Args:
        past: token ids of the sequences to count; leave-one-out tables commonly count all but the
            test items, that is the test histories.
        items: tokens of the catalogue.
    """
    counts = np.bincount(np.concatenate([np.asarray(h) for h in past]), minlength=items.stop)
    popularity = torch.from_numpy(counts).double()  # exact for every count

    def score(histories: Sequence[History]) -> ScoreTile:
        return lambda start, stop: popularity[start:stop].repeat(len(histories), 1)

    return score
