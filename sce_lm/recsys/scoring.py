"""Scores of the whole catalogue for a batch of histories, a tile of tokens at a time.

A *scorer* encodes a batch of histories and hands back a function that scores any range of tokens.
The catalogue is walked in tiles; a running top-k, merged tile by tile, is all that is kept, so
neither ``[users, V]`` nor ``[users, positions, V]`` ever exists. Evaluation and recommendation both
stand on :func:`top_items`.

A model scores with its own logits (bias, scale and soft cap included), in fp32 even where its
weights are bf16 or fp16. Histories are padded on the right. In a causal model no real position sees
what stands to its right, and absolute positions start at 0, so this equals the unpadded forward
whether positions are learned, rotary, ALiBi, counted from the mask or implicit in a recurrence;
left padding is right for only some of these.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sce_lm import objectives
from sce_lm.hf.adapter import apply_sce, lazy_logits, objective_of, remove_sce
from sce_lm.hf.lazy_logits import LazyLogits
from sce_lm.ops.head import Head

History = Sequence[int] | np.ndarray | pl.Series
"""Token ids of one user's past, oldest first."""
Histories = Sequence[History] | pl.Series
"""[users] histories: lists, arrays, or a column of lists."""
ScoreTile = Callable[[int, int], Tensor]
"""(start, stop) -> scores [users, stop - start], at least fp32, which the caller may overwrite."""
Scorer = Callable[[Histories], ScoreTile]
"""A batch of histories (token ids, oldest first) -> their scores, a tile at a time."""
Encoded = tuple[Tensor, Head | None]
"""Hidden states [users, d] behind the histories and the head that scores them; or, of a model that
does more to its logits than a head does, these themselves [users, V] and None."""
Encoder = Callable[[Histories], Encoded]
"""A batch of histories -> what their scores are made of."""


@torch.no_grad()
def top_items(
    score_tile: ScoreTile,
    items: range,
    k: int,
    *,
    masked: tuple[Tensor, Tensor] | None = None,
    allowed: Tensor | None = None,
    tile_size: int = 16_384,
) -> tuple[Tensor, Tensor]:
    """The k best of a range of tokens for each user of a batch, in order; ties by lowest token id.

    Args:
        score_tile: the batch's scores.
        items: tokens to choose from.
        k: length of the lists.
        masked: (users, tokens), both int64 [pairs]: what may not be listed.
        allowed: bool [tokens], at least up to the last item: what may be listed for anyone; None:
            every item.
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
        if allowed is not None and not allowed[start:stop].any():
            continue
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
        if allowed is not None:
            scores.masked_fill_(~allowed[start:stop].to(scores.device), -torch.inf)
        scores, columns = _top_columns(scores, k)
        tokens = columns + start
        if best_scores is not None and best_tokens is not None:
            # All tokens so far have lower ids than this tile's: a stable sort keeps ties by id.
            scores = torch.cat((best_scores, scores), 1)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            tokens = torch.cat((best_tokens, tokens), 1).gather(1, order)
        best_scores, best_tokens = scores[:, :k], tokens[:, :k]
    if best_scores is None or best_tokens is None:
        raise ValueError(f"There is nothing to choose from among the tokens {items}.")
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
        tie = (values[:, k - 1] == values[:, k]) & (values[:, k] > -torch.inf)
        straddling = tie.nonzero().squeeze(1)
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


@contextmanager
def history_encoder(model: nn.Module, max_length: int | None = None) -> Iterator[Encoder]:
    """A causal language model as an encoder of histories, in evaluation mode, without gradients.

    Inside, its head answers with lazy logits; behind, the model is as it was.

    Args:
        model: any ``AutoModelForCausalLM`` over item tokens, wrapped or not.
        max_length: read only this many of the latest items of a history; None: as many as the
            model has positions.
    """
    max_length = max_length or num_positions(model)
    start = None if max_length is None else -max_length

    @torch.no_grad()
    def encode(histories: Histories) -> Encoded:
        device = next(model.parameters()).device
        recent = [torch.from_numpy(as_tokens(history[start:])) for history in histories]
        last = torch.tensor([len(history) - 1 for history in recent], device=device)
        input_ids = pad_sequence(recent, batch_first=True).to(device)
        attention_mask = (torch.arange(input_ids.shape[1], device=device) <= last[:, None]).long()
        out = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        logits, users = out.logits, torch.arange(len(recent), device=device)
        if not isinstance(logits, LazyLogits) or logits.transform is None:
            # The model did more to its logits than scale and cap them: take the real ones.
            return logits[users, last], None
        hidden, head = logits.parts()
        return hidden[users, last], head

    was_training, is_stock = model.training, objective_of(model) is None
    if is_stock:
        apply_sce(model, objectives.get("exact"))
    model.eval()
    try:
        with lazy_logits(model):
            yield encode
    finally:
        model.train(was_training)
        if is_stock:
            remove_sce(model)


@contextmanager
def model_scorer(model: nn.Module, max_length: int | None = None) -> Iterator[Scorer]:
    """A causal language model as a scorer; arguments as of :func:`history_encoder`."""
    with history_encoder(model, max_length) as encode:
        yield lambda histories: encoded_scores(encode(histories))


def encoded_scores(encoded: Encoded) -> ScoreTile:
    """The scores of what an encoder gave."""
    hidden_states, head = encoded
    if head is not None:
        return head_scores(hidden_states, head)
    dtype = score_dtype(hidden_states)
    return lambda start, stop: hidden_states[:, start:stop].to(dtype, copy=True)


def num_positions(model: nn.Module) -> int | None:
    """The longest history that a model says it can read; None where it does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "max_position_embeddings", None)


def as_tokens(history: History) -> np.ndarray:
    """A history of any kind as int64 [length], a copy."""
    return np.array(history, dtype=np.int64)


def seen_items(histories: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(users, tokens), both int64 [items of all histories]: what :func:`top_items` may mask."""
    rows = torch.repeat_interleave(torch.tensor([len(history) for history in histories]))
    return rows, torch.from_numpy(np.concatenate(histories))


def only_pairs(score_tile: ScoreTile, bound: Tensor, users: Tensor, tokens: Tensor) -> ScoreTile:
    """Scores with -inf for what a user may not be shown.

    Args:
        bound: int64, the users who may only be shown some tokens.
        users, tokens: int64 [pairs], which these are.
    """

    def score_own(start: int, stop: int) -> Tensor:
        scores = score_tile(start, stop)
        outside = torch.zeros(scores.shape, dtype=torch.bool)
        outside[bound] = True
        here = (tokens >= start) & (tokens < stop)
        outside[users[here], tokens[here] - start] = False
        return scores.masked_fill_(outside.to(scores.device), -torch.inf)

    return score_own


def head_scores(hidden_states: Tensor, head: Head) -> ScoreTile:
    """Logits of a linear head, a tile of the vocabulary at a time, in fp32 (fp64 stays fp64).

    Args:
        hidden_states: [users, d], with d the width of weight and low-rank operand together.
        head: the output head.
    """
    dtype = score_dtype(hidden_states)
    hidden_states = head.extend(hidden_states, dtype)

    def score_tile(start: int, stop: int) -> Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return head.post(hidden_states @ head.rows(slice(start, stop), dtype).T)

    return score_tile


def score_dtype(tensor: Tensor) -> torch.dtype:
    """What scores are computed in: fp32, and fp64 stays fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)
