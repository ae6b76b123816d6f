"""Recommendations from a file of histories to a file of lists, whatever their number.

Lists are written as they are made, a few thousand users at a time.
"""

import time as clock
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sce_lm.files import replacing
from sce_lm.recsys.data import read_interactions
from sce_lm.recsys.events import Events, read_events
from sce_lm.recsys.ids import id_column
from sce_lm.recsys.log_files import READING_ERRORS, Part, open_parts, source_name, unreadable
from sce_lm.recsys.recommendation import Recommendations, recommend
from sce_lm.recsys.sequences import as_lists

USERS_AT_A_TIME = 8192
COLUMNS = pl.Schema(
    {
        "user": pl.String,
        "rank": pl.Int32,
        "item": pl.String,
        "score": pl.Float64,
        "source": pl.String,
    }
)
OUTPUT_SUFFIXES = (".csv", ".parquet", ".json", ".jsonl", ".ndjson")
LIST_AS_TEXT = r"""^\[\s*(["'].*["']|-?[\d.]+(\s*,\s*-?[\d.]+)+)\s*\]$"""
"""What a list looks like where a reader took it for text: ["a"], ['a', 'b'] or [1, 2]."""


def read_histories(
    source: Any,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = None,
    time_format: str | None = None,
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

    Returns:
        ``user`` (string), ``history`` (list of strings, oldest first).

    Raises:
        FileNotFoundError, ValueError: as of ``read_interactions``, and for a column that holds
        lists in some rows and single ids in others, or lists as text.
    """
    name = source_name(source)
    parts = open_parts(source, {"user": user, "item": item})
    is_lists = {isinstance(p.log.collect_schema()[item], pl.List | pl.Array): p for p in parts}
    if len(is_lists) > 1:
        raise ValueError(
            f"{name} has lists in column {item!r} of {is_lists[True].name} and single ids in that "
            f"of {is_lists[False].name}; write a row a history in all files, or a row an event."
        )
    try:
        if True in is_lists:
            found, missing = _of_lists(parts, user, item)
        else:
            options = {"user": user, "item": item, "time": time, "time_format": time_format}
            log = read_interactions(source, **options, keep_missing=True)
            found, missing = _of_events(read_events(log), name, item)
    except READING_ERRORS as error:
        raise unreadable(name, [part.path for part in parts], error) from error
    if not len(found):
        raise ValueError(f"{name} holds no history; give a file with a row of a user or more.")
    if any(missing.values()):
        counts = " and ".join(f"{count} {what}" for what, count in missing.items() if count)
        warnings.warn(f"{name} has {counts}; they are left out.", stacklevel=2)
    return found


def _of_lists(parts: Sequence[Part], user: str, item: str) -> tuple[pl.DataFrame, dict[str, int]]:
    """A row a history, and how much was missing."""
    frames = []
    for part in parts:
        schema = part.log.collect_schema()
        kind = schema[item]
        assert isinstance(kind, pl.List | pl.Array)
        id, inner = pl.element(), pl.Series(dtype=kind.inner).dtype
        ids = id_column(id, inner, f"{part.name} has lists in column {item!r}, with items")
        if inner.is_float():  # a fraction is no id of anything, and stays what it is
            ids = pl.when(id == id.floor()).then(ids).otherwise(id.cast(pl.String))
        frames.append(
            part.log.select(
                user=id_column(
                    pl.col(user), schema[user], f"{part.name} has users in column {user!r}"
                ),
                history=pl.col(item).cast(pl.List(inner)).fill_null([]).list.eval(ids),
            )
        )
    frame = pl.concat(frames).collect(engine="streaming")
    found = frame.drop_nulls("user")
    complete = found.with_columns(pl.col("history").list.drop_nulls())
    left_out = found["history"].list.len().sum() - complete["history"].list.len().sum()
    return complete, {
        "rows without a user": len(frame) - len(found),
        "missing items of lists": int(left_out),
    }


def _of_events(events: Events, name: str, item: str) -> tuple[pl.DataFrame, dict[str, int]]:
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
    names = events.items.gather(events.item[order])
    found = pl.DataFrame({"user": events.users, "history": as_lists(names, lengths)})
    no_user = int((events.user < 0).sum())
    return found, {
        "rows without a user": no_user,
        "events without an item or a time": int((~complete).sum()) - no_user,
    }


def recommend_file(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    histories: pl.DataFrame,
    output: str | Path,
    k: int = 10,
    *,
    progress: bool = True,
    **options,
) -> dict[str, int | float]:
    """:func:`recommend` for a frame of histories, written to a file as it goes.

    Args:
        histories: ``user``, ``history``, as from :func:`read_histories`.
        output: ``.csv``, ``.parquet`` or JSON lines (``.jsonl``, ``.json``, ``.ndjson``), a row a
            recommendation: ``user``, ``rank`` (from 1), ``item``, ``score`` (as of
            :class:`Recommendations`) and ``source``, "model" or "popularity". A user without a list
            has one row, with the source "none" and no rank, item or score.
        k, options: as of :func:`recommend`.
        progress: show a progress bar.

    Returns:
        ``users``, ``users_without_history`` (of whom nothing is known), ``users_without_list``,
        ``unknown_items``, ``unknown_candidates``, ``unknown_excluded``, ``seconds`` and
        ``users_per_second``.

    Raises:
        ValueError: as of :func:`recommend`, or an output of another kind.
    """
    started = clock.perf_counter()
    of_users = ("users_without_history", "users_without_list", "unknown_items")
    totals = dict.fromkeys((*of_users, "unknown_candidates", "unknown_excluded"), 0)
    with (
        _writer(Path(output)) as write,
        tqdm(total=len(histories), unit=" users", disable=not progress) as bar,
    ):
        for part in histories.iter_slices(USERS_AT_A_TIME):
            found = recommend(model, tokenizer, part["history"], k, **options)
            write(_rows(part["user"], found))
            totals["users_without_history"] += found.users_without_history
            totals["users_without_list"] += found.sources.count("none")
            totals["unknown_items"] += found.unknown_items
            totals["unknown_candidates"] = found.unknown_candidates  # the same in each part
            totals["unknown_excluded"] = found.unknown_excluded
            bar.update(len(part))
    seconds = clock.perf_counter() - started
    return {
        "users": len(histories),
        **totals,
        "seconds": seconds,
        "users_per_second": len(histories) / seconds,
    }


def _rows(users: pl.Series, found: Recommendations) -> pl.DataFrame:
    """A row a recommendation, and one for a user who has none."""
    lengths = [max(len(listed), 1) for listed in found.items]
    return pl.DataFrame(
        {
            "user": np.repeat(users.to_numpy(), lengths),
            "rank": [
                n + 1 if listed else None for listed in found.items for n in range(len(listed) or 1)
            ],
            "item": [item for listed in found.items for item in listed or (None,)],
            "score": [score for listed in found.scores for score in listed or (None,)],
            "source": np.repeat(np.array(found.sources, dtype=object), lengths),
        },
        schema=COLUMNS,
    )


@contextmanager
def _writer(path: Path) -> Iterator[Callable[[pl.DataFrame], object]]:
    """A function that appends a frame to a file, which takes its name when it is complete."""
    suffix = path.suffix.lower()
    if suffix not in OUTPUT_SUFFIXES:
        raise ValueError(
            f"{path} ends in {suffix!r}; recommendations are written to a file that ends in "
            f"{', '.join(OUTPUT_SUFFIXES[:-1])} or {OUTPUT_SUFFIXES[-1]}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        if suffix == ".csv":
            COLUMNS.to_frame().write_csv(file)
            yield lambda frame: frame.write_csv(file, include_header=False)
        elif suffix == ".parquet":
            schema: pa.Schema = COLUMNS.to_frame().to_arrow().schema
            with pq.ParquetWriter(file, schema) as writer:
                yield lambda frame: writer.write_table(frame.to_arrow())
        else:
            yield lambda frame: frame.write_ndjson(file)
