import datetime

import polars as pl
import pytest
from support.data import shared_data

from sce_lm.recsys import (
    build_item_tokenizer,
    catalogue,
    last_items,
    last_n,
    leave_one_out,
    read_interactions,
    temporal_split,
    user_sequences,
)


def test_leave_one_out():
    sequences = pl.DataFrame(
        {"user": ["u", "v", "w", "x"], "items": [[2, 3, 4, 5], [6, 7], [2, 6, 2], [3]]},
        schema_overrides={"items": pl.List(pl.Int32)},
    )
    split = leave_one_out(sequences)
    assert split.train.rows() == [("u", [2, 3]), ("v", [6, 7]), ("w", [2]), ("x", [3])]
    assert split.validation.rows() == [("u", [2, 3], 4), ("w", [2], 6)]
    assert split.test.rows() == [("u", [2, 3, 4], 5), ("w", [2, 6], 2)]
    assert split.summary() == {
        "protocol": "leave-one-out; events of equal time keep the order of the file",
        "training_users": 4,
        "training_events": 6,
        "validation_questions": 2,
        "validation_targets_unseen_in_training": 1,  # the 4 of u
        "test_questions": 2,
        "test_targets_unseen_in_training": 1,  # the 5 of u
    }


def test_last_n_asks_for_each_of_the_last_items():
    sequences = pl.DataFrame({"user": ["u", "v"], "items": [[2, 3, 4, 5, 6], [6, 7, 8, 9]]})
    split = last_n(sequences, 2)
    assert split.train.rows() == [("u", [2]), ("v", [6, 7, 8, 9])]
    assert split.validation.rows() == [("u", [2], 3), ("u", [2, 3], 4)]
    assert split.test.rows() == [("u", [2, 3, 4], 5), ("u", [2, 3, 4, 5], 6)]
    assert split.protocol.startswith("last-2;")
    with pytest.raises(ValueError, match="None of the 2 users has 7 events; last-3 takes one"):
        last_n(sequences, 3)
    with pytest.raises(ValueError, match="n is 0"):
        last_n(sequences, 0)


def test_baselines_count_what_precedes_the_test():
    sequences = pl.DataFrame({"user": ["u", "v"], "items": [[2, 3, 4, 5, 6], [6, 7, 8, 9]]})
    assert leave_one_out(sequences).before_test().to_list() == [[2, 3, 4, 5], [6, 7, 8]]
    # The first of two test items is no longer there for the second, and v only trains.
    assert last_n(sequences, 2).before_test().to_list() == [[2, 3, 4], [6, 7, 8, 9]]
    cut = temporal_split(SEQUENCES, 6)
    assert cut.before_test().to_list() == cut.train["items"].to_list()


SEQUENCES = pl.DataFrame(
    {
        "user": ["early", "late", "new", "few", "one"],
        "items": [[2, 3, 4], [2, 3, 9, 4, 2, 3], [4, 9, 2, 3], [2, 3], [4]],
        "times": [[1, 2, 3], [1, 5, 6, 7, 7, 8], [6, 7, 8, 9], [2, 6], [3]],
    }
)


def test_a_temporal_cut_takes_users_with_later_events_out_of_training():
    split = temporal_split(SEQUENCES, 6)
    assert split.train.rows() == [("early", [2, 3, 4], [1, 2, 3]), ("one", [4], [3])]
    # Events from the cut on, without item 9, which nobody in training has; "few" has one of them.
    assert split.test.rows() == [("late", [4, 2], 3), ("new", [4, 2], 3)]
    assert split.validation.rows() == [("late", [4], 2), ("new", [4], 2)]
    assert split.protocol == (
        "temporal at 6; histories: events after the cut; items unseen in training: left out; "
        "events of equal time keep the order of the file"
    )


def test_a_temporal_cut_may_keep_the_past_and_cold_items():
    split = temporal_split(SEQUENCES, 6, past="all", cold_items="keep")
    assert split.test.rows() == [("late", [2, 3, 9, 4, 2], 3), ("new", [4, 9, 2], 3)]
    assert split.validation.rows() == [("late", [2, 3, 9, 4], 2), ("new", [4, 9], 2)]
    assert "before and after the cut; items unseen in training: kept" in split.protocol


def test_the_cut_may_be_a_quantile_or_a_date():
    times = sorted(SEQUENCES["times"].explode().to_list())
    at = times[round(0.6 * (len(times) - 1))]
    assert at == 6
    by_quantile, by_time = temporal_split(SEQUENCES, 0.6), temporal_split(SEQUENCES, 6)
    assert by_quantile.test.equals(by_time.test)
    assert by_quantile.protocol.startswith("temporal at the 0.6 quantile of time (6);")

    days = SEQUENCES.with_columns(
        pl.col("times").list.eval(pl.date(2024, 1, pl.element()).cast(pl.Datetime))
    )
    for date in ("2024-01-06", datetime.date(2024, 1, 6), datetime.datetime(2024, 1, 5, 12)):
        assert temporal_split(days, date).test.equals(by_time.test)


