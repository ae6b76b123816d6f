"""Recommenders without training, as scorers for the same table: popularity and a Markov chain."""

import numpy as np
import torch

from sce_lm.recsys.scoring import Histories, Scorer, ScoreTile, as_tokens


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


def _flat(past: Histories) -> np.ndarray:
    """All tokens of all sequences, int64."""
    return np.concatenate([as_tokens(history) for history in past])
