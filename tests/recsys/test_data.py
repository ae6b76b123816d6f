import datetime
import gzip
from decimal import Decimal
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from datasets import Dataset

from sce_lm.recsys import build_item_tokenizer, catalogue, read_interactions, user_sequences

LOG = pl.DataFrame(
    {
        "who": [7, 3, 7, 3, 7, 3, 9, 7],
        "what": ["c", "a", "b", "b", "a c", "d", "a", "d"],
        "when": [30, 5, 10, 5, 20, 4, 1, 20],
    }
)


def write(frame: pl.DataFrame, path):
    writers = {
        ".csv": frame.write_csv,
        ".parquet": frame.write_parquet,
        ".jsonl": frame.write_ndjson,
        ".tsv": lambda path: frame.write_csv(path, separator="\t"),
    }
    writers[path.suffix](path)
    return path


def sequences_by_user(log: pl.LazyFrame) -> dict[str, list[str]]:
    tokenizer = build_item_tokenizer(catalogue(log))
    rows = user_sequences(log, tokenizer).select("user", "items").rows()
    return {user: tokenizer.convert_ids_to_tokens(items) for user, items in rows}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_every_format_gives_the_same_sequences(tmp_path, suffix):
    path = write(LOG, tmp_path / f"log{suffix}")
    log = read_interactions(path, user="who", item="what", time="when")
    assert dict(log.collect_schema())["user"] == pl.String
    assert sequences_by_user(log) == {
        "7": ["b", "a c", "d", "c"],  # "a c" and "d" share a time: the order of the file
        "3": ["d", "a", "b"],
        "9": ["a"],
    }


def test_without_a_time_column_the_order_is_the_files(tmp_path):
    path = write(LOG, tmp_path / "log.parquet")
    log = read_interactions(path, user="who", item="what")
    assert sequences_by_user(log) == {"7": ["c", "b", "a c", "d"], "3": ["a", "b", "d"], "9": ["a"]}


def test_many_ties_keep_the_order_of_the_file(tmp_path):
    frame = pl.DataFrame(
        {"user_id": [1] * 5000, "item_id": range(5000), "t": [0] * 2500 + [-1] * 2500}
    )
    log = read_interactions(write(frame, tmp_path / "log.parquet"), time="t")
    expected = [str(item) for item in (*range(2500, 5000), *range(2500))]
    assert sequences_by_user(log) == {"1": expected}


def test_ids_in_text_files_stay_text(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id\n01,007\n1,7\n")
    log = read_interactions(tmp_path / "log.csv")
    assert log.collect().rows() == [("01", "007"), ("1", "7")]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_dates_order_events(tmp_path, suffix):
    times = [datetime.datetime(2024, 5, 2, 10), datetime.datetime(2024, 5, 1, 23, 59, 59)]
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["late", "early"], "t": times})
    log = read_interactions(write(frame, tmp_path / f"log{suffix}"), time="t")
    assert sequences_by_user(log) == {"u": ["early", "late"]}


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_missing_column_is_named_with_those_present(tmp_path, suffix):
    path = write(LOG, tmp_path / f"log{suffix}")
    with pytest.raises(
        ValueError, match="no column 'item_id' for the item; its columns are 'who', 'what', 'when'"
    ):
        read_interactions(path, user="who")
    with pytest.raises(ValueError, match="no column 'ts' for the time"):
        read_interactions(path, user="who", item="what", time="ts")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_an_empty_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"log{suffix}"
    path.touch()
    with pytest.raises(ValueError, match="is empty"):
        read_interactions(path)


def test_a_file_without_events_is_refused(tmp_path):
    for suffix in (".csv", ".parquet"):
        path = write(LOG.clear(), tmp_path / f"log{suffix}")
        with pytest.raises(ValueError, match="columns but no events"):
            read_interactions(path, user="who", item="what", time="when")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_damaged_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"log{suffix}"
    path.write_text('{"user_id": 1, "item_id": 2}\n{"user_id": 1, "ite')
    with pytest.raises(ValueError, match=f"cannot be read as {suffix[1:]}"):
        read_interactions(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_interactions(tmp_path / "log.csv")
    (tmp_path / "log.xlsx").write_text("x")
    with pytest.raises(
        ValueError, match=r"ends in '.xlsx'; an interaction file ends in .csv, .tsv"
    ):
        read_interactions(tmp_path / "log.xlsx")


def test_missing_values_are_counted(tmp_path):
    frame = LOG.with_columns(what=pl.when(pl.col("what") == "a").then(None).otherwise("what"))
    path = write(frame, tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=r"no readable item \(column 'what'\) in 2 of 8 rows"):
        read_interactions(path, user="who", item="what")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("times", [["2024-05-01", "soon"], ["soon", "late"]])
def test_unreadable_times_are_refused(tmp_path, suffix, times):
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "t": times})
    with pytest.raises(ValueError, match="column 't'"):
        read_interactions(write(frame, tmp_path / f"log{suffix}"), time="t")


