"""Where interaction logs come from: files, folders of parts, data frames and the hub.

Whatever the source, the columns that are asked for come out lazily and as the source holds them;
columns of text files (csv, tsv, .inter) are text, and so are scalars of JSON, so that no reader
guesses at them.
"""

import glob
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from datasets import Dataset, load_dataset

from sce_lm.files import data_files
from sce_lm.recsys.delimited import BOM, Quotes, layout, open_bytes

SUFFIXES = (".csv", ".tsv", ".inter", ".parquet", ".json", ".jsonl", ".ndjson")
COMPRESSIONS = (".gz", ".zst")
DELIMITED: dict[str, tuple[str, Quotes]] = {
    ".csv": (",", "always"),
    ".tsv": ("\t", "where consistent"),
    ".inter": ("\t", "never"),
}
"""Separator and quotation marks of each kind of delimited text."""
LONGEST_LINE = 1 << 24
READING_ERRORS = (
    pl.exceptions.PolarsError,
    pl.exceptions.PanicException,
    pa.ArrowException,
    OSError,
    json.JSONDecodeError,
)
"""What readers raise for files that are damaged."""


@dataclass(frozen=True)
class Part:
    """One file of a log, or all of a log that is no folder."""

    name: str
    """What messages call it."""
    path: Path | None
    log: pl.LazyFrame
    """The columns that were asked for, in their order."""
    rows: int | None = None
    """Number of events of delimited text, as counted in its bytes."""


def open_parts(source: Any, columns: Mapping[str, str], split: str = "train") -> list[Part]:
    """Open a log for reading, lazily.

    Args:
        source: as of :func:`~sce_lm.recsys.read_interactions`.
        columns: names of the columns to read, by what they are for (user, item, time), which
            messages name.
        split: the part of a data set of the hub.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ValueError: an unknown kind of source, or one that is damaged, empty or without a column.
    """
    if not isinstance(source, str | Path):
        return [_selected(source_name(source), _frame(source), columns)]
    path = Path(source).expanduser()
    if path.is_dir():
        return [_open_file(file, columns) for file in _parts(path)]
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(
                f"{path} is empty; it should hold a row an event, with at least a user and an item."
            )
        return [_open_file(path, columns)]
    if set("*?[") & set(str(path)):
        raise FileNotFoundError(
            f"There is no file {path}, and patterns are not read; give the folder that holds the "
            "parts."
        )
    if _format(path) in SUFFIXES or path.is_absolute():
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
    return [_selected(str(source), _frame(dataset), columns)]


def source_name(source: Any) -> str:
    """What messages call a source."""
    if isinstance(source, str | Path):
        return str(source)
    kind = type(source)
    return f"The {kind.__module__.split('.')[0]} {kind.__name__}"


