"""Recommenders without training, as scorers for the same table: popularity, a Markov chain and
nearest neighbours among items."""

import warnings
from collections.abc import Iterator

import numpy as np
import polars as pl
import torch

from sce_lm.recsys.scoring import Histories, Scorer, ScoreTile, as_tokens
from sce_lm.recsys.times import units_of_a_day

BLOCK_PAIRS = 2**22
"""Pairs of items that are held at a time, with less than 100 bytes each."""


def popularity_scorer(past: Histories, items: range) -> Scorer:
    """The baseline that recommends to everyone what has occurred most often.

    Args:
        past: token ids of the sequences to count; leave-one-out tables commonly count all but the
            test items, that is the test histories.
        items: tokens of the catalogue.
    """
    counts = np.bincount(_flat(past), minlength=items.stop)
    popularity = torch.from_numpy(counts).double()  # exact for every count

    def score(histories: Histories) -> ScoreTile:
        return lambda start, stop: popularity[start:stop].repeat(len(histories), 1)

    return score


def of_last_days(sequences: pl.DataFrame, days: int) -> pl.Series | None:
    """What happened in the last days of a log, for :func:`popularity_scorer`.

    Args:
        sequences: ``items`` and ``times``, as from ``user_sequences``.
        days: counted back from the latest event.

    Returns:
        [users with such events] token ids; None where days have no length in these times.
    """
    events = sequences.select("items", pl.col("times").list.eval(pl.element().to_physical()))
    day = units_of_a_day(sequences["times"].explode())
    if day is None:
        return None
    events = events.with_row_index("row").explode("items", "times")
    recent = events.filter(pl.col("times") > pl.col("times").max() - days * day)
    return recent.group_by("row", maintain_order=True).agg("items")["items"]


def markov_scorer(past: Histories, items: range) -> Scorer:
    """The baseline that recommends what has most often come right after a history's last item.

    A first-order Markov chain. With ``n(i, j)`` the number of times that j comes directly after i
    in the sequences of ``past``, a history that ends in i orders items by ``n(i, j)``; items that
    never came after i follow, by how often they occur (the back-off). Equal counts are ordered by
    token id, lowest first, and masking of seen items is the evaluation's.

    Args:
        past: token ids of the sequences to count, as for :func:`popularity_scorer`: for the test
            all but the test items.
        items: tokens of the catalogue.
    """
    flat = _flat(past)
    popularity = np.bincount(flat, minlength=items.stop)
    back_off = torch.from_numpy(popularity / (popularity.max() + 1))  # below every count
    size = len(popularity)
    inside = np.ones(len(flat), dtype=bool)
    inside[np.cumsum([len(history) for history in past]) - 1] = False  # a last item has no next
    pairs = (flat[:-1] * size + flat[1:])[inside[:-1]]
    pairs, counts = np.unique(pairs, return_counts=True)

    def score(histories: Histories) -> ScoreTile:
        last = np.array([history[-1] for history in histories])
        first, stop = np.searchsorted(pairs, last * size), np.searchsorted(pairs, (last + 1) * size)
        users = torch.from_numpy(np.repeat(np.arange(len(last)), stop - first))
        found = np.concatenate([np.arange(*bounds) for bounds in zip(first, stop)])
        tokens = torch.from_numpy(pairs[found] % size)
        came_after = torch.from_numpy(counts[found]).double()

        def score_tile(start: int, stop: int) -> torch.Tensor:
            scores = back_off[start:stop].repeat(len(histories), 1)
            here = (tokens >= start) & (tokens < stop)
            scores[users[here], tokens[here] - start] = came_after[here]
            return scores

        return score_tile

    return score


