"""New items in a trained recommender, without training it again.

A new item needs a row in the model's item embeddings and in its head (one matrix, if they are
tied). Three ways to make it:

- *drawn* round the mean of the old rows, as transformers does. The item is there to be trained; its
  place in a list means nothing, and ``recommend(..., trained_only=True)`` leaves it out.
- from *neighbours*: the mean of the rows of known items that it resembles.
- from *features*: a linear map from features to rows, fitted on the known items by ridge regression
  (Hoerl, Kennard 1970), ``min |F M + m - W|² + λ |M|²``, whose λ has the least leave-one-out error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sce_lm.recsys.ids import id_text
from sce_lm.recsys.tokenizer import extend_tokenizer, item_counts, item_tokens

NewRows = Callable[[np.ndarray], np.ndarray]
"""Rows of the known items fp64 [known, d] -> rows of the new ones [new, d]."""
RIDGES = 10.0 ** np.arange(-4, 4)
"""λ to choose from, over the number of items that the map is fitted on."""


@torch.no_grad()
def append_items(
    tokenizer: PreTrainedTokenizerBase,
    items: Iterable[object],
    model: PreTrainedModel | None = None,
    *,
    neighbours: Mapping[Any, Iterable[object]] | None = None,
    features: Any = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer that also knows new items; those it knew keep their tokens and counts.

    (``tokenizer.add_tokens`` is not for item ids: it would find them inside of longer ids.)

    Args:
        tokenizer: an item tokenizer; it stays as it is.
        items: item ids of any type; those that it knows already change nothing.
        model: resized in place to the new tokenizer. Old rows keep their values; without neighbours
            and features new ones are drawn round the mean of the old.
        neighbours: known items that each new item resembles; those that the tokenizer does not know
            count for nothing.
        features: a table (polars, pandas, Arrow) with a column ``item`` and columns of numbers, of
            all new items and of known ones. The map is fitted on those of the known ones that were
            trained, where the tokenizer carries counts.

    Raises:
        ValueError: an id that cannot be a token, both neighbours and features, a new item without
            either, or features that are not finite numbers.
    """
    extended = extend_tokenizer(tokenizer, items)
    first_new, end = item_tokens(tokenizer).stop, item_tokens(extended).stop
    new = list(extended.convert_ids_to_tokens(list(range(first_new, end))))
    if neighbours is not None and features is not None:
        raise ValueError("Both neighbours and features are given; rows are made from one of them.")
    rows: NewRows | None = None
    if neighbours is not None:
        rows = _of_neighbours(tokenizer, new, neighbours)
    elif features is not None:
        rows = _of_features(tokenizer, new, features)
    if model is None:
        return extended
    model.resize_token_embeddings(len(extended))
    if rows is not None and new:
        for table in _item_tables(model):
            first = item_tokens(tokenizer).start
            made = rows(table[first:first_new].double().cpu().numpy())
            table[first_new:end] = torch.from_numpy(made).to(table)
    return extended


def _item_tables(model: PreTrainedModel) -> list[Tensor]:
    """[V, ...] of each distinct tensor with a row an item: embeddings, head and the head's bias."""
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    found = [embeddings.weight]
    if head is not None and head.weight is not embeddings.weight:
        found.append(head.weight)
    bias = getattr(head, "bias", None)
    if bias is not None:
        found.append(bias)
    return found


def _of_neighbours(
    tokenizer: PreTrainedTokenizerBase,
    new: list[str],
    neighbours: Mapping[Any, Iterable[object]],
) -> NewRows:
    first = item_tokens(tokenizer).start
    named = {id_text(item): known for item, known in neighbours.items()}
    places = []
    for item in new:
        listed = named.get(item, ())
        if isinstance(listed, str):
            raise ValueError(f"The neighbours of {item!r} are the text {listed!r}; give a list.")
        tokens = np.array(
            tokenizer.convert_tokens_to_ids([id_text(known) or "" for known in listed]), np.int64
        )
        places.append(tokens[tokens >= first] - first)
    without = [item for item, known in zip(new, places) if not len(known)]
    if without:
        raise ValueError(
            f"{len(without)} new items, such as {without[0]!r}, have no neighbour that the "
            "tokenizer knows; give them one, or append them by themselves."
        )
    return lambda known: np.stack([known[place].mean(axis=0) for place in places])