def _frame(source: Any) -> pl.LazyFrame:
    if isinstance(source, pl.LazyFrame):
        return source
    try:
        if isinstance(source, Dataset):
            source = source.to_polars()
        elif not hasattr(source, "__arrow_c_stream__"):
            raise TypeError("it is no table")
        return pl.DataFrame(source).lazy()
    except (pl.exceptions.PolarsError, pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(
            f"{source_name(source)} cannot be read as an interaction log "
            f"({str(error).splitlines()[0]}); give a path, or a pandas, polars or Arrow table "
            "whose columns hold one type each."
        ) from error


def _selected(
    source: str | Path, log: pl.LazyFrame, columns: Mapping[str, str], rows: int | None = None
) -> Part:
    _check_columns(source, list(log.collect_schema()), columns)
    path = source if isinstance(source, Path) else None
    return Part(str(source), path, log.select(list(dict.fromkeys(columns.values()))), rows)


def _check_columns(source: str | Path, found: list[str], columns: Mapping[str, str]) -> None:
    for role, column in columns.items():
        if column not in found:
            listed = ", ".join(map(repr, found[:20])) + (", ..." if len(found) > 20 else "")
            advice = "name the right one"
            if len(found) == 1 and (other := [c for c in ";|\t,:" if c in found[0]]):
                advice = f"separate them by commas in .csv and tabs in .tsv, not by {other[0]!r}"
            raise ValueError(
                f"{source} has no column {column!r} for the {role}; its columns are {listed}: "
                f"{advice}."
            )


def _parts(folder: Path) -> list[Path]:
    """The files of a log in a folder."""
    kinds = ", ".join(SUFFIXES)
    below = [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"]
    if below:
        raise ValueError(
            f"The folder {folder} holds the folder {sorted(below)[0]}; the parts of an interaction "
            f"log ({kinds}) lie right in one folder: give that one."
        )
    files = data_files(folder)
    if other := [file.name for file in files if _format(file) not in SUFFIXES]:
        raise ValueError(
            f"The folder {folder} holds {other[0]}, which is no kind of interaction log ({kinds}); "
            "leave it out of the folder."
        )
    formats = sorted({_format(file) for file in files})
    if len(formats) != 1:
        raise ValueError(
            f"The folder {folder} holds {' and '.join(formats) or 'no'} files; an interaction log "
            f"in parts is files of one kind ({kinds})."
        )
    return files


def _format(path: Path) -> str:
    """The ending of a file's name in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS and suffixes[-2] != ".parquet":
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def _open_file(path: Path, columns: Mapping[str, str]) -> Part:
    kind = _format(path)
    try:
        if kind in DELIMITED:
            return _open_delimited(path, kind, columns)
        if kind == ".parquet":
            log = pl.scan_parquet(path, glob=False, hive_partitioning=False)
            return _selected(path, log, columns)
        if kind in SUFFIXES:
            return _open_json(path, columns)
    except READING_ERRORS as error:
        raise unreadable(path, [path], error) from error
    raise ValueError(
        f"{path} ends in {kind!r}; an interaction file ends in {', '.join(SUFFIXES[:-1])} or "
        f"{SUFFIXES[-1]}, and .gz or .zst may follow that of a text file."
    )


def _open_delimited(path: Path, kind: str, columns: Mapping[str, str]) -> Part:
    separator, quotes = DELIMITED[kind]
    found = layout(path, separator, quotes=quotes)
    log = pl.scan_csv(
        path,
        separator=separator,
        quote_char='"' if found.quoted else None,
        infer_schema=False,  # all of it text: "007" is not "7"
        glob=False,
    )
    if found.empty_rows:
        log = log.filter(~pl.all_horizontal(pl.all().is_null()))
    if kind == ".inter":
        log = log.rename({name: name.split(":")[0] for name in log.collect_schema()})
    return _selected(path, log, columns, found.rows)


def _open_json(path: Path, columns: Mapping[str, str]) -> Part:
    with open_bytes(path) as file:
        lines = iter(lambda: file.readline(LONGEST_LINE), b"")
        first = next((line for line in lines if line.removeprefix(BOM).strip()), b"")
    start = first.removeprefix(BOM).lstrip()
    if not start:
        raise ValueError(f"{path} is empty; it should hold a row an event.")
    if start.startswith(b"["):
        with open_bytes(path) as file:
            records = file.read().removeprefix(BOM)
        found = pl.read_json(io.BytesIO(records), infer_schema_length=None).schema
        _check_columns(path, list(found), columns)
        table = pl.read_json(io.BytesIO(records), schema=_as_text(found, columns))
        return Part(str(path), path, table.lazy())
    whole = json.loads(start) if len(first) < LONGEST_LINE else {"": {}}
    if (
        isinstance(whole, dict)
        and whole
        and all(isinstance(v, dict | list) for v in whole.values())
    ):
        raise ValueError(
            f"{path} is one JSON object that holds whole columns, as pandas' to_json writes it; "
            "write a row an event: to_json(..., orient='records', lines=True)."
        )
    source: Any = glob.escape(str(path))  # there is no other way to have it take a path as it is
    if start is not first.lstrip():
        with open_bytes(path) as file:
            source = file.read().removeprefix(BOM)  # the reader does not pass over the mark
    found = pl.scan_ndjson(source, infer_schema_length=10_000).collect_schema()
    _check_columns(path, list(found), columns)
    return Part(str(path), path, pl.scan_ndjson(source, schema=_as_text(found, columns)))


def _as_text(found: pl.Schema, columns: Mapping[str, str]) -> dict[str, pl.DataType]:
    """A schema that reads scalars of JSON as text, in which 7 and 7.0 are both "7"; fractions and
    what is nested stay."""
    kept = {name: found[name] for name in columns.values()}
    return {
        name: kind if kind.is_float() or kind.is_nested() else pl.String()
        for name, kind in kept.items()
    }


def unreadable(source: str | Path, files: Sequence[Path | None], error: Exception) -> Exception:
    """The error to raise where a reader gave up, with the first line that is damaged."""
    if isinstance(error, OSError) and error.filename is not None:
        return error  # the system's, which names the file
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    for path in files:
        if path is not None and (line := _damaged_line(path)):
            return ValueError(
                f"Line {line} of {path} cannot be read as {_format(path)[1:]}: {reason}."
            )
    kind = _format(Path(source))[1:] or "an interaction log"
    return ValueError(f"{source} cannot be read as {kind}: {reason}.")


def _damaged_line(path: Path) -> int | None:
    """The first line of a text file that is not UTF-8, or not JSON where it should be."""
    kind = _format(path)
    if kind not in SUFFIXES or kind == ".parquet":
        return None
    number = 1
    try:
        with open_bytes(path) as file:
            for line in file:
                text = line.decode("utf-8-sig")
                if kind not in DELIMITED and text.strip():
                    json.loads(text)
                number += 1
    except ValueError:
        return number
    except OSError:  # cut off within compressed data
        return None
    return None
