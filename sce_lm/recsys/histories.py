"""Training histories as batches: padded, or packed so that short ones cost what they hold.

In a log whose users have eight events on average, rows padded to the longest history of a batch are
almost all padding. Packed rows hold several histories each, told apart by position ids that start
again at 0, which the attention masks of transformers read; no item sees another history, and the
first of each history has no label. Every real position is trained as in a padded batch.
"""

import inspect
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from transformers import PreTrainedModel

IGNORE = -100


def training_rows(sequences: pl.DataFrame, max_length: int) -> pl.Series:
    """What is trained on: each user's last ``max_length`` items, of users with at least two.

    Args:
        sequences: frame with a column ``items`` (lists of token ids).
        max_length: largest number of items in a row, at least 2.

    Raises:
        ValueError: ``max_length`` below 2, or no user has two items.
    """
    if max_length < 2:
        raise ValueError(
            f"max_length is {max_length}, but predicting an item from another takes at least 2."
        )
    rows = sequences["items"].list.tail(max_length)
    rows = rows.filter(rows.list.len() >= 2)
    if rows.is_empty():
        raise ValueError(
            f"None of the {len(sequences)} training sequences has 2 items; there is nothing "
            "to learn from: give a log with longer histories."
        )
    return rows


class TrainingHistories:
    """Token sequences in one flat array, 4 bytes an event, and batches of them."""

    def __init__(self, rows: pl.Series):
        """Args: rows: as from :func:`training_rows`."""
        self.lengths = rows.list.len().to_numpy().astype(np.int64)
        self.tokens = rows.explode().to_numpy().astype(np.int32)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, int64 ``[len(rows), longest]``, a
        history a row and padding on the right, whose labels are -100."""
        chosen = np.asarray(rows)
        shape = (len(chosen), int(self.lengths[chosen].max()))
        row, place, token = self._items(chosen)
        input_ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        input_ids[row, place] = labels[row, place] = token
        mask[row, place] = 1
        arrays = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def packed(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """``input_ids``, ``position_ids`` and ``labels``, int64 ``[packed rows, longest]``.

        Histories go, longest first, where the least room is left that holds them (best fit
        decreasing); a packed row is as long as the longest history. Padding at its end counts
        positions from 0, as a history of its own does, and has no labels.
        """
        chosen = np.asarray(rows)
        lengths = self.lengths[chosen]
        packed_row, offset = _best_fit(lengths)
        shape = (int(packed_row.max()) + 1, int(lengths.max()))
        history, place, token = self._items(chosen)
        where = packed_row[history], offset[history] + place
        used = np.bincount(packed_row, weights=lengths).astype(np.int64)
        input_ids = np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        position_ids = np.arange(shape[1]) - used[:, None]  # right where there is padding
        input_ids[where], position_ids[where] = token, place
        labels[where] = np.where(place > 0, token, IGNORE)
        arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _items(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For every item of the chosen histories: its history's place in the batch, its own place
        in the history, and its token."""
        lengths = self.lengths[chosen]
        history = np.repeat(np.arange(len(chosen)), lengths)
        place = np.arange(len(history)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return history, place, self.tokens[self.starts[chosen][history] + place]


def _best_fit(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The packed row of each length and its offset in there; rows are as long as the longest."""
    capacity = int(lengths.max())
    row, offset = np.empty_like(lengths), np.empty_like(lengths)
    room: list[tuple[int, int]] = []  # (room left, row), ascending
    num_rows = 0
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        fitting = bisect_left(room, (length, -1))
        if fitting < len(room):
            left, chosen = room.pop(fitting)
        else:
            left, chosen = capacity, num_rows
            num_rows += 1
        row[index], offset[index] = chosen, capacity - left
        insort(room, (left - length, chosen))
    return row, offset


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a causal language model keeps packed histories apart, by trying it.

    The logits of the second of two histories in one row must not depend on the first: their
    gradient with respect to its embeddings is exactly zero where the mask hides it, and not where
    it does not, whatever the precision.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    embeddings: Any = model.get_input_embeddings()
    tokens = torch.arange(5, device=model.device)[None] % embeddings.weight.shape[0]
    embedded = embeddings(tokens).detach().requires_grad_()
    position_ids = torch.tensor([[0, 1, 2, 0, 1]], device=model.device)
    was_training = model.training
    model.eval()
    try:
        logits = model(inputs_embeds=embedded, position_ids=position_ids, use_cache=False).logits
    finally:
        model.train(was_training)
    (gradient,) = torch.autograd.grad(logits[:, 3:].square().sum(), embedded)
    return not gradient[:, :3].any() and bool(gradient[:, 3:].any())
