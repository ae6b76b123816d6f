"""Times of events: numbers, dates and text that comes out in order or is refused, never guessed.

Text is a number, ISO 8601 (a date, with or without a time of day and a zone), or written as a
``time_format`` says. Times with a zone become UTC; those without have none, and the two are not
put in one order.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import polars as pl

DAY, MINUTE, SECOND = r"[1-9]\d{3}-\d\d-\d\d", r"[T ]\d\d:\d\d", r":\d\d(?:\.\d{1,9})?"
ZONE = r"(?:Z|[+-]\d\d(?::?\d\d)?)"
NAIVE = {
    "%Y-%m-%d": f"^{DAY}$",
    "%Y-%m-%dT%H:%M": f"^{DAY}{MINUTE}$",
    "%Y-%m-%dT%H:%M:%S%.f": f"^{DAY}{MINUTE}{SECOND}$",
}
ZONED = {
    "%Y-%m-%dT%H:%M%#z": f"^{DAY}{MINUTE}{ZONE}$",
    "%Y-%m-%dT%H:%M:%S%.f%#z": f"^{DAY}{MINUTE}{SECOND}{ZONE}$",
}
"""ISO 8601: formats that polars reads (with T for a space), and the texts that are of each."""
FINER_THAN_MICROSECONDS = r"\.\d{7,}"
YEARS_IN_NANOSECONDS = range(1678, 2262)
EPOCHS = range(315_532_800, 4_102_444_800)
"""Seconds from 1970 to 1980 and to 2100."""

TEXT = pl.col("time")
NUMBER = TEXT.cast(pl.Float64, strict=False)
NUMBERS = {
    "whole": TEXT.cast(pl.Int64, strict=False),
    "number": pl.when(NUMBER.is_finite()).then(NUMBER),
}
"""Text as numbers, null where it is none."""


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


def text_time_facts(time_format: str | None = None) -> pl.Expr:
    """What :func:`text_times` has to know of all text times of a log: a struct, for one pass.

    Args:
        time_format: as of ``strptime``; None: numbers or ISO 8601.
    """
    facts = {"all": TEXT.count(), "finer": TEXT.str.contains(FINER_THAN_MICROSECONDS).any()}
    if time_format is None:
        facts |= {name: number.count() for name, number in NUMBERS.items()}
    for form, is_of_form in _forms(time_format).items():
        dates = _dates(_text(time_format).filter(is_of_form), [form])
        year = dates.dt.year()
        facts[form] = pl.struct(
            count=is_of_form.sum(), read=dates.count(), first=year.min(), last=year.max()
        )
    return pl.struct(fact.alias(name) for name, fact in facts.items())


def text_times(
    found: Mapping[str, Any], log: pl.LazyFrame, place: str, time_format: str | None = None
) -> tuple[pl.Expr, int]:
    """A log's text ``time`` as int64, float64 or datetimes, and how many are on no calendar.

    Args:
        found: of :func:`text_time_facts`, for the same ``time_format``.
        log: read again for the message of an error.
        place: "SOURCE has times in column ...", for messages.

    Raises:
        ValueError: times that are written otherwise, or that have no common order.
    """
    for name, number in NUMBERS.items():
        if found["all"] in (0, found.get(name)):
            return number, 0
    for kind in (NAIVE, ZONED) if time_format is None else (_forms(time_format),):
        used = {form: found[form] for form in kind if found[form]["count"]}
        if found["all"] != sum(facts["count"] for facts in used.values()):
            continue
        nanoseconds = found["finer"] and any("%.f" in form for form in used)
        years = [
            facts[end] for facts in used.values() if facts["read"] for end in ("first", "last")
        ]
        if nanoseconds and (outside := set(years) - set(YEARS_IN_NANOSECONDS)):
            raise ValueError(
                f"{place} with more than 6 digits behind the second, and such years as "
                f"{min(outside)}, which have no room for nanoseconds; write at most 6 digits."
            )
        unread = sum(facts["count"] - facts["read"] for facts in used.values())
        return _dates(_text(time_format), used, "ns" if nanoseconds else "us"), unread
    raise ValueError(_complaint(log, place, time_format))


def units_of_a_day(times: pl.Series) -> int | None:
    """How much a log's times grow in a day; None for numbers that are no epochs.

    Numbers that are dates between 1980 and 2100 as seconds, or as milli-, micro- or nanoseconds,
    since 1970 are taken for these: no number is in two of the four ranges.
    """
    parts = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    if isinstance(times.dtype, pl.Datetime | pl.Duration):
        return 86_400 * parts[times.dtype.time_unit]
    for part in parts.values():
        if times.is_between(EPOCHS.start * part, EPOCHS.stop * part).all():
            return 86_400 * part
    return None


def text_time(text: str) -> pl.Series:
    """A time in words, read as a log's text times are: one number or datetime.

    Raises:
        ValueError: neither a number nor ISO 8601, or no day of the calendar.
    """
    frame = pl.DataFrame({"time": [text.strip()]})
    found = frame.select(text_time_facts()).item()
    try:
        times, unread = text_times(found, frame.lazy(), "One has times")
    except ValueError as error:
        raise ValueError("it is neither a number nor ISO 8601") from error
    if unread:
        raise ValueError("there is no such time")
    return frame.select(times).to_series()


def _text(time_format: str | None) -> pl.Expr:
    return TEXT if time_format is not None else TEXT.str.replace(" ", "T", literal=True)


def _forms(time_format: str | None) -> dict[str, pl.Expr]:
    """The formats that times may have, as polars reads them, and which texts are of each."""
    if time_format is None:
        return {form: TEXT.str.contains(text) for form, text in (NAIVE | ZONED).items()}
    # The words of polars: its %f would count nanoseconds, and its %z does not know Z.
    words = {".%f": "%.f", "%z": "%#z"}
    form = re.sub(r"%%|\.%f|%z", lambda found: words.get(found[0], found[0]), time_format)
    return {form: _dates(TEXT, [form]).is_not_null()}


def _dates(text: pl.Expr, forms: Iterable[str], unit: Literal["us", "ns"] = "us") -> pl.Expr:
    """Text as datetimes by the first of the formats that fits; null by none."""
    return pl.coalesce(text.str.to_datetime(form, strict=False, time_unit=unit) for form in forms)


def _complaint(log: pl.LazyFrame, place: str, time_format: str | None) -> str:
    """Why text times were not read, in a sentence."""
    forms = _forms(time_format)

    def those(condition: pl.Expr) -> str:
        found = log.filter(condition).select(TEXT.len(), first=TEXT.first())
        number, first = found.collect(engine="streaming").row(0)
        return f"({number}, the first {first!r})" if number else ""

    is_number = NUMBERS["number"].is_not_null()
    readable = pl.any_horizontal(forms.values())
    if time_format is not None:
        unread = those(~readable & TEXT.is_not_null())
        return f"{place} that are not written as time_format {time_format!r} says {unread}."
    if unread := those(~(readable | is_number) & TEXT.is_not_null()):
        return (
            f"{place} that are neither numbers nor ISO 8601 {unread}, and a guess may put them in "
            "a wrong order; say how they are written with time_format, e.g. '%d/%m/%Y'."
        )
    kinds = {
        "numbers": those(is_number),
        "dates without a zone": those(pl.any_horizontal(forms[form] for form in NAIVE)),
        "dates with a zone": those(pl.any_horizontal(forms[form] for form in ZONED)),
    }
    mixed = " and ".join(f"{kind} {those}" for kind, those in kinds.items() if those)
    return f"{place} that are {mixed}, which have no common order; write them alike."
