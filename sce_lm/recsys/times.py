"""Times of events: numbers, dates and text that comes out in order or is refused, never guessed.

Text is a number, ISO 8601 (a date, with or without a time of day and a zone), or written as a
``time_format`` says. Times with a zone become UTC; those without have none, and the two are not
put in one order.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import polars as pl

FORMAT_HINT = "say how they are written with time_format, e.g. '%d/%m/%Y'"
DAY = r"[1-9]\d{3}-\d\d-\d\d"
CLOCK = r"[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?"
ZONE = r" ?(?:[Zz]|[+-]\d\d(?::?\d\d)?)"
NAIVE, ZONED = f"^{DAY}(?:{CLOCK})?$", f"^{DAY}{CLOCK}{ZONE}$"
FINER_THAN_MICROSECONDS = r"\.\d{7,}"
YEARS_IN_NANOSECONDS = range(1678, 2262)
TEXT = pl.col("time")

Reader = Callable[[str], pl.Expr]
"""Text to times with a unit of datetimes ("us" or "ns"); null where it is no such time."""


def time_kind(dtype: pl.DataType, place: str) -> str:
    """What a column's times are: numbers, text, dates (with or without a zone) or durations; times
    of different kinds have no common order.

    Args:
        place: "SOURCE has times in column ...", for messages.

    Raises:
        ValueError: none of these.
    """
    if dtype.is_numeric():
        return "numbers"
    if isinstance(dtype, pl.Datetime):
        return "dates with a zone" if dtype.time_zone else "dates without a zone"
    if dtype == pl.Date:
        return "dates without a zone"
    if dtype == pl.Duration:
        return "durations"
    if dtype in (pl.String, pl.Categorical, pl.Enum, pl.Binary, pl.Null):
        return "text"
    raise ValueError(f"{place} of type {dtype}; give numbers, dates or text.")


def plain_time(time: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Times as int64, float64, datetimes (of UTC, if with a zone), durations or text;
    what is no time, such as NaN and empty text, is missing."""
    if isinstance(dtype, pl.Decimal):
        return time.cast(pl.Float64 if dtype.scale else pl.Int64, strict=False)
    if dtype.is_float():
        time = time.cast(pl.Float64)
        return pl.when(time.is_finite()).then(time)
    if dtype.is_integer():
        return time.cast(pl.Int64, strict=False)
    if isinstance(dtype, pl.Datetime):
        time = time.cast(pl.Datetime("ns" if dtype.time_unit == "ns" else "us", dtype.time_zone))
        return time.dt.convert_time_zone("UTC") if dtype.time_zone else time
    if dtype == pl.Date:
        return time.cast(pl.Datetime("us"))
    if dtype == pl.Duration:
        return time
    text = time.cast(pl.String).str.strip_chars()
    return pl.when(text != "").then(text)


def check_time_format(time_format: str) -> None:
    """Raises ValueError for a format that cannot put events in order."""
    if not re.search(r"%[-_0]?[YyCGgsFDcxv+]", time_format):
        raise ValueError(
            f"time_format {time_format!r} names no year; write it as of strptime, e.g. "
            "'%d/%m/%Y %H:%M'."
        )
    if "%Z" in time_format:
        raise ValueError(
            f"time_format {time_format!r} has %Z, the name of a zone, which cannot be read; write "
            "the times with an offset such as +02:00, which is %z."
        )


