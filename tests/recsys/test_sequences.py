import polars as pl
import pytest
from support.data import shared_data

from sce_lm.recsys import (
    build_item_tokenizer,
    catalogue,
    read_interactions,
    statistics,
    training_dataset,
    user_sequences,
)

LOG = pl.DataFrame(
    {
        "user": ["7", "3", "7", "3", "7", "3", "9", "7"],
        "item": ["c", "a", "b", "b", "a c", "d", "a", "d"],
        "time": [30, 5, 10, 5, 20, 4, 1, 20],
    }
).lazy()


def test_the_catalogue_is_in_order_of_first_appearance():
    assert catalogue(LOG) == ["c", "a", "b", "a c", "d"]


def test_items_that_the_tokenizer_does_not_know_are_left_out_with_a_count():
    log = LOG.select("user", "item")
    tokenizer = build_item_tokenizer(["b", "d"])
    with pytest.warns(UserWarning, match="4 of 8 events"):
        sequences = user_sequences(log, tokenizer)
    assert sequences.rows() == [("7", [2, 3]), ("3", [2, 3])]
    with pytest.raises(ValueError, match="knows none of the items of the log's 8 events"):
        user_sequences(log, build_item_tokenizer(["z"]))


def test_training_rows_are_the_latest_items_of_users_with_two():
    sequences = pl.DataFrame({"user": ["u", "v", "w"], "items": [[2, 3, 4, 5], [6, 7], [2]]})
    dataset = training_dataset(sequences, max_length=3)
    assert dataset["input_ids"] == [[3, 4, 5], [6, 7]]
    assert dataset["labels"] == dataset["input_ids"]
    with pytest.raises(ValueError, match="max_length is 1"):
        training_dataset(sequences, max_length=1)
    with pytest.raises(ValueError, match="nothing to learn from"):
        training_dataset(sequences.tail(1), max_length=3)


def test_times_go_with_the_items():
    tokenizer = build_item_tokenizer(["d", "c", "b"])
    with pytest.warns(UserWarning, match="3 of 8 events"):
        sequences = user_sequences(LOG, tokenizer)
    assert sequences.rows() == [("7", [4, 2, 3], [10, 20, 30]), ("3", [2, 4], [4, 5])]


def test_statistics_count_ties_in_time():
    found = statistics(user_sequences(LOG, build_item_tokenizer(catalogue(LOG))))
    assert found == {
        "users": 3,
        "items": 5,
        "events": 8,
        "length_mean": pytest.approx(8 / 3),
        "length_min": 1,
        "length_p25": 3,
        "length_median": 3,
        "length_p75": 4,
        "length_p95": 4,
        "length_max": 4,
        "tied_events": 2,  # "d" of user 7 at 20, "b" of user 3 at 5; users do not tie each other
        "users_tied_at_the_end": 1,
    }


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
