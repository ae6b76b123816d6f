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

from pathlib import Path

import polars as pl
from datasets import Dataset, load_dataset

TIE_RULE = "events of equal time keep the order of the file"
SUFFIXES = (".csv", ".tsv", ".inter", ".parquet", ".json", ".jsonl", ".ndjson")


def read_interactions(
    source: str | Path,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = None,
    split: str = "train",
) -> pl.LazyFrame:
    """Open an interaction log and check all of it in one streaming pass.

    Args:
        source: a file, a row an event: ``.csv``, ``.tsv``, ``.parquet``, JSON lines (``.json``,
            ``.jsonl``, ``.ndjson``) or RecBole's ``.inter`` (tabs, columns named
            ``name:type``); or a folder of such files of one kind, read in order of their names;
            or the id of a data set on the Hugging Face hub.
        user, item: names of the columns with user and item ids; ids of any type become strings.
        time: name of the column that orders a user's events: numbers, dates or ISO 8601 text. None:
            order of the file.
        split: the part of a hub data set.

    Returns:
        A lazy frame with the columns ``user`` and ``item`` (strings) and, if named, ``time``, in
        the order of the file.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: unknown kind of file, unreadable, empty, without a named column, or with missing
            or unreadable values in one.
    """
    named = {"user": user, "item": item} | ({} if time is None else {"time": time})
    try:
        log = _open(source, split, text_columns=[user, item])
        schema = log.collect_schema()
        for role, column in named.items():
            if column not in schema:
                raise ValueError(
                    f"{source} has no column {column!r} for the {role}; its columns are "
                    f"{', '.join(map(repr, schema))}: name the right one."
                )
        columns = {"user": pl.col(user).cast(pl.String), "item": pl.col(item).cast(pl.String)}
        if time is not None:
            columns["time"] = _orderable(time, schema[time], source)
        log = log.select(**columns)
        counts = (
            log.select(pl.len().alias("events"), pl.all().null_count())
            .collect(engine="streaming")
            .row(0, named=True)
        )
    except pl.exceptions.PolarsError as error:
        kind = Path(source).suffix[1:] or "an interaction log"
        raise ValueError(
            f"{source} cannot be read as {kind}: {str(error).splitlines()[0]}"
        ) from error
    if counts["events"] == 0:
        raise ValueError(
            f"{source} is empty: it has columns but no events, and training needs some."
        )
    for role, column in named.items():
        if counts[role]:
            raise ValueError(
                f"{source} has no readable {role} (column {column!r}) in {counts[role]} of "
                f"{counts['events']} rows; fill these in or leave the rows out."
            )
    return log


def _open(source: str | Path, split: str, text_columns: list[str]) -> pl.LazyFrame:
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        kinds = sorted({file.suffix.lower() for file in files})
        if len(kinds) != 1:
            raise ValueError(
                f"The folder {path} holds {' and '.join(kinds) or 'no'} files; an interaction log "
                f"in parts is files of one kind ({', '.join(SUFFIXES)})."
            )
        return pl.concat([_scan(file, text_columns) for file in files])
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(
                f"{path} is empty; it should hold a row an event, with at least a user and an item."
            )
        return _scan(path, text_columns)
    if path.suffix.lower() in SUFFIXES or path.is_absolute():
        raise FileNotFoundError(
            f"There is no file {path}; give the path of a csv, parquet, JSON-lines or .inter file."
        )
    try:
        dataset = load_dataset(str(source), split=split)
    except Exception as error:  # the hub, the network and several parsers stand behind this
        raise FileNotFoundError(
            f"{source} is no file here and cannot be loaded from the hub "
            f"({(str(error).splitlines() or [type(error).__name__])[0][:300]}); check the name."
        ) from error
    assert isinstance(dataset, Dataset)
    frame = dataset.to_polars()
    assert isinstance(frame, pl.DataFrame)
    return frame.lazy()


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
        case ".inter":
            log = pl.scan_csv(path, separator="\t", quote_char=None, infer_schema=False)
            types = {name: name.split(":")[-1] for name in log.collect_schema()}
            floats = [name for name, kind in types.items() if kind == "float"]
            return log.cast(dict.fromkeys(floats, pl.Float64)).rename(
                {name: name.split(":")[0] for name in types}
            )
        case ".json" | ".jsonl" | ".ndjson":
            return pl.scan_ndjson(path, infer_schema_length=10_000)
        case ".parquet":
            return pl.scan_parquet(path)
        case other:
            raise ValueError(
                f"{path} ends in {other!r}; an interaction file ends in "
                f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}."
            )


def _orderable(column: str, dtype: pl.DataType, source: str | Path) -> pl.Expr:
    if dtype.is_float():
        return pl.col(column).fill_nan(None)
    if dtype.is_numeric() or dtype.is_temporal():
        return pl.col(column)
    if dtype == pl.String:
        return pl.col(column).str.to_datetime(strict=False)
    raise ValueError(
        f"{source} has times of type {dtype} in column {column!r}; "
        "give numbers, dates or ISO 8601 text."
    )