def test_a_folder_of_parts_is_read_in_order_of_names(tmp_path):
    write(LOG.tail(3), tmp_path / "b.csv")
    write(LOG.head(5), tmp_path / "a.csv")
    log = read_interactions(tmp_path, user="who", item="what")
    assert log.collect()["item"].to_list() == LOG["what"].to_list()
    write(LOG, tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"holds .csv and .parquet files"):
        read_interactions(tmp_path, user="who", item="what")


def test_recbole_files_are_read_by_the_names_before_their_types(tmp_path):
    path = tmp_path / "log.inter"
    path.write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        '01\tsay "hi\t5\t2.5\n01\t7\t5\t1e0\n'
    )
    log = read_interactions(path, time="timestamp")
    assert log.collect().rows() == [("01", 'say "hi', 2.5), ("01", "7", 1.0)]
    assert sequences_by_user(log) == {"01": ["7", 'say "hi']}
    with pytest.raises(ValueError, match="its columns are 'user_id', 'item_id', 'rating'"):
        read_interactions(path, user="user_id:token")


def test_a_data_set_of_the_hub_is_read_by_its_split(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return Dataset.from_polars(LOG)

    monkeypatch.setattr("sce_lm.recsys.log_files.load_dataset", load_dataset)
    log = read_interactions("someone/log", user="who", item="what", time="when", split="all")
    assert asked == [("someone/log", "all")]
    assert sequences_by_user(log)["3"] == ["d", "a", "b"]


def test_what_is_neither_a_file_nor_on_the_hub_is_one_sentence(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("sce_lm.recsys.log_files.load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"someone/log is no file here.*no route"):
        read_interactions("someone/log")


def test_times_that_are_not_numbers_are_counted(tmp_path):
    frame = LOG.with_columns(when=pl.Series([1.0, float("nan"), *range(6)]))
    with pytest.raises(ValueError, match=r"no readable time \(column 'when'\) in 1 of 8 rows"):
        read_interactions(
            write(frame, tmp_path / "log.parquet"), user="who", item="what", time="when"
        )


def log_text(*rows: str, header: str = "user_id,item_id") -> str:
    return "\n".join((header, *rows, ""))


def pairs(source, **options) -> list[tuple]:
    return read_interactions(source, **options).select("user", "item").collect().rows()


# Paths


@pytest.mark.parametrize("name", ["log[1]", "l*g", "l?g", "l{a,b}g", "[!x]"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_a_path_that_exists_is_that_path(tmp_path, name, suffix):
    """Beside it are files that a pattern of its name would find."""
    for number, beside in enumerate(("log1", "log", "lag", "xg", name)):
        frame = pl.DataFrame({"user_id": ["u"], "item_id": [f"item {number}"]})
        write(frame, tmp_path / f"{beside}{suffix}")
    assert pairs(tmp_path / f"{name}{suffix}") == [("u", "item 4")]
    folder = tmp_path / f"{name} folder"
    folder.mkdir()
    (tmp_path / f"{name}{suffix}").rename(folder / f"{name}{suffix}")
    assert pairs(folder) == [("u", "item 4")]


@pytest.mark.parametrize("pattern", ["*.csv", "log[12].csv", "part-?", "**/log.csv"])
def test_patterns_are_not_read(tmp_path, pattern):
    write(LOG, tmp_path / "log1.csv")
    with pytest.raises(FileNotFoundError, match="patterns are not read; give the folder"):
        read_interactions(tmp_path / pattern)
    with pytest.raises(FileNotFoundError, match="patterns are not read"):
        read_interactions(pattern)  # which the hub's loader would take for one


# Quotation marks and rows


def test_quotation_marks_of_tab_separated_text_are_text_unless_they_are_consistent(tmp_path):
    header = "user_id\titem_id\ttitle"
    titles = ["plain", '"Heroes', '12" single', '"Quoted"', 'say "hi"']
    rows = [f"u\ti{n}\t{title}" for n, title in enumerate(titles)]
    (tmp_path / "log.tsv").write_text(log_text(*rows, header=header))
    assert [item for _, item in pairs(tmp_path / "log.tsv")] == ["i0", "i1", "i2", "i3", "i4"]
    # A mark that opens in one line and closes in another is no field over two lines.
    (tmp_path / "log.tsv").write_text(log_text(*rows[:2], 'u\ti9\tsome "Heroes"', header=header))
    assert [item for _, item in pairs(tmp_path / "log.tsv")] == ["i0", "i1", "i9"]
    # Consistent ones are marks, and may hold a tab.
    rows = ['"u"\t"i\t""0"""\tplain', 'u\t"i1"\t"a\tb"']
    (tmp_path / "log.tsv").write_text(log_text(*rows, header=header))
    assert pairs(tmp_path / "log.tsv") == [("u", 'i\t"0"'), ("u", "i1")]


def test_csv_is_that_of_rfc_4180(tmp_path):
    rows = ['u,"a,b",x', '"u","say ""hi""",x', 'u,"two\r\nlines",""', 'u,c,"\n\n"""', 'u,"""",x']
    (tmp_path / "log.csv").write_bytes(log_text(*rows, header="user_id,item_id,t").encode())
    found = [item for _, item in pairs(tmp_path / "log.csv")]
    assert found == ["a,b", 'say "hi"', "two\r\nlines", "c", '"']


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["u,a", 'u,"b', "u,c"], "row that begins on line 3 of .* does not end: a quotation mark"),
        (["u,a", 'u,"b', 'u,"c"'], "quotation marks on line 3 of .* do not enclose a field"),
        (['u,12" single'], "quotation marks on line 2"),
        (['u, "a"'], "quotation marks on line 2"),
        ([r'u,"say \"hi\""'], "quotation marks on line 2"),
        (["u,a", "", "u"], "Line 4 of .* differ in their numbers of fields, 1 and 2"),
        (['u,"two\nlines"', "u,b,"], "Line 4 of .* differ in their numbers of fields, 3 and 2"),
        (["u,a\0b"], "Line 2 of .* has a zero byte"),
        (["u,a\ru,b"], "differ in their numbers of fields"),
        (["u,a", "u,b\r\r"], "Line 3 of .* ends in two carriage returns"),
    ],
)
def test_rows_that_are_not_whole_are_refused_with_their_line(tmp_path, rows, message):
    (tmp_path / "log.csv").write_text(log_text(*rows), newline="")
    with pytest.raises(ValueError, match=message):
        read_interactions(tmp_path / "log.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user_id;item_id\nu;a\n", "separate them by commas in .csv and tabs in .tsv, not by ';'"),
        ("1,2\n1,3\n", "put a first line with the names of the columns"),
        ("user_id,item_id,item_id\nu,a,b\n", "two columns 'item_id'"),
        ("user_id,item_id\ru,a\r", "carriage return"),
        ("\n\n", "is empty"),
    ],
)
def test_headers_that_are_none_are_refused(tmp_path, content, message):
    (tmp_path / "log.csv").write_text(content, newline="")
    with pytest.raises(ValueError, match=message):
        read_interactions(tmp_path / "log.csv")


