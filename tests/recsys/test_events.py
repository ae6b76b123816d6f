from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sce_lm.recsys import filter_interactions, read_interactions
from sce_lm.recsys.events import read_events

EVENTS = st.lists(
    st.tuples(st.sampled_from("uvwx"), st.sampled_from("abcde"), st.integers(0, 3)),
    min_size=1,
    max_size=40,
)


def as_log(events: list[tuple[str, str, int]]) -> pl.LazyFrame:
    return pl.LazyFrame(events, schema=["user", "item", "time"], orient="row")


@settings(max_examples=50)
@given(EVENTS)
def test_events_are_in_order_of_user_time_and_place(events):
    found = read_events(as_log(events))
    users = list(dict.fromkeys(user for user, _, _ in events))
    expected = sorted(range(len(events)), key=lambda i: (users.index(events[i][0]), events[i][2]))
    assert found.rows.tolist() == expected
    assert found.users.to_list() == users
    decoded = zip(
        (found.users[int(user)] for user in found.user),
        (found.items[int(item)] for item in found.item),
        found.time,
        strict=True,
    )
    assert list(decoded) == [events[i] for i in expected]


def slow_filter(events, min_user, min_item, iterate):
    """Rows kept, by the definition."""
    kept = list(range(len(events)))
    while True:
        users = Counter(events[i][0] for i in kept)
        items = Counter(events[i][1] for i in kept)
        left = [
            i for i in kept if users[events[i][0]] >= min_user and items[events[i][1]] >= min_item
        ]
        if left == kept or not iterate:
            return left
        kept = left


@settings(max_examples=60)
@given(EVENTS, st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_filters_are_those_of_their_definition(events, min_user, min_item, iterate):
    options = {"min_user_events": min_user, "min_item_events": min_item, "iterate": iterate}
    kept = slow_filter(events, min_user, min_item, iterate)
    if not kept:
        with pytest.raises(ValueError, match=f"No event is left of {len(events)}"):
            filter_interactions(as_log(events), **options)
        return
    found = filter_interactions(as_log(events), **options).collect()
    assert found.rows() == [events[i] for i in kept]


@pytest.mark.parametrize(
    ("policy", "rows"),
    [
        ("keep", [0, 1, 2, 3, 4, 5]),
        ("first", [0, 2, 4]),
        ("last", [1, 4, 5]),
        ("consecutive", [0, 1, 2, 3, 4]),
    ],
)
def test_duplicates(policy, rows):
    # In order of time u has a (row 0), b (2), a (3), a (5), b (1), and v has a (4).
    events = [("u", "a", 1), ("u", "b", 9), ("u", "b", 2), ("u", "a", 3), ("v", "a", 0)]
    events.append(("u", "a", 3))
    found = filter_interactions(as_log(events), duplicates=policy).collect()
    assert found.rows() == [events[row] for row in rows]


def test_duplicates_go_before_events_are_counted():
    events = [("u", "a", 1), ("u", "a", 2), ("u", "b", 3), ("v", "a", 1), ("v", "b", 2)]
    log = as_log([*events, ("w", "a", 1), ("w", "a", 2)])
    found = filter_interactions(log, duplicates="first", min_user_events=2)
    assert set(found.collect()["user"]) == {"u", "v"}
    with pytest.raises(ValueError, match="users need 3 events"):
        filter_interactions(log, duplicates="first", min_user_events=3)


def test_a_filtered_log_is_lazy_and_filters_again(tmp_path):
    frame = pl.DataFrame({"user_id": [1, 1, 2, 2, 3], "item_id": [1, 2, 1, 2, 1]})
    frame.write_parquet(tmp_path / "log.parquet")
    log = read_interactions(tmp_path / "log.parquet")
    assert filter_interactions(log) is log
    once = filter_interactions(log, min_user_events=2)
    assert isinstance(once, pl.LazyFrame)
    again = filter_interactions(once, min_item_events=2)
    assert again.collect().rows() == [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"duplicates": "drop"}, "duplicates is 'drop'; expected one of keep, first, last"),
        ({"min_user_events": 0}, "min_user_events is 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        filter_interactions(as_log([("u", "a", 0)]), **options)
