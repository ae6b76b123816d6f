"""From an interaction log (user, item[, time]) to token sequences, splits and a training set.

    log = read_interactions("log.parquet", user="user_id", item="item_id", time="timestamp")
    tokenizer = build_item_tokenizer(catalogue(log))
    sequences = user_sequences(log, tokenizer)
    split = leave_one_out(sequences)
    dataset = training_dataset(split.train, max_length=200)

External ids are strings at the surface and tokens inside: polars maps them once, for all events
together, and from there on a user's history is a list of token ids. A log stays lazy until its
events are grouped by user.

Order: the events of a user are sorted by time, and events of the same time keep the order of the
file (a stable sort). Without a time column the order of the file is the order of events.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


def read_interactions(
    path: str | Path, *, user: str = "user_id", item: str = "item_id", time: str | None = None
) -> pl.LazyFrame:
    """Open an interaction log and check all of it in one streaming pass.

    Args:
        path: a ``.csv``, ``.tsv``, ``.parquet`` or JSON-lines (``.json``, ``.jsonl``, ``.ndjson``)
            file, a row an event.
        user, item: names of the columns with user and item ids; ids of any type become strings.
        time: name of the column that orders a user's events: numbers, dates or ISO 8601 text. None:
            order of the file.

    Returns:
        A lazy frame with the columns ``user`` and ``item`` (strings) and, if named, ``time``, in
        the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown kind of file, unreadable, empty, without a named column, or with missing
            values in one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}; give the path of a csv, parquet or JSON-lines file."
        )
    if path.stat().st_size == 0:
        raise ValueError(
            f"{path} is empty; it should hold a row an event, with at least a user and an item."
        )
    named = {"user": user, "item": item} | ({} if time is None else {"time": time})
    try:
        log = _scan(path, text_columns=[user, item])
        schema = log.collect_schema()
        for role, column in named.items():
            if column not in schema:
                raise ValueError(
                    f"{path} has no column {column!r} for the {role}; its columns are "
                    f"{', '.join(map(repr, schema))}: name the right one."
                )
        columns = {"user": pl.col(user).cast(pl.String), "item": pl.col(item).cast(pl.String)}
        if time is not None:
            columns["time"] = _orderable(time, schema[time], path)
        log = log.select(**columns)
        counts = (
            log.select(pl.len().alias("events"), pl.all().null_count())
            .collect(engine="streaming")
            .row(0, named=True)
        )
    except pl.exceptions.PolarsError as error:
        raise ValueError(
            f"{path} cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}"
        ) from error
    if counts["events"] == 0:
        raise ValueError(f"{path} is empty: it has columns but no events, and training needs some.")
    for role, column in named.items():
        if counts[role]:
            raise ValueError(
                f"{path} has no readable {role} (column {column!r}) in {counts[role]} of "
                f"{counts['events']} rows; fill these in or leave the rows out."
            )
    return log


def _scan(path: Path, text_columns: list[str]) -> pl.LazyFrame:
    match path.suffix.lower():
        case ".csv" | ".tsv" as suffix:
            return pl.scan_csv(
                path,
                separator="," if suffix == ".csv" else "\t",
                # Ids are read as they stand, so that "007" is not "7".
                schema_overrides=dict.fromkeys(text_columns, pl.String),
                try_parse_dates=True,
                infer_schema_length=10_000,
            )
        case ".json" | ".jsonl" | ".ndjson":
            return pl.scan_ndjson(path, infer_schema_length=10_000)
        case ".parquet":
            return pl.scan_parquet(path)
        case other:
            raise ValueError(
                f"{path} ends in {other!r}; an interaction file ends in .csv, .tsv, .parquet, "
                ".json, .jsonl or .ndjson."
            )


def _orderable(column: str, dtype: pl.DataType, path: Path) -> pl.Expr:
    if dtype.is_numeric() or dtype.is_temporal():
        return pl.col(column)
    if dtype == pl.String:
        return pl.col(column).str.to_datetime(strict=False)
    raise ValueError(
        f"{path} has times of type {dtype} in column {column!r}; "
        "give numbers, dates or ISO 8601 text."
    )


def catalogue(log: pl.LazyFrame) -> list[str]:
    """The distinct item ids of a log by first appearance, an order that a longer log only adds
    to."""
    return log.select(pl.col("item").unique(maintain_order=True)).collect()["item"].to_list()