def test_other_encodings_are_refused_with_the_line(tmp_path):
    (tmp_path / "log.csv").write_bytes(log_text("u,a", "u,café").encode("latin-1"))
    with pytest.raises(ValueError, match=r"log.csv cannot be read as csv: line 3 is not UTF-8"):
        read_interactions(tmp_path / "log.csv")
    (tmp_path / "log.jsonl").write_bytes('{"user_id": 1, "item_id": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        read_interactions(tmp_path / "log.jsonl")
    (tmp_path / "log.csv").write_text(log_text("u,a"), encoding="utf-16")
    with pytest.raises(ValueError, match=r"Line 1 of .* has a zero byte; save it as UTF-8"):
        read_interactions(tmp_path / "log.csv")


def test_rows_of_nothing_are_passed_over(tmp_path):
    text = "\n\r\n" + log_text("u,a,", "", ",,", "u,b,x", "", "", header="user_id,item_id,x")
    (tmp_path / "log.csv").write_text(text, newline="")
    assert pairs(tmp_path / "log.csv") == [("u", "a"), ("u", "b")]


def test_quotation_marks_are_followed_from_one_block_of_a_file_to_the_next(tmp_path, monkeypatch):
    rows = [f'u{n},"i\n""{n}"",",{"x" * (n % 7)}' for n in range(500)]
    path = tmp_path / "log.csv"
    path.write_text(log_text(*rows, header="user_id,item_id,x"))
    expected = [(f"u{n}", f'i\n"{n}",') for n in range(500)]
    for chunk in (7, 64, 1000):
        monkeypatch.setattr("sce_lm.recsys.delimited.CHUNK", chunk)
        assert pairs(path) == expected
    path.write_text(log_text(*rows[:300], 'u,"a"b,', *rows[300:], header="user_id,item_id,x"))
    with pytest.raises(ValueError, match="quotation marks on line 602 of"):
        read_interactions(path)


# Ids


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", None])
def test_whole_floats_are_whole_numbers(tmp_path, suffix):
    """As pandas holds ids in a column with missing ones."""
    frame = pl.DataFrame({"user_id": [1.0, 2.0], "item_id": [7.0, 90071992547409.0]})
    source = frame if suffix is None else write(frame, tmp_path / f"log{suffix}")
    assert pairs(source) == [("1", "7"), ("2", "90071992547409")]


def test_large_numbers_keep_their_digits(tmp_path):
    frame = pl.DataFrame({"user_id": [1e16, -0.0], "item_id": [2**63 - 1, 2**53 + 1]})
    expected = [("10000000000000000", str(2**63 - 1)), ("0", str(2**53 + 1))]
    assert pairs(frame) == expected
    assert pairs(write(frame, tmp_path / "log.jsonl"))[0] == expected[0]
    (tmp_path / "log.jsonl").write_text('{"user_id": 36893488147419103233, "item_id": 7e0}\n')
    assert pairs(tmp_path / "log.jsonl") == [("36893488147419103233", "7")]
    part = frame.select(item_id=pl.lit(7.0), user_id="item_id")
    write(frame.select("user_id", "item_id"), tmp_path / "a.parquet")
    write(part, tmp_path / "b.parquet")
    (tmp_path / "log.jsonl").unlink()
    assert pairs(tmp_path) == [*expected, (str(2**63 - 1), "7"), (str(2**53 + 1), "7")]


def test_text_stays_text(tmp_path):
    (tmp_path / "log.csv").write_text(log_text("NA,1.0", "null,1.1", " u,007", "NaN,1e5"))
    expected = [("NA", "1.0"), ("null", "1.1"), (" u", "007"), ("NaN", "1e5")]
    assert pairs(tmp_path / "log.csv") == expected
    frame = pl.DataFrame(expected, schema=["user_id", "item_id"], orient="row")
    assert pairs(frame) == expected
    assert pairs(frame.cast({"user_id": pl.Categorical, "item_id": pl.Binary})) == expected
    assert pairs(pl.DataFrame({"user_id": [True], "item_id": ["7.0"]})) == [("true", "7.0")]


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_missing_ids_of_a_float_column_are_counted(tmp_path, missing):
    frame = pl.DataFrame({"user_id": [1.0, 2.0, missing], "item_id": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"no readable user \(column 'user_id'\) in 1 of 3 rows"):
        read_interactions(frame)
    for source in (write(frame, tmp_path / "log.csv"), write(frame, tmp_path / "log.parquet")):
        with pytest.raises(ValueError, match="in 1 of 3 rows"):
            read_interactions(source)
    with pytest.raises(ValueError, match="in 1 of 3 rows"):
        read_interactions(pd.DataFrame({"user_id": [1, 2, None], "item_id": ["a", "b", "c"]}))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl"])
def test_empty_ids_are_missing(tmp_path, suffix):
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["", "a"]})
    with pytest.raises(ValueError, match=r"no readable item .* in 1 of 2 rows"):
        read_interactions(write(frame, tmp_path / f"log{suffix}"))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1.5, 2.0], "items in column 'item_id' that are no whole numbers, such as 1.5"),
        ([Decimal("1.50"), Decimal(2)], "no whole numbers, such as 1.50"),
        ([datetime.date(2024, 1, 1)] * 2, "of type Date, but ids are text or whole numbers"),
        ([[1, 2], [3]], r"of type List\(Int64\), but ids"),
        ([{"a": 1}, {"a": 2}], r"of type Struct.*, but ids"),
        ([b"\xff", b"\xfe"], "cannot be read"),
    ],
)
def test_ids_that_are_none_are_refused(ids, message):
    frame = pl.DataFrame({"user_id": [1, 2], "item_id": ids})
    with pytest.raises(ValueError, match=f"The polars DataFrame .*{message}"):
        read_interactions(frame)