def _of_features(tokenizer: PreTrainedTokenizerBase, new: list[str], features: Any) -> NewRows:
    names, numbers = _feature_table(features)
    place = {name: row for row, name in enumerate(names)}
    missing = [item for item in new if item not in place]
    if missing:
        raise ValueError(
            f"{len(missing)} new items, such as {missing[0]!r}, have no features; give a row for "
            "each, or append them by themselves."
        )
    known = tokenizer.convert_ids_to_tokens(list(item_tokens(tokenizer)))
    counts = item_counts(tokenizer)
    fitted = np.array(
        [
            token
            for token, name in enumerate(known)
            if name in place and (counts is None or counts[token])
        ],
        dtype=np.int64,
    )
    if len(fitted) < 2:
        raise ValueError(
            f"The features hold {len(fitted)} trained items that the tokenizer knows; a map from "
            "features to rows takes some hundred."
        )
    of_fitted = numbers[[place[known[token]] for token in fitted]]
    of_new = numbers[[place[item] for item in new]]
    return lambda rows: ridge_regression(of_fitted, rows[fitted], of_new)


def _feature_table(features: Any) -> tuple[list[str | None], np.ndarray]:
    """Names and fp64 [items, features]."""
    table = pl.DataFrame(features)
    columns = [name for name in table.columns if name != "item"]
    if "item" not in table.columns or not columns:
        raise ValueError(
            f"The features have the columns {', '.join(map(repr, table.columns))}; give a column "
            "'item' and columns of numbers."
        )
    kinds = table.select(columns).schema
    text = [name for name, kind in kinds.items() if not (kind.is_numeric() or kind == pl.Boolean)]
    if text:
        raise ValueError(
            f"The features {text} are no numbers; write categories as columns of 0, 1."
        )
    numbers = table.select(pl.col(columns).cast(pl.Float64)).to_numpy()
    if not np.isfinite(numbers).all():
        raise ValueError("Some features are missing or not finite; fill them in.")
    return [id_text(item) for item in table["item"].to_list()], numbers


def ridge_regression(x: np.ndarray, y: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """What a linear map from x to y, fitted with the best ridge of ``RIDGES``, says of other x.

    With the centred and scaled ``x = U S Vᵀ`` the fit is ``U D Uᵀ y``, D = S² / (S² + λ), and the
    error of item i left out is its residual over ``1 - 1/n - Σ_j U_ij² D_j``.

    Args:
        x: [n, features].
        y: [n, d] or [n].
        asked: [m, features].

    Returns:
        [m, d] or [m].
    """
    middle, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale == 0] = 1.0  # says nothing
    mean = y.mean(axis=0)
    u, s, vt = np.linalg.svd((x - middle) / scale, full_matrices=False)
    kept = s > s.max(initial=0.0) * 1e-10
    u, s, vt = u[:, kept], s[kept], vt[kept]
    projected = u.T @ (y - mean).reshape(len(y), -1)

    def left_out_error(ridge: float) -> float:
        shrink = s**2 / (s**2 + ridge)
        residual = (y - mean).reshape(len(y), -1) - u @ (shrink[:, None] * projected)
        leverage = 1 / len(x) + (u**2) @ shrink
        return float(((residual / np.maximum(1 - leverage, 1e-6)[:, None]) ** 2).sum())

    ridge = min(RIDGES * len(x), key=left_out_error)
    weights = vt.T @ ((s / (s**2 + ridge))[:, None] * projected)
    return mean + (((asked - middle) / scale) @ weights).reshape(len(asked), *y.shape[1:])
