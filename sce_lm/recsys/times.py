"""Times of events: numbers, dates and text that comes out in order or is refused, never guessed.

Text is a number, ISO 8601 (a date, with or without a time of day and a zone), or written as a
``time_format`` says. Times with a zone become UTC; those without have none, and the two are not
put in one order.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import polars as pl

DAY, MINUTE, SECOND = r"[1-9]\d{3}-\d\d-\d\d", r"[T ]\d\d:\d\d", r":\d\d(?:\.\d{1,9})?"
ZONE = r"(?:Z|[+-]\d\d(?::?\d\d)?)"
NAIVE = {
    f"^{DAY}$": "%Y-%m-%d",
    f"^{DAY}{MINUTE}$": "%Y-%m-%dT%H:%M",
    f"^{DAY}{MINUTE}{SECOND}$": "%Y-%m-%dT%H:%M:%S%.f",
}
ZONED = {
    f"^{DAY}{MINUTE}{ZONE}$": "%Y-%m-%dT%H:%M%#z",
    f"^{DAY}{MINUTE}{SECOND}{ZONE}$": "%Y-%m-%dT%H:%M:%S%.f%#z",
}
"""ISO 8601 as patterns of text, and the format that polars reads each by (with T for a space)."""
FINER_THAN_MICROSECONDS = r"\.\d{7,}"
YEARS_IN_NANOSECONDS = range(1678, 2262)

TEXT = pl.col("time")
WHOLE = TEXT.cast(pl.Int64, strict=False)
NUMBER = TEXT.cast(pl.Float64, strict=False)
NUMBER = pl.when(NUMBER.is_finite()).then(NUMBER)


def time_kind(dtype: pl.DataType, place: str) -> str:
    """What a column's times are: numbers, text, dates (with or without a zone) or durations, empty
    where all are missing; times of different kinds have no common order.

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
    if dtype == pl.Null:
        return ""
    if dtype in (pl.String, pl.Categorical, pl.Enum, pl.Binary):
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
    if dtype in (pl.Duration, pl.Null):
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
    if re.search(r"(?<!\.)%f", time_format):
        raise ValueError(
            f"time_format {time_format!r} has %f without a point before it; fractions of a second "
            "are read behind one, as in '%S.%f'."
        )
    if "%Z" in time_format:
        raise ValueError(
            f"time_format {time_format!r} has %Z, the name of a zone, which cannot be read; write "
            "the times with an offset such as +02:00, which is %z."
        )


def read_text_times(log: pl.LazyFrame, place: str, time_format: str | None = None) -> pl.LazyFrame:
    """Turn a log's text ``time`` into int64, float64 or datetimes, after a streaming pass over it.

    Args:
        place: "SOURCE has times in column ...", for messages.
        time_format: as of ``strptime``; None: numbers or ISO 8601.

    Raises:
        ValueError: times that are written otherwise, or that have no common order.
    """
    if time_format is not None:
        text, forms = TEXT, {"given": _polars_format(time_format)}
        readable = {"given": _dates(text, forms.values()).is_not_null()}
    else:
        text, forms = TEXT.str.replace(" ", "T", literal=True), NAIVE | ZONED
        readable = {"whole": WHOLE.is_not_null(), "number": NUMBER.is_not_null()}
        readable |= {pattern: TEXT.str.contains(pattern) for pattern in forms}
    found = (
        log.select(
            TEXT.count().alias("all"),
            TEXT.str.contains(FINER_THAN_MICROSECONDS).any().alias("finer"),
            **{name: is_so.sum() for name, is_so in readable.items()},
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    if found["all"] in (0, found.get("whole")):
        return log.with_columns(time=WHOLE)
    if found["all"] == found.get("number"):
        return log.with_columns(time=NUMBER)
    for kind in (NAIVE, ZONED, ("given",)):
        used = [name for name in kind if found.get(name)]
        if found["all"] == sum(found[name] for name in used):
            read = [forms[name] for name in used]
            nanoseconds = found["finer"] and any("%.f" in form for form in read)
            if nanoseconds:
                _check_nanoseconds(log.select(time=_dates(text, read)), place)
            return log.with_columns(time=_dates(text, read, "ns" if nanoseconds else "us"))
    raise ValueError(_complaint(log, readable, place, time_format))


def text_time(text: str) -> pl.Series:
    """A time in words, read as a log's text times are: one number or datetime.

    Raises:
        ValueError: neither a number nor ISO 8601, or no day of the calendar.
    """
    frame = pl.LazyFrame({"time": [text.strip()]})
    try:
        value = read_text_times(frame, "One has times").collect()["time"]
    except ValueError as error:
        raise ValueError("it is neither a number nor ISO 8601") from error
    if value.null_count():
        raise ValueError("there is no such time")
    return value


def _dates(text: pl.Expr, forms: Iterable[str], unit: Literal["us", "ns"] = "us") -> pl.Expr:
    """Text as datetimes by the first of the formats that fits; null by none."""
    return pl.coalesce(text.str.to_datetime(form, strict=False, time_unit=unit) for form in forms)


def _polars_format(time_format: str) -> str:
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
            f"{first if first not in YEARS_IN_NANOSECONDS else last}, which have no room for "
            "nanoseconds; write at most 6 digits."
        )


def _complaint(
    log: pl.LazyFrame, readable: Mapping[str, pl.Expr], place: str, time_format: str | None
) -> str:
    """Why text times were not read, in a sentence."""

    def those(condition: pl.Expr) -> str:
        found = log.filter(condition).select(TEXT.len(), first=TEXT.first())
        number, first = found.collect(engine="streaming").row(0)
        return f"({number}, the first {first!r})" if number else ""

    if unread := those(~pl.any_horizontal(readable.values()) & TEXT.is_not_null()):
        if time_format is not None:
            return f"{place} that are not written as time_format {time_format!r} says {unread}."
        return (
            f"{place} that are neither numbers nor ISO 8601 {unread}, and a guess may put them in "
            "a wrong order; say how they are written with time_format, e.g. '%d/%m/%Y'."
        )
    kinds = {
        "numbers": those(readable["number"]),
        "dates without a zone": those(pl.any_horizontal(readable[name] for name in NAIVE)),
        "dates with a zone": those(pl.any_horizontal(readable[name] for name in ZONED)),
    }
    mixed = " and ".join(f"{kind} {those}" for kind, those in kinds.items() if those)
    return f"{place} that are {mixed}, which have no common order; write them alike."