# Times


ISO = ["2024-05-01T10:00:00Z", "2024-05-01 10:30:00+02:00", "2024-05-01T09:00+0200"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".jsonl", ".inter"])
def test_zones_are_read_alike_from_every_format(tmp_path, suffix):
    frame = pl.DataFrame({"user_id": ["u"] * 3, "item_id": ["c", "b", "a"], "t": ISO})
    path = tmp_path / f"log{suffix}"
    if suffix == ".inter":
        frame.rename({name: f"{name}:token" for name in frame.columns}).write_csv(
            path, separator="\t"
        )
    else:
        write(frame, path)
    found = read_interactions(path, time="t").collect()
    assert found["time"].dtype == pl.Datetime("us", "UTC")
    assert [t.strftime("%H:%M") for t in found["time"]] == ["10:00", "08:30", "07:00"]


@pytest.mark.parametrize(
    "times",
    [
        ["2024-05-02", "2024-05-01T10:00", "2024-05-01"],
        ["2024-05-01 10:00:00.123456789", "2024-05-01 10:00:00.123456788", "1999-12-31"],
        ["100", "20", "3"],
        ["1e2", "20", "3.5"],
        ["1714557600123", "1714557600122", "999"],
        [100, 20, 3],
        [100.5, 20.0, -3.0],
        [Decimal("100.5"), Decimal("20.25"), Decimal(3)],
        [Decimal(100), Decimal(20), Decimal(3)],
        [datetime.date(2024, 5, 3), datetime.date(2024, 5, 2), datetime.date(1969, 5, 1)],
        [datetime.timedelta(3), datetime.timedelta(2), datetime.timedelta(-1)],
    ],
)
def test_times_come_out_in_order(tmp_path, times):
    frame = pl.DataFrame({"user_id": ["u"] * 3, "item_id": ["last", "then", "first"], "t": times})
    expected = {"u": ["first", "then", "last"]}
    assert sequences_by_user(read_interactions(frame, time="t")) == expected
    path = write(frame, tmp_path / "log.parquet")
    assert sequences_by_user(read_interactions(path, time="t")) == expected
    if frame["t"].dtype != pl.Duration:
        path = write(frame, tmp_path / "log.csv")
        assert sequences_by_user(read_interactions(path, time="t")) == expected
    if frame["t"].dtype == pl.String:
        categories = frame.with_columns(pl.col("t").cast(pl.Categorical))
        assert sequences_by_user(read_interactions(categories, time="t")) == expected