def item_knn_scorer(past: Histories, items: range, neighbours: int = 100) -> Scorer:
    """The baseline that recommends what is most often found beside the items of a history.

    With c(i, j) the number of sequences of ``past`` that hold both i and j, n(i) that of i alone,

        similarity(i, j) = c(i, j) / sqrt(n(i)·n(j)),        score(j) = sum_i similarity(i, j)

    over the distinct items i of the history that have j among their nearest neighbours (Sarwar et
    al. 2001; Deshpande & Karypis 2004). Items that are nobody's neighbour follow, by the number of
    sequences that hold them. Equal values are ordered by token id, lowest first.

    Args:
        past: token ids of the sequences to count, as for :func:`popularity_scorer`.
        items: tokens of the catalogue.
        neighbours: kept of an item; 8 bytes each.
    """
    flat, size = _flat(past), items.stop
    sequence = np.repeat(np.arange(len(past)), [len(history) for history in past])
    item, sequence = np.divmod(np.unique(flat * len(past) + sequence), len(past))
    holding = np.bincount(item, minlength=size)
    # Below every similarity, which is at least 1 over the largest n.
    back_off = torch.from_numpy(holding / (holding.max() + 1.0) ** 2)
    nearest = torch.full((size, neighbours), -1, dtype=torch.int32)
    similarity = torch.zeros(size, neighbours)
    for row, other, together in _pairs(item, sequence, holding):
        cosine = together / np.sqrt(holding[row].astype(np.float64) * holding[other])
        order = np.lexsort((other, -cosine, row))
        row, other, cosine = row[order], other[order], cosine[order]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        kept = place < neighbours
        at = torch.from_numpy(row[kept]), torch.from_numpy(place[kept])
        nearest[at] = torch.from_numpy(other[kept]).int()
        similarity[at] = torch.from_numpy(cosine[kept]).float()

    def score(histories: Histories) -> ScoreTile:
        distinct = [np.unique(as_tokens(history)) for history in histories]
        of_history = torch.from_numpy(np.concatenate(distinct))
        user = torch.repeat_interleave(torch.tensor([len(tokens) for tokens in distinct]))
        tokens, values = nearest[of_history], similarity[of_history].double()

        def score_tile(start: int, stop: int) -> torch.Tensor:
            row, column = ((tokens >= start) & (tokens < stop)).nonzero(as_tuple=True)
            at = user[row], tokens[row, column].long() - start
            scores = torch.zeros(len(distinct), stop - start, dtype=torch.float64)
            scores.index_put_(at, values[row, column], accumulate=True)
            return torch.where(scores > 0, scores, back_off[start:stop])

        return score_tile

    return score


def _pairs(
    item: np.ndarray, sequence: np.ndarray, holding: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Items, other items and how many sequences hold both, for a block of items at a time.

    Args:
        item, sequence: int64 [events], in order of item, each pair once.
        holding: int64 [tokens], events of each item.
    """
    lengths = np.bincount(sequence)

    def matrix(row: np.ndarray, column: np.ndarray, *shape: int) -> torch.Tensor:
        ones = torch.ones(len(row), dtype=torch.float64)
        at = torch.from_numpy(np.stack((row, column)))
        return torch.sparse_coo_tensor(at, ones, shape, is_coalesced=True, check_invariants=False)

    order = np.argsort(sequence, kind="stable")
    others = matrix(sequence[order], item[order], len(lengths), len(holding))
    ends = np.cumsum(holding)
    # An item has at most as many others as its sequences hold, and as there are.
    most = np.bincount(item, weights=lengths[sequence], minlength=len(holding))
    block = np.cumsum(np.minimum(most, len(holding))) // BLOCK_PAIRS
    for first, stop in _runs(block):
        part = slice(ends[first] - holding[first], ends[stop - 1])
        rows = matrix(item[part] - first, sequence[part], stop - first, len(lengths))
        with warnings.catch_warnings(action="ignore"):  # torch calls its own inner format a beta
            found = torch.sparse.mm(rows, others)
        row, other = found._indices().numpy()
        row = row + first
        kept = row != other
        yield row[kept], other[kept], found._values().numpy()[kept]


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    yield from zip((0, *edges.tolist()), (*edges.tolist(), len(values)))


def _flat(past: Histories) -> np.ndarray:
    """All tokens of all sequences, int64."""
    return np.concatenate([as_tokens(history) for history in past])
