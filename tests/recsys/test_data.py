import datetime

import polars as pl
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
