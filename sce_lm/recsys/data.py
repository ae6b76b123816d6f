"""Interaction logs (user, item[, time]) from files and data sets, opened lazily and checked.

    log = read_interactions("log.parquet", user="user_id", item="item_id", time="timestamp")
    events = filter_interactions(log, min_user_events=5, min_item_events=5)
    tokenizer = build_item_tokenizer(catalogue(events))
    sequences = user_sequences(events, tokenizer)
    split = leave_one_out(sequences)
    dataset = training_dataset(split.train, max_length=200)

External ids are strings at the surface and tokens inside. A file is read twice: in a streaming pass
that checks it and tells its types, and into events, integers that later steps work on
(`sce_lm.recsys.events`). Delimited text is seen once more before, as bytes.

Order: the events of a user are sorted by time, and events of the same time keep the order of the
file (a stable sort). Without a time column the order of the file is the order of events.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from sce_lm.recsys.ids import FLOAT_TEXT, fractions, id_column
from sce_lm.recsys.log_files import READING_ERRORS, Part, open_parts, source_name, unreadable
from sce_lm.recsys.times import (
    check_time_format,
    plain_time,
    text_time_facts,
    text_times,
    time_kind,
)

TIE_RULE = "events of equal time keep the order of the file"


def read_interactions(
    source: Any,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = None,
    time_format: str | None = None,
    split: str = "train",
    keep_missing: bool = False,
) -> pl.LazyFrame:
    """Open an interaction log and check all of it in one streaming pass.

    Args:
        source: a file, a row an event: ``.csv``, ``.tsv``, RecBole's ``.inter`` (tabs, columns
            named ``name:type``), JSON lines or an array of records (``.json``, ``.jsonl``,
            ``.ndjson``), each also with ``.gz`` or ``.zst``, or ``.parquet``; or a folder of such
            files of one kind, read in order of their names; or a table of pandas, polars (lazy,
            too) or Arrow; or the id of a data set on the Hugging Face hub. A path is taken as it
            stands, never as a pattern.
        user, item: names of the columns with user and item ids, which become strings. Whole floats
            are whole numbers, 7.0 is "7", also in delimited text where a column has no others.
        time: name of the column that orders a user's events: numbers, dates, or text that is a
            number, ISO 8601, or written as ``time_format`` says. Times with a zone become UTC;
            numbers that are not whole are compared in double precision. None: order of the file.
        time_format: how text times are written, as of ``strptime``, e.g. "%d/%m/%Y %H:%M".
        split: the part of a hub data set.
        keep_missing: leave rows with a missing value in, as null, instead of refusing the log.

    Returns:
        A lazy frame with the columns ``user`` and ``item`` (strings) and, if named, ``time``
        (int64, float64, datetimes or durations), in the order of the file.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: an unknown kind of source, or one that is damaged, empty or without a named
            column; missing values in one, ids that are no ids, or times that have no clear order.
    """
    if time_format is not None:
        if time is None:
            raise ValueError("time_format is given without the column of the times; name it.")
        check_time_format(time_format)
    named = {"user": user, "item": item} | ({} if time is None else {"time": time})
    name = source_name(source)
    parts = open_parts(source, named, split)
    try:
        rows = pl.concat((_in_our_words(part, named) for part in parts), how="vertical_relaxed")
        place = f"{name} has times in column {time!r}"
        kind = "" if time is None else _time_kind(parts, time, place)
        if time_format is not None and kind not in ("text", ""):
            raise ValueError(f"{place} that are {kind}, and time_format is for text; leave it out.")
        facts = {"events": pl.len()}
        facts |= {f"missing {role}": pl.col(role).null_count() for role in named}
        for role in ("user", "item"):
            facts[f"wrong {role}"] = pl.col(f"wrong {role}").min()
            if parts[0].rows is not None:
                facts |= _float_text_facts(role)
        if kind == "text":
            facts["times"] = text_time_facts(time_format)
        found = rows.select(**facts).collect(engine="streaming").row(0, named=True)
        columns = {role: pl.col(role) for role in named}
        for role in ("user", "item"):
            if found[f"wrong {role}"]:
                raise ValueError(found[f"wrong {role}"])
            if found.get(f"{role} is a float"):
                is_whole = pl.col(role).str.ends_with(".0")
                columns[role] = pl.when(is_whole).then(pl.col(role).str.strip_suffix(".0"))
                found[f"missing {role}"] += found[f"{role} is not finite"]
        if kind == "text":
            columns["time"], unread = text_times(found["times"], rows, place, time_format)
            found["missing time"] += unread
    except READING_ERRORS as error:
        raise unreadable(name, [part.path for part in parts], error) from error
    events = found["events"]
    if events == 0:
        raise ValueError(f"{name} is empty: it has columns but no events, and training needs some.")
    for role, column in named.items():
        missing = found[f"missing {role}"]
        if missing and not keep_missing:
            raise ValueError(
                f"{name} has no readable {role} (column {column!r}) in {missing} of "
                f"{events} rows; fill these in or leave the rows out."
            )
    counted = sum(part.rows or 0 for part in parts)
    if parts[0].rows is not None and counted != events:
        raise ValueError(
            f"{name} holds {counted} rows, but {events} are read; write it again as RFC 4180 says."
        )
    return rows.select(**columns)


def _in_our_words(part: Part, named: Mapping[str, str]) -> pl.LazyFrame:
    """The log of a part: ``user`` and ``item`` as text, ``time`` if it is named, and what is to be
    said of an id that is none (``wrong user``, ``wrong item``), else null."""
    schema = part.log.collect_schema()
    columns = {}
    for role, column in named.items():
        values, dtype = pl.col(column), schema[column]
        place = f"{part.name} has {role}s in column {column!r}"
        if role == "time":
            time_kind(dtype, place)  # refuses what is none
            columns[role] = plain_time(values, dtype)
            continue
        columns[role] = id_column(values, dtype, place)
        begin = f"{place} that are no whole numbers, such as "
        end = "; name the right column, or write its ids as text."
        columns[f"wrong {role}"] = pl.lit(begin) + fractions(values, dtype) + pl.lit(end)
    return part.log.select(**columns)


def _time_kind(parts: Sequence[Part], column: str, place: str) -> str:
    """The one kind of all parts' times, empty where all are missing."""
    kinds = {time_kind(part.log.collect_schema()[column], place): part for part in parts}
    kinds.pop("", None)
    if len(kinds) > 1:
        raise ValueError(
            f"{place} that are {' and '.join(f'{k} ({p.name})' for k, p in kinds.items())}"
            ", which have no common order; write them alike."
        )
    return next(iter(kinds), "")


def _float_text_facts(role: str) -> dict[str, pl.Expr]:
    """Delimited text has no types: where all ids of a column are written as 7.0, as pandas writes
    whole numbers of a column with missing ones, they are whole numbers, and NaN is missing."""
    id = pl.col(role)
    is_whole = id.str.ends_with(".0")
    return {
        f"{role} is a float": id.str.contains(FLOAT_TEXT).all() & is_whole.any(),
        f"{role} is not finite": (~is_whole).sum(),
    }