UNCLEAR = [
    (
        ["04/02/2024", "05/02/2024"],
        "neither numbers nor ISO 8601 .2, the first '04/02/2024'.*time_",
    ),
    (["01-02-03", "01-02-04"], "neither numbers nor ISO 8601"),
    (["2024-05-01", "10:00"], "neither numbers nor ISO 8601 .1, the first '10:00'"),
    (["2024-05-01T10:00Z", "2024-05-01T10:00"], "without a zone .*with a zone .*no common order"),
    (["2024-05-01T10:00Z", "2024-05-01"], "with a zone"),
    (["1714557600", "2024-05-01"], "numbers .*dates .*no common order"),
    (["9999-12-31T00:00:00.0000001", "2024-05-01"], "such years as 9999"),
    (["2024-02-30", "2024-02-28"], "no readable time .* in 1 of 2 rows"),
    (["", "5"], "no readable time .* in 1 of 2 rows"),
]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize(("times", "message"), UNCLEAR)
def test_text_times_without_a_clear_order_are_refused(tmp_path, suffix, times, message):
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "t": times})
    with pytest.raises(ValueError, match=message):
        read_interactions(write(frame, tmp_path / f"log{suffix}"), time="t")


@pytest.mark.parametrize(
    ("times", "time_format", "expected"),
    [
        (["04/02/2024", "01/03/2024"], "%d/%m/%Y", "2024-02-04"),
        (["04/02/2024", "05/01/2024"], "%m/%d/%Y", "2024-04-02"),
        (["20240204", "20240301"], "%Y%m%d", "2024-02-04"),
        (["04.02.24 13:05:07.25", "05.02.24 00:00:00.5"], "%d.%m.%y %H:%M:%S.%f", "2024-02-04"),
        (
            ["Feb 4 2024 01:00 AM Z", "Feb 4 2024 04:00 AM +0200"],
            "%b %d %Y %I:%M %p %z",
            "2024-02-04",
        ),
    ],
)
def test_a_time_format_says_how_times_are_written(tmp_path, times, time_format, expected):
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "t": times})
    path = write(frame, tmp_path / "log.csv")
    found = read_interactions(path, time="t", time_format=time_format).collect()["time"]
    assert str(found[0]).startswith(expected)
    assert (found.dtype.time_zone == "UTC") == ("%z" in time_format)
    assert found.is_sorted()
    if ".%f" in time_format:
        assert found[0].microsecond == 250_000


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        (["04/02/2024", "2024-02-04"], {"time_format": "%d/%m/%Y"}, "1, the first '2024-02-04'"),
        (["10:00", "11:00"], {"time_format": "%H:%M"}, "'%H:%M' names no year"),
        (["2024 CET", "2025 CET"], {"time_format": "%Y %Z"}, "has %Z, the name of a zone"),
        (["2024,5", "2025,5"], {"time_format": "%Y,%f"}, "has %f without a point before it"),
        ([1, 2], {"time_format": "%Y"}, "are numbers, and time_format is for text; leave it out"),
        ([1, 2], {"time_format": "%Y", "time": None}, "time_format is given without the column"),
        ([True, False], {}, "times in column 't' of type Boolean; give numbers, dates or text"),
        ([datetime.time(1), datetime.time(2)], {}, "of type Time; give"),
        ([1.0, float("inf")], {}, "no readable time .* in 1 of 2 rows"),
    ],
)
def test_times_that_do_not_fit_are_refused(times, options, message):
    frame = pl.DataFrame({"user_id": ["u", "u"], "item_id": ["a", "b"], "t": times})
    with pytest.raises(ValueError, match=message):
        read_interactions(frame, **{"time": "t"} | options)


