"""Fingerprints: equal for the same content however it is written, and for nothing else."""

import json
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sce_lm import recsys
from sce_lm.training.fingerprint import digests, of_documents, of_log

EVENTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["1", "2", "é"]), st.integers(-3, 3)),
    min_size=1,
    max_size=12,
)


def frame(events):
    return pl.DataFrame(events, schema=["user", "item", "time"], orient="row")


@given(events=EVENTS, other=EVENTS, seed=st.integers(0, 9))
def test_it_is_that_of_the_events_whatever_their_order(events, other, seed):
    log = frame(events)
    shuffled = log.sample(fraction=1, shuffle=True, seed=seed)
    assert of_log(shuffled.lazy()) == of_log(log.lazy())
    same = sorted(events) == sorted(other)
    assert (of_log(frame(other).lazy()) == of_log(log.lazy())) == same


@given(events=EVENTS, other=EVENTS)
def test_without_times_the_order_of_a_users_events_counts_and_that_of_users_does_not(events, other):
    def histories(log):
        return {user: [e[1] for e in log if e[0] == user] for user, *_ in log}

    log = frame(events).drop("time").lazy()
    by_user = frame(sorted(events, key=lambda event: event[0])).drop("time").lazy()
    assert of_log(by_user) == of_log(log)
    found = of_log(frame(other).drop("time").lazy())
    assert (found == of_log(log)) == (histories(events) == histories(other))


def test_files_of_each_kind_and_parts_of_them_have_the_same(tmp_path):
    start = datetime(2024, 5, 1, 10)
    log = pl.DataFrame(
        {
            "user_id": [f"u{i % 7}" for i in range(40)],
            "item_id": [f"i{i % 11}" for i in range(40)],
            "time": [start + timedelta(hours=i) for i in range(40)],
        }
    )
    log.write_csv(tmp_path / "log.csv", datetime_format="%Y-%m-%dT%H:%M:%S")
    log.write_parquet(tmp_path / "log.parquet")
    log.with_columns(pl.col("time").cast(pl.Datetime("ns"))).write_parquet(tmp_path / "ns.parquet")
    lines = log.with_columns(pl.col("time").dt.to_string("iso:strict"))
    lines.write_ndjson(tmp_path / "log.jsonl")
    (tmp_path / "parts").mkdir()
    for number, part in enumerate(log.reverse().iter_slices(13)):
        part.write_parquet(tmp_path / "parts" / f"{number}.parquet")
    found = {
        of_log(recsys.read_interactions(tmp_path / name, time="time")).digest
        for name in ("log.csv", "log.parquet", "ns.parquet", "log.jsonl", "parts")
    }
    assert len(found) == 1


@pytest.mark.parametrize("dtype", [pl.Int32, pl.Int64, pl.UInt16, pl.Float32, pl.Float64])
def test_a_number_is_the_same_in_every_type(dtype):
    log = pl.DataFrame({"user": ["a", "b"], "item": ["1", "2"], "time": [3, 70]})
    typed = log.with_columns(pl.col("time").cast(dtype))
    assert of_log(typed.lazy()) == of_log(log.lazy())
    shifted = log.with_columns(pl.col("time") + 0.5)
    assert of_log(shifted.lazy()) != of_log(log.lazy())


def test_it_stays_what_it_is():
    """A stored fingerprint must be that of the same data in a later version."""
    log = pl.DataFrame({"user": ["a", "b", "a"], "item": ["x", "x", "y"], "time": [1, 2, 3]})
    assert of_log(log.lazy()).digest == "fd6ca88135d698c7"
    assert of_log(log.drop("time").lazy()).digest == "3e9d22a19a65ac1d"
    assert of_documents(digests(["one", "two"])).digest == "7519bf9a6a6a1ca3"


def test_documents_are_a_multiset_and_counts_say_what_changed():
    one, two = digests(["a", "b", "b"]), digests(["b", "a", "b"])
    assert of_documents(one) == of_documents(two) == of_documents(one[:1], one[1:])
    assert of_documents(one) != of_documents(np.unique(one))
    assert of_documents(one).change(of_documents(one[:2])) == "1 fewer document"

    log = pl.DataFrame({"user": ["a", "b"], "item": ["x", "y"], "time": [1, 2]})
    more = pl.concat([log, pl.DataFrame({"user": ["a"] * 2, "item": ["z", "x"], "time": [3, 4]})])
    before = of_log(log.lazy())
    assert before.change(of_log(more.lazy())) == "1 more item, 2 more events"
    moved = log.with_columns(pl.col("time") + 1)
    assert before.change(of_log(moved.lazy())) == (
        "as many users, items and events as before, but others"
    )
    assert json.loads(json.dumps(before.counts)) == before.counts
