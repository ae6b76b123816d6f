"""The events of a log as integers, and the filters that need to see all of them at once.

A log of strings is streamed once into codes (about 20 bytes an event while they are put in order),
and everything that looks across the log works on those: users' order, duplicates, k-cores. A filter
hands back the lazy log with the rows that it keeps.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import polars as pl

Duplicates = Literal["keep", "first", "last", "consecutive"]


@dataclass(frozen=True)
class Events:
    """All events, sorted by user (first appearance), then time, then place in the log."""

    users: pl.Series
    """Distinct user ids (strings) by first appearance in the log."""
    items: pl.Series
    """Distinct item ids (strings) by first appearance in the log."""
    user: np.ndarray
    """int32 [events], index into ``users``, ascending."""
    item: np.ndarray
    """int32 [events], index into ``items``."""
    time: pl.Series | None
    """[events], or None where the log has no times."""
    rows: np.ndarray
    """int32 or int64 [events], place in the log."""


def read_events(log: pl.LazyFrame) -> Events:
    """Stream a log, as from ``read_interactions``, into its events in order."""
    # Categories of their own, which are freed with the frame.
    as_code = {
        name: pl.col(name).cast(pl.Categorical(pl.Categories.random())) for name in ("user", "item")
    }
    frame = log.with_columns(**as_code).collect(engine="streaming")
    # A column goes as soon as it is read: at 50 million events each is hundreds of megabytes.
    users, user = _by_first_appearance(frame.drop_in_place("user"))
    items, item = _by_first_appearance(frame.drop_in_place("item"))
    time = frame.drop_in_place("time") if "time" in frame.columns else None
    rows = _places(user, time)
    user, item = user[rows], item[rows]
    return Events(users, items, user, item, None if time is None else time.gather(rows), rows)


def _places(user: np.ndarray, time: pl.Series | None) -> np.ndarray:
    """int32 or int64 [events], places in the log in order of user, time and place: two stable
    sorts, the less significant key first."""
    dtype = np.int32 if len(user) < 2**31 else np.int64
    if time is None:
        return np.argsort(user, kind="stable").astype(dtype)
    by_time = np.argsort(time.to_physical().to_numpy(), kind="stable").astype(dtype)
    by_user = np.argsort(user[by_time], kind="stable").astype(dtype)
    return by_time[by_user]


def _by_first_appearance(codes: pl.Series) -> tuple[pl.Series, np.ndarray]:
    """The distinct values of a categorical column, and each row's index into them."""
    distinct = codes.unique(maintain_order=True)
    places = distinct.to_physical().to_numpy()
    index = np.empty(int(places.max()) + 1, dtype=np.int32)
    index[places] = np.arange(len(places), dtype=np.int32)
    return distinct.cast(pl.String), index[codes.to_physical().to_numpy()]


def filter_interactions(
    log: pl.LazyFrame,
    *,
    duplicates: Duplicates = "keep",
    min_user_events: int = 1,
    min_item_events: int = 1,
    iterate: bool = True,
) -> pl.LazyFrame:
    """Leave out repeated events, then users and items with too few events.

    Args:
        log: as from ``read_interactions``.
        duplicates: what becomes of the events of a user with the same item, in order of time:
            "keep" all, keep the "first" or the "last", or drop an event whose item is that of the
            event before it ("consecutive").
        min_user_events, min_item_events: fewest events of a user and of an item.
        iterate: repeat until all that are left have enough (with k for both, the k-core). False:
            once, users and items counted on the same events.

    Returns:
        The lazy log without those events, in its order.

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
    if duplicates == "keep" and max(min_user_events, min_item_events) == 1:
        return log
    events = read_events(log)
    num_rows = len(events.rows)
    kept = _without_duplicates(events, duplicates)
    user, item, rows = events.user[kept], events.item[kept], events.rows[kept]
    del events, kept
    while len(rows):
        enough = (np.bincount(user) >= min_user_events)[user]
        enough &= (np.bincount(item) >= min_item_events)[item]
        if enough.all():
            break
        user, item, rows = user[enough], item[enough], rows[enough]
        if not iterate:
            break
    if not len(rows):
        raise ValueError(
            f"No event is left of {num_rows} when users need {min_user_events} events and items "
            f"{min_item_events}; ask for fewer."
        )
    keep = np.zeros(num_rows, dtype=bool)
    keep[rows] = True
    columns = list(log.collect_schema())
    mask = pl.LazyFrame({"keep": keep})
    return pl.concat([log, mask], how="horizontal").filter("keep").select(columns)


def _without_duplicates(events: Events, policy: Duplicates) -> np.ndarray:
    """bool [events]: which stay."""
    user, item = events.user, events.item
    if policy == "keep":
        return np.ones(len(user), dtype=bool)
    if policy == "consecutive":
        same = (user[1:] == user[:-1]) & (item[1:] == item[:-1])
        return np.concatenate(([True], ~same))
    pair = pl.Series(user.astype(np.int64) * len(events.items) + item)
    found = pair.is_first_distinct() if policy == "first" else pair.is_last_distinct()
    return found.to_numpy()