def test_parts_with_times_of_different_kinds_are_refused(tmp_path):
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "t": [5]})
    write(frame, tmp_path / "a.parquet")
    dates = frame.with_columns(t=pl.lit(datetime.date(2024, 5, 1)))
    write(dates, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"numbers \(.*a.parquet\) and dates without a zone"):
        read_interactions(tmp_path, time="t")
    write(frame.with_columns(t=None), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"no readable time .* in 1 of 2 rows"):
        read_interactions(tmp_path, time="t")
    write(frame.cast({"t": pl.Float32}), tmp_path / "b.parquet")
    assert read_interactions(tmp_path, time="t").collect()["time"].to_list() == [5, 5]


# JSON


@pytest.mark.parametrize("orient", ["columns", "index", "split", "table", "values"])
def test_json_that_is_no_row_an_event_is_refused(tmp_path, orient):
    frame = pd.DataFrame({"user_id": [1, 2], "item_id": [7, 8]})
    frame.to_json(tmp_path / "log.json", orient=orient)
    with pytest.raises(ValueError, match=r"log.json (is one JSON object that holds whole|cannot)"):
        read_interactions(tmp_path / "log.json")


def test_records_of_json_are_read_from_an_array_or_lines(tmp_path):
    frame = pd.DataFrame({"user_id": [1, 2, 3], "item_id": ["x", 7, 8.0], "more": [{}, [], None]})
    for name, lines in (("array.json", False), ("lines.json", True)):
        frame.to_json(tmp_path / name, orient="records", lines=lines)
        assert pairs(tmp_path / name) == [("1", "x"), ("2", "7"), ("3", "8")]
    (tmp_path / "array.json").write_text('\n[\n{"user_id": 1},\n{"item_id": 2}]')
    with pytest.raises(ValueError, match=r"no readable user .* in 1 of 2 rows"):
        read_interactions(tmp_path / "array.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"user_id": 1, "item_id": 2}\n\n{"user_id": 1, "it\n', "line 3 is no JSON object"),
        ('{"user_id": 1, "item_id": 2}\n7\n', "line 2 is no JSON object"),
        ('{"user_id": 1, "item_id": 2}\n[7]\n', "a record is no JSON object"),
        ('{"user_id": 1, "item_id": NaN}\n', "line 1 is no JSON object"),
        ('{\n "user_id": 1,\n "item_id": 2\n}\n', "line 1 is no JSON object"),
        ('[{"user_id": 1, "item_id": 2},\n{"user_id": 1,]', "line 2 column 15"),
        ("[[1, 2]]", "cannot be read as json"),
        (
            '[{"user_id": 1, "item_id": 2}, {"user_id": 1, "item_id": [2]}]',
            "lists or objects stand among",
        ),
        ('{"user_id": 1, "item_id": 2}\n{"user_id": 1, "item_id": {"a": 1}}', "of type Struct"),
        ("[]", "is empty"),
        (" \n", "is empty"),
    ],
)
def test_damaged_json_is_refused_with_the_line(tmp_path, text, message):
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(ValueError, match=f"log.json .*{message}"):
        read_interactions(tmp_path / "log.json")


