"""A trained recommender's items in a folder, for indices and other systems, and back as an index.

A folder holds ``card.json``, which says what is in it, ``items.parquet``, the external ids in the
order of the vectors, and the vectors themselves: ``vectors.safetensors`` (a tensor "vectors"), a
column ``vector`` of items.parquet, or an index of faiss or usearch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import torch
from safetensors.numpy import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from sce_lm.files import new_folder, read_json, write_json
from sce_lm.recsys.item_index import IndexKind, ItemIndex
from sce_lm.recsys.item_vectors import item_vectors, queries
from sce_lm.recsys.scoring import encoded_scores, history_encoder, top_items
from sce_lm.recsys.tokenizer import item_tokens
from sce_lm.requirements import require

ExportFormat = Literal["safetensors", "parquet", "faiss", "usearch"]
EXPORT_FORMATS: tuple[str, ...] = get_args(ExportFormat)
INDEX_FORMATS: tuple[str, ...] = get_args(IndexKind)
CARD, ITEMS = "card.json", "items.parquet"
TUNED_ON = 256
"""Histories on which an index is set, at most."""
TUNED_K = 10


@torch.no_grad()
def export(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    format: ExportFormat = "safetensors",
    *,
    recall: float = 0.98,
    histories: Any = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Write item vectors whose inner products rank as the model does, or an index of them.

    Bias and scale of the head are folded in (:mod:`sce_lm.recsys.item_vectors`); the soft cap,
    which changes no order, is not. The folder is complete, or not there.

    Args:
        model: any causal language model over item tokens.
        tokenizer: its item tokenizer.
        folder: where to write; it must not exist.
        format: "safetensors" or "parquet": the vectors; "faiss" or "usearch": an index of them.
            That of usearch has a further column, for which a query of yours needs a 0 at its end.
        recall: share of the exact lists of 10 that an index must find: it searches as far as that
            takes on the histories.
        histories: [users] lists of tokens to set an index on, such as validation histories; None:
            histories of one item each, evenly over the catalogue.
        max_length: the model reads only this many of the latest items.

    Returns:
        The card.

    Raises:
        FileExistsError: the folder exists.
        ImportError: the index's library is missing.
        ValueError: an unknown format, a recall outside of 0 to 1, or a model whose scores are no
            inner products.
    """
    if format not in EXPORT_FORMATS:
        raise ValueError(f"There is no format {format!r}; choose of {', '.join(EXPORT_FORMATS)}.")
    if not 0 < recall <= 1:
        raise ValueError(f"recall is {recall}; give a share above 0 and at most 1.")
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; give a folder that does not.")
    if format in INDEX_FORMATS:
        require(f"Exporting to {format}", format)
    made = item_vectors(model, tokenizer)
    items = pl.DataFrame({"item": made.items}, schema={"item": pl.String})
    card = {"format": format, **made.description}
    with new_folder(folder) as partial:
        if format == "parquet":
            vectors = pl.Series("vector", made.vectors, pl.Array(pl.Float32, made.vectors.shape[1]))
            items = items.with_columns(vectors)
        elif format == "safetensors":
            save_file({"vectors": made.vectors}, partial / "vectors.safetensors")
        else:
            index = ItemIndex.build(made.vectors, format)
            card |= _tuned(index, model, tokenizer, histories, recall, max_length)
            index.save(partial / f"index.{format}")
        items.write_parquet(partial / ITEMS)
        write_json(partial / CARD, card)
    return card


def load_index(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> ItemIndex:
    """The index of a folder that :func:`export` wrote.

    Args:
        tokenizer: the item tokenizer of the model that will use it.

    Raises:
        FileNotFoundError: there is no such folder, or no card in it.
        ImportError: the index's library is missing.
        ValueError: the folder holds no index, or one of other items.
    """
    folder = Path(folder)
    card = read_json(folder / CARD)
    if card.get("format") not in INDEX_FORMATS:
        raise ValueError(
            f"{folder} holds vectors as {card.get('format')!r} and no index; export with a format "
            f"of {', '.join(INDEX_FORMATS)}."
        )
    items = pl.read_parquet(folder / ITEMS, columns=["item"])["item"]
    catalogue = tokenizer.convert_ids_to_tokens(list(item_tokens(tokenizer)))
    if not items.equals(pl.Series("item", catalogue, pl.String)):
        raise ValueError(
            f"{folder} is an index of {len(items)} items which are not the tokenizer's "
            f"{len(catalogue)}, or in another order; export the model anew."
        )
    kind = card["format"]
    return ItemIndex.read(
        folder / f"index.{kind}", kind, card["items"], card["dimension"], card["effort"]
    )


def _tuned(
    index: ItemIndex,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    histories: Any,
    recall: float,
    max_length: int | None,
) -> dict[str, Any]:
    """Set the index's effort, and say for the card what it finds."""
    catalogue = item_tokens(tokenizer)
    if histories is None:
        spread = np.linspace(catalogue.start, catalogue.stop - 1, min(TUNED_ON, len(catalogue)))
        chosen = [[int(token)] for token in spread]
    else:
        chosen = [history for history in histories if len(history)][:TUNED_ON]
        if not chosen:
            raise ValueError("histories are all empty; give some with items, or none at all.")
    k = min(TUNED_K, len(catalogue))
    with history_encoder(model, max_length) as encode:
        encoded = encode(chosen)
        query, _ = queries(encoded)
        _, best = top_items(encoded_scores(encoded), catalogue, k)
    exact = best.cpu().numpy() - catalogue.start
    found = index.tune(query.cpu().numpy(), exact, recall)
    return {
        "effort": index.effort,
        "recall": found,
        "recall_of": f"exact lists of {k} for {len(chosen)} "
        + ("histories of one item" if histories is None else "histories that were given"),
    }
