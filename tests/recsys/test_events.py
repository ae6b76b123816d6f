from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sce_lm.recsys import Events, filter_interactions
from sce_lm.recsys.events import read_events

EVENTS = st.lists(
    st.tuples(st.sampled_from("uvwx"), st.sampled_from("abcde"), st.integers(0, 3)),
    min_size=1,
    max_size=40,
)


def as_log(events: list[tuple[str, str, int]]) -> pl.LazyFrame:
    return pl.LazyFrame(events, schema=["user", "item", "time"], orient="row")


def rows(events: Events) -> list[tuple[str, str, int]]:
    """The events in words, in the order of the log."""
    users = events.users.gather(events.user)
    items = events.items.gather(events.item)
    assert events.time is not None
    assert events.users.to_list() == users.unique(maintain_order=True).to_list()
    assert events.items.to_list() == items.unique(maintain_order=True).to_list()
    return list(zip(users, items, events.time, strict=True))


@settings(max_examples=50)
@given(EVENTS)
def test_events_are_in_order_of_user_time_and_place(events):
    found = read_events(as_log(events))
    assert rows(found) == events
    users = list(dict.fromkeys(user for user, _, _ in events))
    expected = sorted(range(len(events)), key=lambda i: (users.index(events[i][0]), events[i][2]))
    assert found.order().tolist() == expected


def test_missing_values_have_no_number():
    log = pl.LazyFrame({"user": ["u", None, "v"], "item": [None, "a", None]})
    found = read_events(log)
    assert found.users.to_list() == ["u", "v"]
    assert found.user.tolist() == [0, -1, 1]
    assert found.items.to_list() == ["a"]
    assert found.item.tolist() == [-1, 0, -1]


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
    found = filter_interactions(as_log(events), **options)
    assert rows(found) == [events[i] for i in kept]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("keep", [0, 1, 2, 3, 4, 5]),
        ("first", [0, 2, 4]),
        ("last", [1, 4, 5]),
        ("consecutive", [0, 1, 2, 3, 4]),
    ],
)
def test_duplicates(policy, kept):
    # In order of time u has a (row 0), b (2), a (3), a (5), b (1), and v has a (4).
    events = [("u", "a", 1), ("u", "b", 9), ("u", "b", 2), ("u", "a", 3), ("v", "a", 0)]
    events.append(("u", "a", 3))
    found = filter_interactions(as_log(events), duplicates=policy)
    assert rows(found) == [events[row] for row in kept]


def test_duplicates_go_before_events_are_counted():
    events = [("u", "a", 1), ("u", "a", 2), ("u", "b", 3), ("v", "a", 1), ("v", "b", 2)]
    log = as_log([*events, ("w", "a", 1), ("w", "a", 2)])
    found = filter_interactions(log, duplicates="first", min_user_events=2)
    assert set(found.users) == {"u", "v"}
    with pytest.raises(ValueError, match="users need 3 events"):
        filter_interactions(log, duplicates="first", min_user_events=3)


def test_events_are_filtered_again_and_stay_what_they_were():
    log = [("u", "a", 0), ("u", "b", 1), ("v", "a", 2), ("v", "b", 3), ("w", "a", 4)]
    events = read_events(as_log(log))
    assert filter_interactions(events) is events
    once = filter_interactions(events, min_user_events=2)
    assert rows(filter_interactions(once, min_item_events=2)) == log[:4]
    assert rows(events) == log


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