# Tables, compression and folders


def test_tables_are_read_as_files_are():
    frame = LOG.rename({"who": "user_id", "what": "item_id"})
    expected = read_interactions(frame, time="when").collect()
    for table in (frame.lazy(), frame.to_pandas(), frame.to_arrow(), Dataset.from_polars(frame)):
        assert read_interactions(table, time="when").collect().equals(expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"user_id": [1]}, "The dict cannot be read .* give a path, or a pandas, polars or Arrow"),
        (pd.DataFrame({"user_id": [1, 2], "item_id": [7, "x"]}), "hold one type each"),
        (pd.DataFrame({"item_id": [7]}), "The pandas DataFrame has no column 'user_id'"),
        (pl.LazyFrame({"user_id": [7]}), "The polars LazyFrame has no column 'item_id'"),
        (pa.table({"user_id": pa.array([], pa.int64())}), "The pyarrow Table has no column"),
        (pl.DataFrame({"user_id": [], "item_id": []}), "columns but no events"),
    ],
)
def test_tables_that_are_no_log_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_interactions(source)


@pytest.mark.parametrize(
    "name", ["LOG.CSV", "log.tsv.gz", "log.csv.zst", "Log.JSONL.GZ", "log.json.zst"]
)
def test_compressed_files_and_names_in_capitals(tmp_path, name):
    suffix = Path(name.lower()).with_suffix("") if name.count(".") > 1 else Path(name.lower())
    plain = tmp_path / "plain"
    plain.mkdir()
    source = suffix.suffix if suffix.suffix != ".json" else ".jsonl"
    data = write(LOG, plain / f"x{source}").read_bytes()
    packed = {".gz": gzip.compress, ".zst": lambda d: pa.compress(d, "zstd", asbytes=True)}
    (tmp_path / name).write_bytes(packed.get(Path(name.lower()).suffix, bytes)(data))
    log = read_interactions(tmp_path / name, user="who", item="what", time="when")
    assert log.collect()["item"].to_list() == LOG["what"].to_list()


def test_what_is_no_data_in_a_folder_is_passed_over(tmp_path):
    write(LOG.head(2), tmp_path / "part-9.jsonl")
    LOG.tail(3).write_ndjson(tmp_path / "part-10.JSONL")
    for name in ("_SUCCESS", ".DS_Store", ".part-9.jsonl.crc", "README.md", "_metadata.parquet"):
        (tmp_path / name).write_text("x")
    for name in ("part-0.jsonl", "part-11.csv"):
        (tmp_path / name).touch()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    log = read_interactions(tmp_path, user="who", item="what")
    assert log.collect()["item"].to_list() == LOG["what"].to_list()[:2] + LOG["what"].to_list()[-3:]
    (tmp_path / "notes.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"holds notes.xlsx, which is no kind of interaction log"):
        read_interactions(tmp_path, user="who", item="what")
    (tmp_path / "notes.xlsx").unlink()
    (tmp_path / "day=2").mkdir()
    with pytest.raises(ValueError, match="holds the folder day=2; the parts"):
        read_interactions(tmp_path, user="who", item="what")


def test_parts_may_hold_their_columns_in_other_orders_and_types(tmp_path):
    frame = pl.DataFrame({"user_id": [1], "item_id": [7], "t": [5], "more": [None]})
    write(frame, tmp_path / "a.parquet")
    write(frame.select("t", item_id=pl.lit("x"), user_id=pl.lit(1.0)), tmp_path / "b.parquet")
    assert pairs(tmp_path, time="t") == [("1", "7"), ("1", "x")]
    write(frame.select("user_id", "t"), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c.parquet has no column 'item_id'"):
        read_interactions(tmp_path)
