"""The rows of a csv or tsv file, seen once as bytes before a fast reader takes them.

Fast readers let a stray quotation mark swallow rows and fill short rows up. Here quotation marks
must close and each row must have as many fields as the header, or the file is refused with the
line. A file is read a few megabytes at a time, whatever its size.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

CHUNK = 1 << 22
LONGEST_ROW = 1 << 27
RULE = "quotation marks go around a whole field and are doubled inside of it"

Quotes = Literal["always", "where consistent", "never"]
QUOTE, NEWLINE, RETURN = b'"\n\r'
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Layout:
    """How the rows of a delimited file are to be read."""

    quoted: bool
    """Whether quotation marks enclose fields; False: they are text."""
    rows: int
    """Rows below the header, without the empty ones."""
    empty_rows: int
    """Rows of nothing, or of separators only, as blank lines and spreadsheets leave them."""


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file, decompressed where it begins as gzip or Zstandard files do."""
    with path.open("rb") as file:
        start = file.read(4)
    kind = {b"\x1f\x8b": "gzip"}.get(start[:2]) or {b"(\xb5/\xfd": "zstd"}.get(start)
    if kind is None:
        return path.open("rb")
    stream: Any = pa.input_stream(str(path), compression=kind)
    return io.BufferedReader(stream)


def layout(path: Path, separator: str, *, quotes: Quotes) -> Layout:
    """Read a file once and see that its rows are whole.

    Args:
        path: the file, which may be compressed.
        separator: one ASCII character.
        quotes: "always": as of RFC 4180, around a whole field, over the ends of lines too, and
            doubled inside of it. "where consistent": the same within a line, and text where any
            of them are not so. "never": text.

    Raises:
        ValueError: quotation marks that do not close, a row with more or fewer fields than the
            header, or bytes that are no text, with the line.
    """
    if quotes == "where consistent":
        try:
            return _layout(path, ord(separator), quoted=True, within_lines=True)
        except ValueError:
            quotes = "never"
    return _layout(path, ord(separator), quoted=quotes == "always")


def _layout(path: Path, separator: int, *, quoted: bool, within_lines: bool = False) -> Layout:
    fields = rows = empty_rows = 0
    for line, data, inside in _whole_rows(path, separator, quoted):
        newline = data == NEWLINE
        if within_lines and (newline & inside).any():
            raise ValueError(f"{path} has quotation marks that go over the end of a line.")
        ends = np.flatnonzero(newline & ~inside)
        starts = np.concatenate(([0], ends[:-1] + 1))
        lengths = ends - starts
        returned = (lengths > 0) & (data[ends - 1] == RETURN)
        lengths -= returned
        doubled = np.flatnonzero(returned & (data[ends - 2] == RETURN))
        if len(doubled):
            raise ValueError(
                f"Line {line + _newlines(data[: ends[doubled[0]]])} of {path} ends in two carriage "
                "returns; save it with a newline, or one carriage return and a newline, at the end "
                "of each line."
            )
        separators = np.flatnonzero((data == separator) & ~inside)
        num_fields = 1 + np.diff(np.searchsorted(separators, ends), prepend=0)
        if not fields:
            fields = int(num_fields[0])
            if (data[: lengths[0]] == RETURN).any():
                raise ValueError(
                    f"Line {line} of {path} has a carriage return within; save it with a newline, "
                    "or one carriage return and a newline, at the end of each line."
                )
        wrong = np.flatnonzero((num_fields != fields) & (lengths > 0))
        if len(wrong):
            row = wrong[0]
            raise ValueError(
                f"Line {line + _newlines(data[: starts[row]])} of {path} and its header differ in "
                f"their numbers of fields, {num_fields[row]} and {fields}; correct the line."
            )
        empty = (lengths == 0) | (lengths == num_fields - 1)
        rows += int((~empty).sum())
        empty_rows += int(empty.sum())
    if not fields:
        raise ValueError(
            f"{path} is empty; it should name its columns and hold a row an event, with at least a "
            "user and an item."
        )
    return Layout(quoted, rows - 1, empty_rows)


def _whole_rows(
    path: Path, separator: int, quoted: bool
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Whole rows, a few megabytes at a time, from the header on: the line that they begin on (from
    1), their bytes (uint8, the last a newline) and which of these are in quotation marks (bool)."""
    line, rest, at_header = 1, b"", True
    with open_bytes(path) as file:
        while True:
            block = file.read(CHUNK)
            buffer = rest + block
            if at_header:
                header = buffer.removeprefix(BOM).lstrip(b"\r\n")
                line += buffer.count(b"\n") - header.count(b"\n")
                buffer, at_header = header, not header
            if not block:
                if not buffer:
                    return
                buffer += b"\n"
            data = np.frombuffer(buffer, np.uint8)
            if (place := buffer.find(b"\0")) >= 0:
                raise ValueError(
                    f"Line {line + buffer.count(10, 0, place)} of {path} has a zero byte; save it "
                    "as UTF-8 text."
                )
            inside = np.zeros(len(data), bool)
            if quoted and QUOTE in buffer:
                inside = np.cumsum(data == QUOTE, dtype=np.uint8) % 2 == 1
                _check_quotes(data, inside, separator, path, line)
            ends = np.flatnonzero((data == NEWLINE) & ~inside)
            whole = int(ends[-1]) + 1 if len(ends) else 0
            if whole:
                yield line, data[:whole], inside[:whole]
                line += _newlines(data[:whole])
            rest = buffer[whole:]
            if rest and (not block or len(rest) > LONGEST_ROW):
                raise ValueError(
                    f"The row that begins on line {line} of {path} does not end: a quotation mark "
                    f"in it does not close; {RULE}."
                )
            if not block:
                return


def _check_quotes(
    data: np.ndarray, inside: np.ndarray, separator: int, path: Path, line: int
) -> None:
    """See that quotation marks open behind a separator and close before one, or are doubled."""
    quotes = np.flatnonzero(data == QUOTE)
    opening = inside[quotes]
    before = np.where(quotes > 0, data[quotes - 1], NEWLINE)
    after = data[np.minimum(quotes + 1, len(data) - 1)]  # the last may be seen again with more
    neighbour = np.where(opening, before, after)
    edge = np.zeros(256, bool)
    edge[[separator, NEWLINE, RETURN, QUOTE]] = True
    right = edge[neighbour]
    if not right.all():
        wrong = int(np.argmin(right))
        place = quotes[wrong] if opening[wrong] else quotes[wrong - 1]
        raise ValueError(
            f"The quotation marks on line {line + _newlines(data[:place])} of {path} do not "
            f"enclose a field; {RULE}."
        )


def _newlines(data: np.ndarray) -> int:
    return int((data == NEWLINE).sum())