def test_a_cut_between_whole_numbers_is_not_one_at_the_lower():
    for at in (5.5, "5.5", "6", " 6 "):
        assert temporal_split(SEQUENCES, at).test.equals(temporal_split(SEQUENCES, 6).test)
    assert not temporal_split(SEQUENCES, 5).test.equals(temporal_split(SEQUENCES, 6).test)


DAYS = SEQUENCES.with_columns(
    pl.col("times").list.eval(pl.date(2024, 1, pl.element()).cast(pl.Datetime))
)
ZONED = DAYS.with_columns(pl.col("times").list.eval(pl.element().dt.replace_time_zone("UTC")))


@pytest.mark.parametrize(
    "at",
    [
        "2024-01-06T00:00Z",
        "2024-01-06 02:00:00+02:00",
        "2024-01-05T12:00:00.5-11",
        datetime.datetime(2024, 1, 6, tzinfo=datetime.UTC),
        datetime.datetime(2024, 1, 6, 3, tzinfo=datetime.timezone(datetime.timedelta(hours=3))),
    ],
)
def test_a_cut_of_times_with_a_zone_has_one(at):
    split = temporal_split(ZONED, at)
    assert split.test.equals(temporal_split(SEQUENCES, 6).test)
    assert split.protocol.startswith(
        ("temporal at 2024-01-06 00:00:00+00:00;", "temporal at 2024-01-05 23:")
    )
    with pytest.raises(ValueError, match=r"the log has dates without a zone and the cut .* with a"):
        temporal_split(DAYS, at)


@pytest.mark.parametrize("at", ["2024-01-06", "2024-01-06T00:00", datetime.date(2024, 1, 6)])
def test_a_cut_without_a_zone_is_refused_where_times_have_one(at):
    with pytest.raises(ValueError, match=r"with a zone .*; give .* 2024-05-01T00:00Z"):
        temporal_split(ZONED, at)
    assert temporal_split(DAYS, at).test.equals(temporal_split(SEQUENCES, 6).test)


@pytest.mark.parametrize(
    ("at", "options", "message"),
    [
        (100, {}, "leaves 5 users before it and 0 after"),
        (0, {}, "leaves 0 users before it and 5 after"),
        (9, {}, "None of the 1 users after the cut at 9 has 3 events"),
        ("2024-01-06", {}, "cannot be compared with times of type Int64.*the log has numbers"),
        ("soon", {}, "'soon' cannot be compared"),
        ("04/02/2024", {}, "it is neither a number nor ISO 8601"),
        ("2024-02-30", {}, "there is no such time"),
        (True, {}, "True cannot be compared"),
        (6, {"past": "some"}, "expected one of after, all"),
    ],
)
def test_cuts_that_do_not_fit_are_refused(at, options, message):
    with pytest.raises(ValueError, match=message):
        temporal_split(SEQUENCES, at, **options)


def test_a_temporal_cut_needs_times():
    with pytest.raises(ValueError, match="name its time column"):
        temporal_split(SEQUENCES.drop("times"), 6)


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


@pytest.mark.data
def test_a_temporal_split_of_a_real_log_agrees_with_its_definition():
    path = shared_data("food.parquet")
    log = read_interactions(path, time="timestamp")
    tokenizer = build_item_tokenizer(catalogue(log))
    split = temporal_split(user_sequences(log, tokenizer), 0.95)

    raw = pl.read_parquet(path).cast({"user_id": pl.String, "item_id": pl.String})
    cut = raw["timestamp"].quantile(0.95, "nearest")
    asked = set(raw.filter(pl.col("timestamp") >= cut)["user_id"])
    assert set(split.train["user"]) == set(raw["user_id"]) - asked
    trained = set(raw.filter(~pl.col("user_id").is_in(asked))["item_id"])
    late = raw.filter((pl.col("timestamp") >= cut) & pl.col("item_id").is_in(trained))
    by_user: dict[str, list[str]] = {}
    for user, item, _ in late.sort("timestamp", maintain_order=True).rows():
        by_user.setdefault(user, []).append(item)
    expected = {user: items for user, items in by_user.items() if len(items) >= 3}
    found = {
        user: tokenizer.convert_ids_to_tokens([*history, target])
        for user, history, target in split.test.rows()
    }
    assert found == expected
    assert split.summary()["test_targets_unseen_in_training"] == 0


def test_last_items_are_asked_of_users_with_a_known_past():
    sequences = pl.DataFrame(
        {"user": ["a", "b", "c", "d"], "items": [[2, 1, 3, 4], [5, 1], [1, 3], [6]]},
        schema={"user": pl.String, "items": pl.List(pl.Int32)},
    )
    questions, counts = last_items(sequences, range(2, 7))
    assert questions.rows() == [("a", [2, 3], 4), ("b", [5], 1)]
    assert counts == {"unknown_events": 3, "users_without_history": 2}
