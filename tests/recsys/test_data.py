import datetime

import polars as pl
import pytest
from support.data import shared_data

from sce_lm.recsys import (
    build_item_tokenizer,
    catalogue,
    leave_one_out,
    read_interactions,
    statistics,
    training_dataset,
    user_sequences,
)

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
    rows = user_sequences(log, tokenizer).rows()
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


def test_the_catalogue_is_in_order_of_first_appearance():
    log = LOG.lazy().select(user=pl.col("who").cast(pl.String), item="what")
    assert catalogue(log) == ["c", "a", "b", "a c", "d"]


def test_items_that_the_tokenizer_does_not_know_are_left_out_with_a_count():
    log = LOG.lazy().select(user=pl.col("who").cast(pl.String), item="what")
    tokenizer = build_item_tokenizer(["b", "d"])
    with pytest.warns(UserWarning, match="4 of 8 events"):
        sequences = user_sequences(log, tokenizer)
    assert sequences.rows() == [("7", [2, 3]), ("3", [2, 3])]
    with pytest.raises(ValueError, match="knows none of the items of the log's 8 events"):
        user_sequences(log, build_item_tokenizer(["z"]))


def test_leave_one_out():
    sequences = pl.DataFrame(
        {"user": ["u", "v", "w", "x"], "items": [[2, 3, 4, 5], [6, 7], [2, 6, 2], [3]]},
        schema_overrides={"items": pl.List(pl.Int32)},
    )
    split = leave_one_out(sequences)
    assert split.train.rows() == [("u", [2, 3]), ("v", [6, 7]), ("w", [2]), ("x", [3])]
    assert split.validation.rows() == [("u", [2, 3], 4), ("w", [2], 6)]
    assert split.test.rows() == [("u", [2, 3, 4], 5), ("w", [2, 6], 2)]


def test_training_rows_are_the_latest_items_of_users_with_two():
    sequences = pl.DataFrame({"user": ["u", "v", "w"], "items": [[2, 3, 4, 5], [6, 7], [2]]})
    dataset = training_dataset(sequences, max_length=3)
    assert dataset["input_ids"] == [[3, 4, 5], [6, 7]]
    assert dataset["labels"] == dataset["input_ids"]
    with pytest.raises(ValueError, match="max_length is 1"):
        training_dataset(sequences, max_length=1)
    with pytest.raises(ValueError, match="nothing to learn from"):
        training_dataset(sequences.tail(1), max_length=3)


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


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "users", "items", "events"),
    [
        ("amazon-beauty-5core", 22_363, 12_101, 198_502),
        ("amazon-beauty-54k", 40_226, 54_542, 353_962),
        ("movielens-1m", 6_040, 3_416, 999_611),
    ],
)
def test_statistics_of_real_logs(name, users, items, events):
    log = read_interactions(shared_data(f"{name}.parquet"))
    sequences = user_sequences(log, build_item_tokenizer(catalogue(log)))
    found = statistics(sequences)
    assert (found["users"], found["items"], found["events"]) == (users, items, events)
    assert found["length_min"] <= found["length_median"] <= found["length_max"]


@pytest.mark.data
def test_leave_one_out_of_a_real_log_agrees_with_the_file():
    path = shared_data("amazon-beauty-5core.parquet")
    log = read_interactions(path)
    tokenizer = build_item_tokenizer(catalogue(log))
    split = leave_one_out(user_sequences(log, tokenizer))
    by_user: dict[str, list[str]] = {}
    for user, item in pl.read_parquet(path).rows():
        by_user.setdefault(str(user), []).append(str(item))
    assert len(split.test) == len(split.validation) == len(split.train) == len(by_user)
    names = tokenizer.convert_ids_to_tokens
    for (user, train), (_, seen, valid), (_, history, test) in zip(
        split.train.rows(), split.validation.rows(), split.test.rows(), strict=True
    ):
        raw = by_user[user]
        assert names(train) == names(seen) == raw[:-2]
        assert names(history) == raw[:-1]
        assert names([valid, test]) == raw[-2:]
