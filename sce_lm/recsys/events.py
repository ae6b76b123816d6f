"""The events of a log as integers, and the filters that need to see all of them at once.

A log of strings is streamed once into codes (16 bytes an event with its time, and about as much
again while they are put in order), and everything that looks across the log works on those: users'
order, duplicates, k-cores, tokens.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import polars as pl

Duplicates = Literal["keep", "first", "last", "consecutive"]


@dataclass(frozen=True)
class Events:
    """The events of a log, in its order."""

    users: pl.Series
    """Distinct user ids (strings) by first appearance."""
    items: pl.Series
    """Distinct item ids (strings) by first appearance."""
    user: np.ndarray
    """int32 [events], index into ``users``; -1 where it is missing."""
    item: np.ndarray
    """int32 [events], index into ``items``; -1 where it is missing."""
    time: pl.Series | None
    """[events], or None where the log has no times."""

    def __len__(self) -> int:
        return len(self.user)

    def order(self) -> np.ndarray:
        """int32 or int64 [events], their places in order of user, time and place: two stable sorts,
        the less significant key first."""
        dtype = np.int32 if len(self) < 2**31 else np.int64
        if self.time is None:
            return np.argsort(self.user, kind="stable").astype(dtype)
        time = self.time.to_physical().fill_null(0).to_numpy()  # nulls would make floats of it
        by_time = np.argsort(time, kind="stable").astype(dtype)
        by_user = np.argsort(self.user[by_time], kind="stable").astype(dtype)
        return by_time[by_user]

    def filter(self, kept: np.ndarray) -> "Events":
        """The events where ``kept``, bool [events], is true, with the users and items of those."""
        if kept.all():
            return self
        users, user = _numbered(pl.Series(self.user[kept]))
        items, item = _numbered(pl.Series(self.item[kept]))
        time = None if self.time is None else self.time.filter(pl.Series(kept))
        return Events(self.users.gather(users), self.items.gather(items), user, item, time)


def read_events(log: pl.LazyFrame | Events) -> Events:
    """Stream a log, as from ``read_interactions``, into its events; those that are read already
    stay as they are."""
    if isinstance(log, Events):
        return log
    # Categories of their own, which are freed with the frame.
    as_code = {
        name: pl.col(name).cast(pl.Categorical(pl.Categories.random())) for name in ("user", "item")
    }
    frame = log.with_columns(**as_code).collect(engine="streaming")
    # A column goes as soon as it is read: at 50 million events each is hundreds of megabytes.
    users, user = _numbered(frame.drop_in_place("user"))
    items, item = _numbered(frame.drop_in_place("item"))
    time = frame.drop_in_place("time") if "time" in frame.columns else None
    return Events(users.cast(pl.String), items.cast(pl.String), user, item, time)


def _numbered(values: pl.Series) -> tuple[pl.Series, np.ndarray]:
    """The distinct values of a column of integers or categories by first appearance, and each
    row's index into them, -1 where it is missing."""
    distinct = values.drop_nulls().unique(maintain_order=True)
    codes = distinct.to_physical().to_numpy()
    index = np.full(int(codes.max(initial=0)) + 2, -1, dtype=np.int32)
    index[codes] = np.arange(len(codes), dtype=np.int32)
    return distinct, index[values.to_physical().fill_null(len(index) - 1).to_numpy()]


def filter_interactions(
    log: pl.LazyFrame | Events,
    *,
    duplicates: Duplicates = "keep",
    min_user_events: int = 1,
    min_item_events: int = 1,
    iterate: bool = True,
) -> Events:
    """Read a log and leave out repeated events, then users and items with too few events.

    Args:
        log: as from ``read_interactions``, or events.
        duplicates: what becomes of the events of a user with the same item, in order of time:
            "keep" all, keep the "first" or the "last", or drop an event whose item is that of the
            event before it ("consecutive").
        min_user_events, min_item_events: fewest events of a user and of an item.
        iterate: repeat until all that are left have enough (with k for both, the k-core). False:
            once, users and items counted on the same events.

    Returns:
        What is left, in the order of the log, which no later step reads again.

    Raises:
        ValueError: an option out of range, or nothing is left.
    """
    if duplicates not in get_args(Duplicates):
        raise ValueError(
            f"duplicates is {duplicates!r}; expected one of {', '.join(get_args(Duplicates))}."
        )
    if min(min_user_events, min_item_events) < 1:
        raise ValueError(
            f"min_user_events is {min_user_events} and min_item_events {min_item_events}; "
            "both are at least 1, which leaves out nothing."
        )
    events = read_events(log)
    kept = _without_duplicates(events, duplicates)
    user, item = events.user[kept], events.item[kept]
    while len(user):
        enough = (np.bincount(user) >= min_user_events)[user]
        enough &= (np.bincount(item) >= min_item_events)[item]
        kept[np.flatnonzero(kept)[~enough]] = False
        user, item = user[enough], item[enough]
        if enough.all() or not iterate:
            break
    if not len(user):
        raise ValueError(
            f"No event is left of {len(events)} when users need {min_user_events} events and items "
            f"{min_item_events}; ask for fewer."
        )
    return events.filter(kept)


def _without_duplicates(events: Events, policy: Duplicates) -> np.ndarray:
    """bool [events]: which stay."""
    kept = np.ones(len(events), dtype=bool)
    if policy == "keep":
        return kept
    order = events.order()
    user, item = events.user[order], events.item[order]
    if policy == "consecutive":
        kept[order[1:]] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
        return kept
    pair = pl.Series(user.astype(np.int64) * len(events.items) + item)
    kept[order] = pair.is_first_distinct() if policy == "first" else pair.is_last_distinct()
    return kept
