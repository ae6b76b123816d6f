"""Raw histories from files, whole or a part at a time.

A row a history is streamed. A row an event is read into integers, 8 bytes an event and as many more
with its time and while they are put in order (`sce_lm.recsys.events`), and a part's histories are
spelled out of these.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from sce_lm.recsys.data import read_interactions
from sce_lm.recsys.events import Events, read_events
from sce_lm.recsys.ids import id_column
from sce_lm.recsys.log_files import READING_ERRORS, Part, open_parts, source_name, unreadable
from sce_lm.recsys.sequences import as_lists

LIST_AS_TEXT = r"""^\[\s*(["'].*["']|-?[\d.]+(\s*,\s*-?[\d.]+)+)\s*\]$"""
"""What a list looks like where a reader took it for text: ["a"], ['a', 'b'] or [1, 2]."""


@dataclass(frozen=True)
class HistoryParts:
    """Histories that are read a part at a time, as often as they are asked for."""

    num_histories: int
    parts: Callable[[int], Iterator[pl.DataFrame]]
    """The number of histories of a part (the last may have fewer) -> ``user``, ``history`` and, if
    they were asked for, ``candidates``, as of :func:`read_histories`."""


def read_histories(
    source: Any,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = None,
    time_format: str | None = None,
    candidates: str | None = None,
) -> pl.DataFrame:
    """Raw histories from an interaction log, or from a row a history.

    What is missing does not end the reading: an event without an item or a time, or a missing item
    of a list, is left out (its user stays, if need be with an empty history), and so is a row
    without a user. A warning counts them.

    Args:
        source: as for ``read_interactions``; or one whose item column holds lists of ids (parquet,
            JSON lines, a table). Each of its rows is a question, also if a user has several.
        user, item, time: names of its columns; time is not used where a row is a history.
        time_format: as for ``read_interactions``.
        candidates: name of a column of lists, where a row is a history: the only items for its
            user. A missing list bounds nothing.

    Returns:
        ``user`` (string), ``history`` (list of strings, oldest first) and, if asked for,
        ``candidates`` (list of strings).

    Raises:
        FileNotFoundError, ValueError: as of ``read_interactions``, and for a column that holds
        lists in some rows and single ids in others, or lists as text.
    """
    options = {"user": user, "item": item, "time": time, "time_format": time_format}
    found = scan_histories(source, **options, candidates=candidates)
    return next(found.parts(found.num_histories))


def scan_histories(
    source: Any,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = None,
    time_format: str | None = None,
    candidates: str | None = None,
) -> HistoryParts:
    """As :func:`read_histories`, for more histories than should be held at a time.

    All of the source is checked here. Where a row is a history it is read again for the parts.
    """
    name = source_name(source)
    columns = {"user": user, "item": item} | (
        {} if candidates is None else {"candidates": candidates}
    )
    parts = open_parts(source, columns)
    is_lists = {isinstance(p.log.collect_schema()[item], pl.List | pl.Array): p for p in parts}
    if len(is_lists) > 1:
        raise ValueError(
            f"{name} has lists in column {item!r} of {is_lists[True].name} and single ids in that "
            f"of {is_lists[False].name}; write a row a history in all files, or a row an event."
        )
    if candidates is not None and False in is_lists:
        raise ValueError(
            f"{name} has a row an event, and candidates of each user are read where a row is a "
            f"history; write a row a user, with lists in columns {item!r} and {candidates!r}."
        )
    try:
        if True in is_lists:
            found, missing = _of_lists(parts, columns)
        else:
            options = {"user": user, "item": item, "time": time, "time_format": time_format}
            log = read_interactions(source, **options, keep_missing=True)
            found, missing = _of_events(read_events(log), name, item)
    except READING_ERRORS as error:
        raise unreadable(name, [part.path for part in parts], error) from error
    if not found.num_histories:
        raise ValueError(f"{name} holds no history; give a file with a row of a user or more.")
    if any(missing.values()):
        counts = " and ".join(f"{count} {what}" for what, count in missing.items() if count)
        warnings.warn(f"{name} has {counts}; they are left out.", stacklevel=2)
    return found


def _of_lists(
    parts: Sequence[Part], columns: dict[str, str]
) -> tuple[HistoryParts, dict[str, int]]:
    """A row a history, and how much was missing."""
    user, *lists = columns.values()
    frames = []
    for part in parts:
        schema = part.log.collect_schema()
        place = f"{part.name} has users in column {user!r}"
        ids = [_id_lists(part, schema, column) for column in lists]
        frames.append(
            part.log.select(id_column(pl.col(user), schema[user], place).alias("user"), *ids)
        )
    names = ("history", "candidates")[: len(lists)]
    rows = pl.concat(frames).select("user", **{n: pl.col(c) for n, c in zip(names, lists)})
    rows = rows.with_columns(pl.col("history").fill_null([]))
    kept = rows.drop_nulls("user").with_columns(pl.col(names).list.drop_nulls())

    has_user = pl.col("user").is_not_null()
    missing = [
        pl.col(name).list.eval(pl.element().is_null()).list.sum().filter(has_user).sum()
        for name in names
    ]
    counts = rows.select(
        users=has_user.sum(), no_user=(~has_user).sum(), missing=pl.sum_horizontal(missing)
    )
    num_users, no_user, num_missing = counts.collect(engine="streaming").row(0)

    def of_size(size: int) -> Iterator[pl.DataFrame]:
        waiting = pl.DataFrame(schema=kept.collect_schema())
        for batch in kept.collect_batches(chunk_size=size, engine="streaming"):
            waiting.vstack(batch, in_place=True)
            whole = len(waiting) - len(waiting) % size
            yield from waiting[:whole].iter_slices(size)
            waiting = waiting[whole:]
        if len(waiting):
            yield waiting

    return HistoryParts(num_users, of_size), {
        "rows without a user": no_user,
        "missing items of lists": num_missing,
    }


def _id_lists(part: Part, schema: pl.Schema, column: str) -> pl.Expr:
    """A column of lists of ids as lists of text."""
    kind = schema[column]
    if not isinstance(kind, pl.List | pl.Array):
        raise ValueError(
            f"{part.name} has single values in column {column!r} of type {kind}; give lists of ids."
        )
    id, inner = pl.element(), pl.Series(dtype=kind.inner).dtype
    ids = id_column(id, inner, f"{part.name} has lists in column {column!r}, with items")
    if inner.is_float():  # a fraction is no id of anything, and stays what it is
        ids = pl.when(id == id.floor()).then(ids).otherwise(id.cast(pl.String))
    return pl.col(column).cast(pl.List(inner)).list.eval(ids)


def _of_events(events: Events, name: str, item: str) -> tuple[HistoryParts, dict[str, int]]:
    """The histories of events in which values may be missing, and how much was missing."""
    is_list = events.items.str.contains(LIST_AS_TEXT)
    if is_list.any():
        lists = int(is_list.to_numpy()[events.item[events.item >= 0]].sum())
        raise ValueError(
            f"{name} holds {lists} lists as text in column {item!r}, such as "
            f"{events.items.filter(is_list)[0]:.80}; give a row an event, or lists in all rows of "
            "a parquet or JSON-lines file."
        )
    complete = (events.user >= 0) & (events.item >= 0)
    if events.time is not None:
        complete &= events.time.is_not_null().to_numpy()
    order = events.order()
    order = order[complete[order]]
    lengths = np.bincount(events.user[order], minlength=len(events.users))
    ends, tokens = np.cumsum(lengths), events.item[order]
    no_user = int((events.user < 0).sum())
    missing = {
        "rows without a user": no_user,
        "events without an item or a time": int((~complete).sum()) - no_user,
    }
    users, names = events.users, events.items

    def of_size(size: int) -> Iterator[pl.DataFrame]:
        for start in range(0, len(users), size):
            of_part = lengths[start : start + size]
            stop = ends[start + len(of_part) - 1]
            history = as_lists(names.gather(tokens[stop - of_part.sum() : stop]), of_part)
            yield pl.DataFrame({"user": users[start : start + size], "history": history})

    return HistoryParts(len(users), of_size), missing