def read_text_times(log: pl.LazyFrame, place: str, time_format: str | None = None) -> pl.LazyFrame:
    """Turn a log's text ``time`` into int64, float64 or datetimes, in one streaming pass over it.

    Args:
        place: "SOURCE has times in column ...", for messages.
        time_format: as of ``strptime``; None: numbers or ISO 8601.

    Raises:
        ValueError: times that cannot be read, or that have no common order.
    """
    kinds: dict[str, Reader] = {
        "whole": _whole,
        "numbers": _number,
        "naive": _naive,
        "zoned": _zoned,
    }
    fine = TEXT.str.contains(FINER_THAN_MICROSECONDS).sum()
    if time_format is not None:
        form = _chrono(time_format)
        kinds = {"given": lambda unit: _parsed(TEXT, form, unit)}
        fine = fine if "%." in form else pl.lit(0)
    found = (
        log.select(
            TEXT.count().alias("all"),
            fine.alias("fine"),
            **{name: read("us").count() for name, read in kinds.items()},
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    for name, read in kinds.items():
        if found[name] == found["all"]:
            unit = "us"
            if found["fine"] and name not in ("whole", "numbers"):
                unit = "ns"
                _check_nanoseconds(log.select(time=read("us")), place)
            return log.with_columns(time=read(unit))
    raise ValueError(_complaint(log, kinds, found, place, time_format))


def text_time(text: str) -> pl.Series:
    """A time in words, as a log's text times are read: one number or datetime.

    Raises:
        ValueError: neither a number nor ISO 8601.
    """
    given = pl.DataFrame({"time": [text.strip()]})
    for read in (_whole, _number, _naive, _zoned):
        value = given.select(time=read("us"))["time"]
        if value.null_count() == 0:
            return value
    raise ValueError("it is neither a number nor ISO 8601")


def _whole(_: str) -> pl.Expr:
    return TEXT.cast(pl.Int64, strict=False)


def _number(_: str) -> pl.Expr:
    number = TEXT.cast(pl.Float64, strict=False)
    return pl.when(number.is_finite()).then(number)


def _naive(unit: Any) -> pl.Expr:
    return _iso(NAIVE, ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d"), unit)


def _zoned(unit: Any) -> pl.Expr:
    return _iso(ZONED, ("%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M%#z"), unit)


def _iso(pattern: str, forms: tuple[str, ...], unit: Any) -> pl.Expr:
    text = TEXT.str.replace("^(.{10}) ", "${1}T").str.to_uppercase()
    return pl.when(TEXT.str.contains(pattern)).then(
        pl.coalesce(_parsed(text, form, unit) for form in forms)
    )


def _parsed(text: pl.Expr, form: str, unit: Any) -> pl.Expr:
    return text.str.to_datetime(form, strict=False, time_unit=unit)


def _chrono(time_format: str) -> str:
    """A format of Python's ``strptime`` in the words of polars: its ``%f`` would count nanoseconds,
    and its ``%z`` does not know Z."""
    words = {".%f": "%.f", "%z": "%#z"}
    return re.sub(r"%%|\.%f|%z", lambda found: words.get(found[0], found[0]), time_format)


def _check_nanoseconds(times: pl.LazyFrame, place: str) -> None:
    years = pl.col("time").dt.year()
    first, last = times.select(years.min(), last=years.max()).collect(engine="streaming").row(0)
    if first not in YEARS_IN_NANOSECONDS or last not in YEARS_IN_NANOSECONDS:
        raise ValueError(
            f"{place} with more than 6 digits behind the second, and such years as "
            f" {first if first not in YEARS_IN_NANOSECONDS else last}, which have no room for "
            "nanoseconds; write at most 6 digits."
        )


def _complaint(
    log: pl.LazyFrame,
    kinds: Mapping[str, Reader],
    found: Mapping[str, int],
    place: str,
    time_format: str | None,
) -> str:
    """Why text times were not read, in a sentence."""

    def first(condition: pl.Expr) -> str:
        return repr(log.filter(condition).select("time").first().collect().item())

    total = found["all"]
    if time_format is not None:
        unread = kinds["given"]("us").is_null() & TEXT.is_not_null()
        return (
            f"{place} that are not written as time_format {time_format!r} says "
            f"({total - found['given']} of {total}, the first {first(unread)}); correct it."
        )
    number, naive, zoned = (kinds[k]("us").is_not_null() for k in ("numbers", "naive", "zoned"))
    strange = total - found["numbers"] - found["naive"] - found["zoned"]
    if strange:
        unread = ~(number | naive | zoned) & TEXT.is_not_null()
        return (
            f"{place} that are neither numbers nor ISO 8601 ({strange} of {total}, the first "
            f"{first(unread)}), and a guess may put them in a wrong order; {FORMAT_HINT}."
        )
    if found["numbers"]:
        return (
            f"{place} that are numbers ({first(number)}) and others that are dates "
            f"({first(naive | zoned)}), which have no common order; write them alike."
        )
    return (
        f"{place} with a zone ({first(zoned)}) and others without ({first(naive)}), which have no "
        "common order; write the zone of all, or of none."
    )
