"""Ranking metrics with one relevant item a user, from the place that item takes in the list.

A *rank* is 1-based: rank 1 is the top of the list. Every metric at k only tells ranks 1..k apart,
so whatever lies beyond may be written as any rank above k.

Tie rule, everywhere in this package: items are ordered by score, highest first, and items of equal
score by token id, lowest first. So ``rank = 1 + #{better scored} + #{equally scored with a lower
id}``. It depends neither on the device nor on the order of computation, and a collapsed model that
scores all items alike gets the metrics of a constant list instead of a perfect score.
"""

import numpy as np
import torch
from torch import Tensor

TIE_RULE = "equal scores are ordered by token id, lowest first"
RESAMPLES = 1000
INTERVAL_RULE = f"95 % percentile bootstrap over users, {RESAMPLES} resamples"


def hit_rate(ranks: Tensor, k: int) -> float:
    """HR@k = mean_u 1[rank_u <= k].

    With one relevant item a user this is also recall@k, the share of a user's relevant items that
    is in the list.

    Args:
        ranks: int [users], 1-based ranks of the relevant items; at least one.
        k: list length.
    """
    return (ranks <= k).double().mean().item()


def precision(ranks: Tensor, k: int) -> float:
    """precision@k = mean_u 1[rank_u <= k] / k, the share of a list's k places that is relevant: at
    most 1 / k with one relevant item a user. Arguments as of :func:`hit_rate`."""
    return hit_rate(ranks, k) / k


def ndcg(ranks: Tensor, k: int) -> float:
    """NDCG@k = mean_u 1[rank_u <= k] / log2(rank_u + 1); the ideal gain is 1. Arguments as of
    :func:`hit_rate`."""
    return ((ranks <= k) / (ranks.double() + 1).log2()).mean().item()


def mrr(ranks: Tensor, k: int) -> float:
    """MRR@k = mean_u 1[rank_u <= k] / rank_u.

    With one relevant item a user this is also MAP@k: the average precision of a list is the
    precision at the only place that is relevant, 1 / rank. Arguments as of :func:`hit_rate`.
    """
    return ((ranks <= k) / ranks.double()).mean().item()


def set_recall(hits: Tensor, relevant: Tensor, k: int) -> float:
    """recall@k = mean_u |top-k(u) and relevant(u)| / |relevant(u)|, with several relevant items.

    Args:
        hits: bool [users, K], whether each entry of a list is relevant, best first; K at least k.
        relevant: int [users], how many items are; at least 1.
        k: list length.
    """
    return (hits[:, :k].sum(1) / relevant.double()).mean().item()


def set_ndcg(hits: Tensor, relevant: Tensor, k: int) -> float:
    """NDCG@k = mean_u DCG_u / ideal DCG_u, with DCG = sum over relevant places p <= k of
    1 / log2(p + 1); in the ideal list the first min(k, |relevant|) places are relevant.
    Arguments as of :func:`set_recall`."""
    gains = 1 / torch.arange(2, k + 2, dtype=torch.float64).log2()
    ideal = gains.cumsum(0)[relevant.clamp(max=k) - 1]
    return (hits[:, :k].double() @ gains / ideal).mean().item()


RANK_METRICS = {
    "ndcg": ndcg,
    "hr": hit_rate,
    "mrr": mrr,
    "precision": precision,
    "recall": hit_rate,
    "map": mrr,
}
"""Metrics that are means over users, by the names that reports use."""


def bootstrap_intervals(ranks: Tensor, k: int) -> dict[str, tuple[float, float]]:
    """The 95 % percentile bootstrap interval, over users, of each of ``RANK_METRICS`` at k.

    A mean over users depends on their ranks only through how many have each rank, and those counts
    in a resample of the users are one multinomial draw. So the cost depends on k, not on the users.
    The seed is fixed: the same ranks give the same interval.

    Args:
        ranks: int [users], 1-based ranks of the relevant items; at least one.
        k: list length.
    """
    users = len(ranks)
    counts = np.bincount(ranks.clamp(max=k + 1).numpy(), minlength=k + 2)[1:]  # the last: a miss
    resampled = np.random.default_rng(0).multinomial(users, counts / users, size=RESAMPLES)
    intervals = {}
    for name, metric in RANK_METRICS.items():
        gains = [metric(rank, k) for rank in torch.arange(1, k + 1)[:, None]]  # of one user each
        means = resampled[:, :k] @ gains / users
        intervals[name] = tuple(np.quantile(means, (0.025, 0.975)).tolist())
    return intervals


def novelty(times_listed: Tensor, counts: Tensor) -> float:
    """The mean self-information -log2 p(i) of the items listed, p(i) being item i's share of the
    training events: how many bits the popularity of items leaves to be said of a list entry.

    Mean self-information as in Castells, Hurley and Vargas (Recommender Systems Handbook, 2015). An
    item without a training event counts as if it had one, which keeps the mean finite.

    Args:
        times_listed: int [items], lists that hold an item; at least one entry.
        counts: int [items], events of an item in training.
    """
    information = -(counts.clamp(min=1).double() / counts.sum().clamp(min=1)).log2()
    return (information @ times_listed.double() / times_listed.sum()).item()


def coverage(best_positions: Tensor, k: int) -> float:
    """coverage@k = |union_u top-k(u)| / |catalogue|: the share of the catalogue that some user is
    shown.

    Args:
        best_positions: int [items], the best 1-based position that each item takes in any user's
            list (anything above k where it takes none), as :func:`update_best_positions` keeps it.
            Unlike the lists themselves it does not grow with the number of users, and those of
            several processes merge with ``minimum``.
        k: list length.
    """
    return (best_positions <= k).double().mean().item()


def update_best_positions(best_positions: Tensor, top_items: Tensor) -> None:
    """Lower ``best_positions`` in place by the positions that items take in some users' lists.

    Args:
        best_positions: int64 [items].
        top_items: int64 [users, K], indices into ``best_positions``, best first; -1 where a list is
            shorter than K.
    """
    positions = top_items.new_tensor(range(1, top_items.shape[1] + 1)).expand_as(top_items)
    listed = top_items >= 0
    best_positions.scatter_reduce_(0, top_items[listed], positions[listed], "amin")


PROFILE_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares of the catalogue, most popular items first, at which a profile is taken."""


def popularity_profile(times_listed: Tensor, counts: Tensor) -> dict[str, list[float]]:
    """How much of all recommendations goes to the most popular items.

    Args:
        times_listed: int [items], lists that hold an item.
        counts: int [items], events of an item in training.

    Returns:
        ``"catalogue"``, ``PROFILE_SHARES``; ``"recommended"`` and ``"trained"``, the shares of all
        list entries and of all events that fall on so much of the catalogue (at least one item).
    """
    order = counts.argsort(descending=True, stable=True)
    stops = [max(1, round(share * len(counts))) for share in PROFILE_SHARES]

    def shares(values: Tensor) -> list[float]:
        total = values[order].double().cumsum(0)
        return [(total[stop - 1] / total[-1].clamp(min=1)).item() for stop in stops]

    return {
        "catalogue": list(PROFILE_SHARES),
        "recommended": shares(times_listed),
        "trained": shares(counts),
    }
