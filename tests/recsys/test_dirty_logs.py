"""One set of events in every form that people keep them in: the same events come back, or one
sentence that names the source."""

import csv
import decimal
import gzip
import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sce_lm.recsys import read_interactions

NAMES = ("user_id", "item_id", "when")
TABLES = ("polars", "lazy polars", "pandas", "arrow")
TYPED = (".parquet", *TABLES)
JSON = (".json", ".jsonl", ".ndjson", "array.json")
QUOTED = (".csv",)
PLAIN = (".tsv", ".inter")

TEXT = st.text(
    st.characters(
        exclude_categories=["Cs"], exclude_characters="\0", include_characters='",;\t\n\r'
    ),
    min_size=1,
    max_size=5,
)
"""Ids as people make them, separators, quotation marks and ends of lines included."""


def epoch(moment: datetime) -> int:
    """Microseconds since 1970, of a time without a zone as if of UTC."""
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


@dataclass(frozen=True)
class Times:
    """A way to write times: a value of each time, and a function back to microseconds."""

    write: Any
    factor: int = 1
    """Microseconds in one, where numbers are written."""
    typed_only: bool = False


TIMES = {
    "iso": Times(lambda t, zone: t.isoformat("T")),
    "iso with a space": Times(lambda t, zone: t.isoformat(" ")),
    "zones": Times(lambda t, zone: t.replace(tzinfo=UTC).astimezone(zone).isoformat()),
    "zulu": Times(lambda t, zone: t.isoformat() + "Z"),
    "seconds": Times(lambda t, zone: epoch(t) // 10**6, factor=10**6),
    "milliseconds": Times(lambda t, zone: epoch(t) // 10**3, factor=10**3),
    "float seconds": Times(lambda t, zone: epoch(t) / 10**6, factor=10**6),
    "datetimes": Times(lambda t, zone: t, typed_only=True),
    "datetimes of UTC": Times(lambda t, zone: t.replace(tzinfo=UTC), typed_only=True),
    "decimals": Times(lambda t, zone: decimal.Decimal(epoch(t)) / 10**6, 10**6, typed_only=True),
}

IDS = {
    "text": TEXT,
    "whole numbers": st.integers(-(2**62), 2**62),
    "whole floats": st.integers(-(2**53), 2**53).map(float),
}


@st.composite
def logs(draw) -> tuple[list[tuple], dict[str, Any]]:
    """Rows of (user, item, time) as they are to be written, and how."""
    form = draw(st.sampled_from([*QUOTED, *PLAIN, *JSON, *TYPED]))
    kind = draw(st.sampled_from(list(IDS)))
    ids = IDS[kind]
    if form in PLAIN:  # where neither tabs nor ends of lines nor marks around a field have a place
        ids = ids.filter(
            lambda i: not (isinstance(i, str) and (set("\t\n\r") & set(i) or i[0] == '"'))
        )
    how = draw(st.sampled_from([t for t in TIMES if form in TYPED or not TIMES[t].typed_only]))
    moments = st.datetimes(datetime(1971, 1, 1), datetime(2100, 1, 1)).map(
        lambda t: t.replace(microsecond=t.microsecond // 1000 * 1000 if how != "seconds" else 0)
    )
    zones = st.sampled_from([0, 60, -210, 345]).map(lambda m: timezone(timedelta(minutes=m)))
    event = st.tuples(
        ids, ids, st.tuples(moments, zones).map(lambda p: (p[0], TIMES[how].write(*p)))
    )
    return draw(st.lists(event, min_size=1, max_size=6)), {
        "form": form,
        "how": how,
        "ids": kind,
        "ending": draw(st.sampled_from(["\n", "\r\n"])),
        "quoting": draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        "bom": draw(st.booleans()),
        "blank": draw(st.booleans()),
        "compress": draw(st.sampled_from(["", ".gz", ".zst"])),
        "upper": draw(st.booleans()),
        "order": draw(st.permutations((*NAMES, "title"))),
        "parts": draw(st.booleans()),
        "missing": draw(st.one_of(st.none(), st.sampled_from(NAMES))),
    }


def written(records: list[dict], how: dict[str, Any], path: Path) -> Path:
    """A file of records; its name is ``path`` and the ending of its form."""
    form = how["form"]
    path = path.with_name(path.name + form)
    if form == ".parquet":
        table(records, how).write_parquet(path)
        return path
    if form in JSON:
        lines = [json.dumps(record, ensure_ascii=how["blank"]) for record in records]
        text = how["ending"].join(lines)
        if form == "array.json":
            text = "[" + ",\n".join(lines) + "]"
    else:
        buffer = io.StringIO(newline="")
        columns = list(records[0])
        if form in QUOTED:
            writer = csv.writer(buffer, quoting=how["quoting"], lineterminator=how["ending"])
            writer.writerows([columns, *(record.values() for record in records)])
        else:
            types = {"user_id": ":token", "item_id": ":token", "when": ":float", "title": ":token"}
            names = [c + types[c] for c in columns] if form == ".inter" else columns
            rows = [names, *([as_field(v) for v in r.values()] for r in records)]
            buffer.write("".join("\t".join(row) + how["ending"] for row in rows))
        text = buffer.getvalue()
        if how["blank"]:
            text = how["ending"] + text + how["ending"]
    data = text.encode("utf-8-sig" if how["bom"] else "utf-8")
    path = path.with_name(path.name + how["compress"])
    if how["upper"]:
        path = path.with_name(path.name.upper())
    compressed = {".gz": gzip.compress, ".zst": lambda d: pa.compress(d, "zstd", asbytes=True)}
    path.write_bytes(compressed.get(how["compress"], bytes)(data))
    return path


def as_field(value: Any) -> str:
    return "" if value is None else str(value)


def table(records: list[dict], how: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame({name: [record[name] for record in records] for name in records[0]})


def source_of(records: list[dict], how: dict[str, Any], folder: Path) -> Any:
    match how["form"]:
        case "polars":
            return table(records, how)
        case "lazy polars":
            return table(records, how).lazy()
        case "pandas":
            return pd.DataFrame(records)
        case "arrow":
            return table(records, how).to_arrow()
    if not how["parts"]:
        return written(records, how, folder / "log[1]")
    whole = folder / "l*g"
    whole.mkdir()
    (whole / "_SUCCESS").touch()
    (whole / ".DS_Store").write_bytes(b"\0\1")
    (whole / "part-7.csv").touch()  # an empty one
    middle = (len(records) + 1) // 2
    written(records[:middle], how, whole / "part-9-")
    if records[middle:]:
        written(records[middle:], how, whole / "part-10-")
    return whole


def sentence(error: Exception, source: Any) -> str:
    """The message of an error, which is one sentence about the source."""
    message = str(error)
    assert message.endswith(".")
    assert "\n" not in message
    assert str(source) in message if isinstance(source, Path) else type(source).__name__ in message
    return message


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    number = count()

    def folder() -> Path:
        return tmp_path_factory.mktemp(f"log{next(number)}")

    return folder


@settings(max_examples=150)
@given(logs())
def test_the_same_events_come_back_from_every_form(folders, drawn):
    events, how = drawn
    records = [
        {name: row[name] for name in how["order"]}
        for user, item, (_, when) in events
        for row in [{"user_id": user, "item_id": item, "when": when, "title": '12" "single'}]
    ]
    if how["form"] in QUOTED:
        records[-1]["title"] = 'a "b",\r\nc\td'
    if how["missing"]:
        records[len(records) // 2][how["missing"]] = None
    source = source_of(records, how, folders())
    columns = {"user": "user_id", "item": "item_id", "time": "when"}
    if how["missing"]:
        with pytest.raises(ValueError, match=f"column '{how['missing']}'") as caught:
            read_interactions(source, **columns)
        assert f"in 1 of {len(records)} rows" in sentence(caught.value, source)
        return
    found = read_interactions(source, **columns).collect()
    names = [tuple(str(int(i) if isinstance(i, float) else i) for i in row[:2]) for row in events]
    assert found.select("user", "item").rows() == names
    times = found["time"]
    if times.dtype.is_temporal():
        assert (times.dtype.time_zone == "UTC") == (
            how["how"] in ("zones", "zulu", "datetimes of UTC")
        )
        micros = times.dt.timestamp("us").to_list()
    else:
        micros = [round(t * TIMES[how["how"]].factor) for t in times]
    assert micros == [epoch(moment) for _, _, (moment, _) in events]


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".csv.zst"])
@settings(max_examples=25)
@given(data=st.data())
def test_a_damaged_csv_is_refused_with_the_line(folders, ending, data):
    """A mark that opens nothing, a field too many and a field too few."""
    rows = data.draw(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5))
    bad = data.draw(st.integers(0, len(rows) - 1))
    damage = data.draw(st.sampled_from(["mark", "field", "cut"]))
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*NAMES[:2], "title"])
    for number, row in enumerate(rows):
        if number == bad:
            line = buffer.getvalue().count("\n") + 1
            row = {"mark": row, "field": (*row, "x"), "cut": row[:2]}[damage]
            if damage == "mark":
                buffer.write('x"y,')
        writer.writerow(row)
    path = folders() / f"log{ending}"
    content = buffer.getvalue().encode()
    packed = {".gz": gzip.compress, ".zst": lambda d: pa.compress(d, "zstd", asbytes=True)}
    path.write_bytes(packed.get(path.suffix, bytes)(content))
    with pytest.raises(ValueError, match=f"ine {line} of") as caught:
        read_interactions(path)
    sentence(caught.value, path)


@settings(max_examples=40)
@given(
    cut=st.integers(1, 400), form=st.sampled_from([".csv.gz", ".jsonl.gz", ".jsonl", ".parquet"])
)
def test_a_file_that_was_cut_off_is_refused(folders, cut, form):
    events = [{"user_id": f"user {u}", "item_id": f"{u * u % 97} café"} for u in range(40)]
    how = {"form": form.removesuffix(".gz"), "ending": "\n", "quoting": csv.QUOTE_MINIMAL}
    how |= {"bom": False, "blank": True, "compress": ".gz" * form.endswith("gz"), "upper": False}
    path = written(events, how, folders() / "log")
    data = path.read_bytes()
    cut = min(cut, len(data) - 1)
    path.write_bytes(data[: len(data) - cut])
    try:
        found = read_interactions(path).collect().rows()
    except ValueError as error:
        sentence(error, path)
    else:  # whole lines of JSON are left
        assert form == ".jsonl"
        assert data[-cut:].startswith((b"{", b"\n"))
        assert len(found) == 40 - data[-cut:].count(b"{")
