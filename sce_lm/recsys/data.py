"""Interaction logs (user, item[, time]) from files and data sets, opened lazily and checked.

    log = read_interactions("log.parquet", user="user_id", item="item_id", time="timestamp")
    log = filter_interactions(log, min_user_events=5, min_item_events=5)
    tokenizer = build_item_tokenizer(catalogue(log))
    sequences = user_sequences(log, tokenizer)
    split = leave_one_out(sequences)
    dataset = training_dataset(split.train, max_length=200)

External ids are strings at the surface and tokens inside. A log stays lazy: polars streams it from
the file whenever a step needs it, and a step holds integers of it (`sce_lm.recsys.events`).

Order: the events of a user are sorted by time, and events of the same time keep the order of the
file (a stable sort). Without a time column the order of the file is the order of events.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl

from sce_lm.recsys.log_files import READING_ERRORS, Part, open_parts, source_name, unreadable
from sce_lm.recsys.times import check_time_format, plain_time, read_text_times, time_kind

TIE_RULE = "events of equal time keep the order of the file"
FLOAT_TEXT = r"^(?:-?\d+\.0|NaN|nan|-?inf)$"


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
    """Open an interaction log and check all of it in streaming passes.

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
        log = pl.concat((_in_our_words(part, named) for part in parts), how="vertical_relaxed")
        if parts[0].rows is not None:
            log = _without_float_text(log)
        if time is not None:
            place = f"{name} has times in column {time!r}"
            kinds = {time_kind(part.log.collect_schema()[time], place): part for part in parts}
            kinds.pop("", None)
            if len(kinds) > 1:
                raise ValueError(
                    f"{place} that are {' and '.join(f'{k} ({p.name})' for k, p in kinds.items())}"
                    ", which have no common order; write them alike."
                )
            if "text" in kinds:
                log = read_text_times(log, place, time_format)
            elif kinds and time_format is not None:
                raise ValueError(
                    f"{place} that are {next(iter(kinds))}, and time_format is for text; leave it "
                    "out."
                )
        counts = log.select(pl.len().alias("events"), pl.all().null_count())
        found = counts.collect(engine="streaming").row(0, named=True)
    except READING_ERRORS as error:
        raise unreadable(name, [part.path for part in parts], error) from error
    events = found["events"]
    if events == 0:
        raise ValueError(f"{name} is empty: it has columns but no events, and training needs some.")
    for role, column in named.items():
        if found[role] and not keep_missing:
            raise ValueError(
                f"{name} has no readable {role} (column {column!r}) in {found[role]} of "
                f"{events} rows; fill these in or leave the rows out."
            )
    counted = sum(part.rows or 0 for part in parts)
    if parts[0].rows is not None and counted != events:
        raise ValueError(
            f"{name} holds {counted} rows, but {events} are read; write it again as RFC 4180 says."
        )
    return log


def _in_our_words(part: Part, named: Mapping[str, str]) -> pl.LazyFrame:
    """The log of a part with ``user`` and ``item`` as text, and ``time`` if it is named."""
    schema = part.log.collect_schema()
    columns = {}
    for role, column in named.items():
        values, dtype = pl.col(column), schema[column]
        place = f"{part.name} has {role}s in column {column!r}"
        if role == "time":
            time_kind(dtype, place)  # refuses what is none
            columns[role] = plain_time(values, dtype)
            continue
        columns[role] = id_text(values, dtype, place)
        if dtype.is_float() or dtype.is_decimal():
            fractions = values.filter(_whole(values).cast(dtype) != values).first()
            found = part.log.select(fractions).collect(engine="streaming").item()
            if found is not None:
                raise ValueError(
                    f"{place} that are no whole numbers, such as {found}; name the right column, "
                    "or write its ids as text."
                )
    return part.log.select(**columns)


def id_text(ids: pl.Expr, dtype: pl.DataType, place: str) -> pl.Expr:
    """Ids as strings: whole floats as whole numbers; NaN and empty text are missing.

    Args:
        place: "SOURCE has items in column ...", for messages.

    Raises:
        ValueError: ids of a type that has none.
    """
    if dtype.is_nested() or dtype.is_temporal() or dtype == pl.Object:
        raise ValueError(f"{place} of type {dtype}, but ids are text or whole numbers.")
    if dtype.is_float() or dtype.is_decimal():
        return _whole(ids).cast(pl.String)
    text = ids.cast(pl.String)
    return pl.when(text != "").then(text)


def _whole(numbers: pl.Expr) -> pl.Expr:
    return numbers.cast(pl.Int128, strict=False)


def _without_float_text(log: pl.LazyFrame) -> pl.LazyFrame:
    """Delimited text has no types: where all ids of a column are written as 7.0, as pandas writes
    whole numbers of a column with missing ones, they are whole numbers, and NaN is missing."""
    ids = {role: pl.col(role) for role in ("user", "item")}
    found = log.select(
        **{
            role: id.str.contains(FLOAT_TEXT).all() & id.str.ends_with(".0").any()
            for role, id in ids.items()
        }
    ).collect(engine="streaming")
    return log.with_columns(
        pl.when(id.str.ends_with(".0")).then(id.str.strip_suffix(".0"))
        for role, id in ids.items()
        if found[role].item()
    )
