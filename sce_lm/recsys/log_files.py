"""Where interaction logs come from: files, folders of parts, data frames and the hub.

Whatever the source, the columns that are asked for come out lazily and as the source holds them;
columns of text files (csv, tsv, .inter) are text, and so are scalars of JSON, so that no reader
guesses at them.
"""

import glob
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

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
SAMPLE = 10_000
"""Lines of JSON from which the types of its columns are told."""
READING_ERRORS = (
    pl.exceptions.PolarsError,
    pl.exceptions.PanicException,
    pa.ArrowException,
    OSError,
    json.JSONDecodeError,
    UnicodeDecodeError,
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
    library = type(source).__module__.split(".")[0].replace("builtins", "")
    return " ".join(filter(None, ("The", library, type(source).__name__)))


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
    if not found:
        raise ValueError(f"{source} is empty; it should hold a row an event.")
    for role, column in columns.items():
        if column not in found:
            advice = "name the right one"
            if len(found) == 1 and (other := [c for c in ";|\t,:" if c in found[0]]):
                advice = f"separate them by commas in .csv and tabs in .tsv, not by {other[0]!r}"
            elif all(re.fullmatch("[0-9.:-]*", name) for name in found):
                advice = "put a first line with the names of the columns"
            listed = ", ".join(map(repr, found[:20])) + (", ..." if len(found) > 20 else "")
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
    if twice := [c for c in columns.values() if f"{c}_duplicated_0" in log.collect_schema()]:
        raise ValueError(f"{path} has two columns {twice[0]!r}; rename the one that is not meant.")
    if kind == ".inter":
        log = log.rename({name: name.split(":")[0] for name in log.collect_schema()})
    return _selected(path, log, columns, found.rows)


def _open_json(path: Path, columns: Mapping[str, str]) -> Part:
    with open_bytes(path) as file:
        marked = file.peek(len(BOM)).startswith(BOM)
        file.read(len(BOM) if marked else 0)
        first = islice(iter(lambda: file.readline(LONGEST_LINE), b""), SAMPLE)
        lines = [line for line in first if line.strip()]
        if not lines:
            raise ValueError(f"{path} is empty; it should hold a row an event.")
        is_array = lines[0].lstrip().startswith(b"[")
        # The reader of lines takes no mark of byte order, and that of arrays no pieces.
        in_memory = b"".join((*lines, file.read())) if marked or is_array else b""
    if is_array:
        records = json.loads(in_memory)
    elif len(lines[0]) == LONGEST_LINE:  # more than an event
        records = [{"": {}}]
    else:
        records = [json.loads(line) for line in lines]
    if not all(isinstance(record, dict) for record in records):
        raise pl.exceptions.ComputeError("a record is no JSON object")
    if records and records[0] and all(isinstance(v, dict | list) for v in records[0].values()):
        raise ValueError(
            f"{path} is one JSON object that holds whole columns, as pandas' to_json writes it; "
            "write a row an event: to_json(..., orient='records', lines=True)."
        )
    _check_columns(path, list(dict.fromkeys(name for r in records for name in r)), columns)
    schema = {name: _json_type([r.get(name) for r in records]) for name in columns.values()}
    if is_array:
        return Part(str(path), path, pl.read_json(io.BytesIO(in_memory), schema=schema).lazy())
    # Escaped, since this reader takes every path for a pattern.
    return Part(str(path), path, pl.scan_ndjson(in_memory or glob.escape(str(path)), schema=schema))


def _json_type(values: list[Any]) -> pl.DataType:
    """The type to read a column of JSON as: text where it is scalar (7 and 7.0 are both "7"), so
    that no later line fails to be of the type of the first; fractions and what is nested stay."""
    found = pl.Series(values[:SAMPLE], strict=False).dtype
    if found == pl.Object:
        raise pl.exceptions.ComputeError("lists or objects stand among the values of a column")
    return found if found.is_float() or found.is_nested() else pl.String()


def unreadable(source: str | Path, files: Iterable[Path | None], error: Exception) -> Exception:
    """The error to raise where a reader gave up, with the first line that is damaged."""
    if isinstance(error, OSError) and error.filename is not None:
        return error  # the system's, which names the file
    for path in files:
        if path is not None and (found := _damaged_line(path)):
            line, reason = found
            return ValueError(
                f"{path} cannot be read as {_format(path)[1:]}: line {line} is {reason}."
            )
    kind = _format(Path(source))[1:] or "an interaction log"
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return ValueError(f"{source} cannot be read as {kind}: {reason}.")


def _damaged_line(path: Path) -> tuple[int, str] | None:
    """The first line of a file of text that is not UTF-8, or no JSON where each line should be."""
    if _format(path) not in SUFFIXES or _format(path) == ".parquet":
        return None
    number, lines_are_json = 1, _format(path) not in DELIMITED
    try:
        with open_bytes(path) as file:
            for line in file:
                text = line.decode("utf-8-sig").strip()
                if lines_are_json and text.startswith("["):  # an array over all lines
                    return None
                if lines_are_json and text and not isinstance(_strict_json(text), dict):
                    return number, "no JSON object"
                number += 1
    except UnicodeDecodeError:
        return number, "not UTF-8 text"
    except json.JSONDecodeError:
        return number, "no JSON object"
    except OSError:  # cut off within compressed data
        return None
    return None


def _strict_json(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:  # NaN and Infinity, which only Python takes for JSON
        raise json.JSONDecodeError(f"{constant} is no JSON", text, 0)

    return json.loads(text, parse_constant=refuse)