def user_sequences(log: pl.LazyFrame, tokenizer: PreTrainedTokenizerBase) -> pl.DataFrame:
    """Every user's items as tokens, in order of time (see the module's docstring for ties).

    Items that the tokenizer does not know are left out, and a warning counts their events.

    Args:
        log: as from :func:`read_interactions`.
        tokenizer: an item tokenizer.

    Returns:
        A row a user, in order of first appearance: ``user`` (string), ``items`` (list of int32
        token ids).

    Raises:
        ValueError: the tokenizer knows none of the items.
    """
    vocabulary = tokenizer.get_vocab()
    tokens = pl.LazyFrame(
        {"item": list(vocabulary), "token": list(vocabulary.values())},
        schema={"item": pl.String, "token": pl.Int32},
    ).filter(~pl.col("token").is_in(tokenizer.all_special_ids))
    in_order = pl.col("token")
    if "time" in log.collect_schema():
        in_order = in_order.sort_by("time", maintain_order=True)
    events = log.join(tokens, on="item", how="left", maintain_order="left").drop("item").collect()
    unknown = events["token"].null_count()
    if unknown == len(events):
        raise ValueError(
            f"The tokenizer ({len(tokenizer)} tokens) knows none of the items of "
            f"the log's {unknown} events; build it from this log or give the log behind it."
        )
    if unknown:
        warnings.warn(
            f"{unknown} of {len(events)} events are of items that the tokenizer does not know; "
            "they are left out.",
            stacklevel=2,
        )
        events = events.drop_nulls("token")
    return events.group_by("user", maintain_order=True).agg(items=in_order)


@dataclass(frozen=True)
class LeaveOneOut:
    """A leave-one-out split: a user's last item is for test and the one before it for validation.

    The test history holds the validation item, as usual for this protocol. Users with fewer than 3
    events train only.
    """

    train: pl.DataFrame
    """``user``, ``items``: everything that may be trained on."""
    validation: pl.DataFrame
    """``user``, ``history``, ``target``: the item before the last, after the items of ``train``."""
    test: pl.DataFrame
    """``user``, ``history``, ``target``: the last item, after all that came before it."""


def leave_one_out(sequences: pl.DataFrame) -> LeaveOneOut:
    """Split the frame of :func:`user_sequences`; the order of users is kept."""
    items = pl.col("items")
    held_out = sequences.filter(items.list.len() >= 3)
    return LeaveOneOut(
        train=sequences.with_columns(
            items=pl.when(items.list.len() >= 3)
            .then(items.list.head(items.list.len() - 2))
            .otherwise(items)
        ),
        validation=held_out.select(
            "user", history=items.list.head(items.list.len() - 2), target=items.list.get(-2)
        ),
        test=held_out.select(
            "user", history=items.list.head(items.list.len() - 1), target=items.list.get(-1)
        ),
    )


def training_dataset(sequences: pl.DataFrame, max_length: int) -> Dataset:
    """The training sequences as a ``datasets.Dataset`` with ``input_ids`` and ``labels``.

    Labels are the same ids: as with any causal language model the shift by one happens inside. Each
    user gives one row, the last ``max_length`` items; users with a single item have nothing to
    predict and are left out. Pad with ``transformers.DataCollatorForSeq2Seq(tokenizer)``, which
    fills labels with -100.

    Args:
        sequences: frame with a column ``items``.
        max_length: largest number of items in a row, at least 2.

    Raises:
        ValueError: ``max_length`` below 2, or no user has two items.
    """
    if max_length < 2:
        raise ValueError(
            f"max_length is {max_length}, but predicting an item from another takes at least 2."
        )
    rows = sequences.filter(pl.col("items").list.len() >= 2)
    if rows.is_empty():
        raise ValueError(
            f"None of the {len(sequences)} training sequences has 2 items; there is nothing "
            "to learn from: give a log with longer histories."
        )
    recent = pl.col("items").list.tail(max_length)
    return Dataset.from_polars(rows.select(input_ids=recent, labels=recent))


def statistics(sequences: pl.DataFrame) -> dict[str, int | float]:
    """Users, items, events and the distribution of sequence lengths, ready for printing or JSON.

    Args:
        sequences: as from :func:`user_sequences`.
    """
    lengths = sequences["items"].list.len()
    quantiles = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
    return {
        "users": len(sequences),
        "items": sequences["items"].explode().n_unique(),
        "events": int(lengths.sum()),
        "length_mean": float(lengths.cast(pl.Float64).sum() / len(sequences)),
    } | {
        f"length_{name}": int(lengths.quantile(q, "nearest") or 0) for name, q in quantiles.items()
    }
