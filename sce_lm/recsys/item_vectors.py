"""The items of a trained model as vectors, for systems that know nothing of it.

A model scores item j for a history with hidden state h by ``g(c · (h·W_j + u·B_j + b_j))``:
weight, low-rank adapter and bias of its head, a scale c and a soft cap g. The soft cap keeps the
order. So the inner product of the *query* ``[h, u, 1]`` with the *item vector*
``c · [W_j | B_j | b_j]`` ranks as the model does. Columns that the head does not have are left out
of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sce_lm.ops.head import Head
from sce_lm.recsys.scoring import Encoded, history_encoder
from sce_lm.recsys.tokenizer import item_tokens

TILE = 65_536
"""Items made into vectors at a time."""


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of a catalogue, in its order."""

    items: list[str]
    """[items] external ids."""
    vectors: np.ndarray
    """fp32 [items, D]."""
    description: dict[str, Any]
    """How a query is made, and what was folded in."""


def queries(encoded: Encoded) -> tuple[Tensor, Head]:
    """[users, D] queries in fp32, and the head.

    Raises:
        ValueError: the model's scores are no inner products.
    """
    hidden_states, head = encoded
    if head is None:
        raise ValueError(
            "The model does more to its logits than a head with bias, scale and soft cap does, so "
            "no item vectors rank as it does; recommend without an index."
        )
    return head.extend(hidden_states, torch.float32), head


@torch.no_grad()
def item_vectors(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> ItemVectors:
    """The vectors of all items of a tokenizer.

    Args:
        model: any causal language model over item tokens.
        tokenizer: its item tokenizer.

    Raises:
        ValueError: the model's scores are no inner products, are not numbers, or it has fewer
            classes than the tokenizer items.
    """
    catalogue = item_tokens(tokenizer)
    with history_encoder(model) as encode:
        query, head = queries(encode([[catalogue.start]]))
        if head.vocab_size < catalogue.stop:
            raise ValueError(
                f"The model scores {head.vocab_size} tokens and the tokenizer has "
                f"{catalogue.stop}; resize the model to its tokenizer."
            )
        vectors = np.empty((len(catalogue), query.shape[1]), dtype=np.float32)
        for start in range(catalogue.start, catalogue.stop, TILE):
            rows = slice(start, min(start + TILE, catalogue.stop))
            made = head.rows(rows, torch.float32) * head.post.scale
            vectors[start - catalogue.start : rows.stop - catalogue.start] = made.cpu().numpy()
    if not np.isfinite(vectors).all():
        raise ValueError(
            "The model's head holds numbers that are not finite; go back to an earlier checkpoint."
        )
    description = {
        "items": len(catalogue),
        "dimension": vectors.shape[1],
        "dtype": "float32",
        "metric": "inner product",
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "query": "hidden state of the history's last item"
        + (", then what the low-rank adapter makes of it" if head.low_rank is not None else "")
        + (", then the number 1" if head.bias is not None else ""),
        "bias_in_last_column": head.bias is not None,
        "scale": head.post.scale,
        "soft_cap": head.post.soft_cap,
    }
    return ItemVectors(list(tokenizer.convert_ids_to_tokens(list(catalogue))), vectors, description)
