"""What is trained on and what is asked: leave-one-out, the last n items, or a cut in time.

Every question is a row: the history that a model may read and the item that came next. An item of
the held-out part that does not occur in training stays a question where it is kept (the model has
never been trained on it, so it is mostly a miss), and ``Split.summary()`` counts it.
"""

from dataclasses import dataclass
from datetime import date
from typing import Literal, get_args

import numpy as np
import polars as pl

from sce_lm.recsys.data import TIE_RULE
from sce_lm.recsys.sequences import as_lists
from sce_lm.recsys.times import text_time, time_kind

ColdItems = Literal["drop", "keep"]
Past = Literal["after", "all"]


@dataclass(frozen=True)
class Split:
    """Training sequences and two sets of questions."""

    train: pl.DataFrame
    """``user``, ``items``, and after :func:`temporal_split` ``times``: everything that may be
    trained on."""
    validation: pl.DataFrame
    """``user``, ``history``, ``target``: asked in the course of training."""
    test: pl.DataFrame
    """``user``, ``history``, ``target``: asked at the end; histories hold the validation items."""
    protocol: str
    """How it was made, in words, the rule for ties in time included."""

    def before_test(self) -> pl.Series:
        """[training users] everything of theirs that precedes the test, validation items included:
        what baselines count.

        After :func:`last_n` that is all but the test items; after :func:`temporal_split`, where
        nobody is both trained on and asked, the training sequences.
        """
        first = self.test.select("user", before="history").unique(
            "user", keep="first", maintain_order=True
        )
        joined = self.train.join(first, on="user", how="left", maintain_order="left")
        return joined.select(pl.coalesce("before", "items"))["before"]

    def summary(self) -> dict[str, str | int]:
        """The protocol and its sizes, ready for printing or JSON."""
        trained = self.train["items"].explode().unique()
        counts: dict[str, str | int] = {
            "protocol": self.protocol,
            "training_users": len(self.train),
            "training_events": int(self.train["items"].list.len().sum()),
        }
        for name, questions in (("validation", self.validation), ("test", self.test)):
            counts[f"{name}_questions"] = len(questions)
            unseen = ~questions["target"].is_in(trained.implode())
            counts[f"{name}_targets_unseen_in_training"] = int(unseen.sum())
        return counts


def leave_one_out(sequences: pl.DataFrame) -> Split:
    """A user's last item is for test and the one before it for validation: :func:`last_n` of 1."""
    return last_n(sequences, 1)


def last_n(sequences: pl.DataFrame, n: int) -> Split:
    """A user's last n items are for test and the n before them for validation.

    Each of them is a question of its own, with everything before it as history. Users with fewer
    than ``2n + 1`` events train only. The order of users is kept.

    Args:
        sequences: as from ``user_sequences``.
        n: items a user in each of the two sets.

    Raises:
        ValueError: n below 1, or no user has enough events.
    """
    if n < 1:
        raise ValueError(f"n is {n}; hold out at least 1 item a user.")
    name = "leave-one-out" if n == 1 else f"last-{n}"
    items, length = pl.col("items"), pl.col("items").list.len()
    held_out = sequences.filter(length >= 2 * n + 1)
    if held_out.is_empty():
        raise ValueError(
            f"None of the {len(sequences)} users has {2 * n + 1} events; {name} takes one to train "
            f"on, {n} for validation and {n} for the test; give a longer log."
        )

    kept = pl.when(length >= 2 * n + 1).then(items.list.head(length - 2 * n)).otherwise(items)
    return Split(
        train=sequences.select("user", items=kept),
        validation=_questions(held_out, range(-2 * n, -n)),
        test=_questions(held_out, range(-n, 0)),
        protocol=f"{name}; {TIE_RULE}",
    )


def _questions(sequences: pl.DataFrame, places: range) -> pl.DataFrame:
    """The items at some places, counted from the end, each behind all that precedes it."""
    items = pl.col("items")
    return pl.concat(
        sequences.select(
            "user", history=items.list.head(items.list.len() + place), target=items.list.get(place)
        )
        for place in places
    )


def last_items(sequences: pl.DataFrame, items: range) -> tuple[pl.DataFrame, dict[str, int]]:
    """Each user's last item, asked of a model that was trained on other data.

    Items that the model does not know are left out of the histories and stay questions, which it
    misses.

    Args:
        sequences: as from ``user_sequences`` with ``keep_unknown``.
        items: tokens of the items that the model knows.

    Returns:
        ``user``, ``history``, ``target`` of the users who have a history, and counts:
        ``unknown_events``, and ``users_without_history``, who are not asked.
    """
    is_known = (pl.element() >= items.start) & (pl.element() < items.stop)
    past = pl.col("items").list.head(pl.col("items").list.len() - 1)
    questions = sequences.select(
        "user",
        history=past.list.eval(pl.element().filter(is_known)),
        target=pl.col("items").list.last(),
    )
    asked = questions.filter(pl.col("history").list.len() > 0)
    tokens = sequences["items"].explode()
    counts = {
        "unknown_events": int(((tokens < items.start) | (tokens >= items.stop)).sum()),
        "users_without_history": len(questions) - len(asked),
    }
    return asked, counts


def temporal_split(
    sequences: pl.DataFrame,
    at: float | int | str | date,
    *,
    past: Past = "after",
    cold_items: ColdItems = "drop",
) -> Split:
    """A global cut in time: users with events at or after it leave training altogether.

    They are asked for their last item in the test and for the one before it in validation. The
    defaults are the protocol of the SCE paper's code, with ``at=0.95``.

    Args:
        sequences: as from ``user_sequences``, with ``times``.
        at: a number between 0 and 1 is the quantile of all events' times (the nearest event's);
            anything else a time in the log's own units, or a date or ISO 8601 text where the log
            has dates, with a zone where those have one.
        past: histories hold a user's events "after" the cut only, or "all" of them.
        cold_items: "drop" events of items that do not occur in training from the questions and
            histories, or "keep" them. Users with fewer than 3 events are not asked.

    Raises:
        ValueError: no times, a cut that does not fit them, or nobody on one of its sides.
    """
    if past not in get_args(Past) or cold_items not in get_args(ColdItems):
        raise ValueError(
            f"past is {past!r} and cold_items {cold_items!r}; expected one of "
            f"{', '.join(get_args(Past))} and one of {', '.join(get_args(ColdItems))}."
        )
    if "times" not in sequences.columns:
        raise ValueError(
            "A temporal split needs times, and the log was read without; name its time column."
        )
    times = sequences["times"].explode()
    cut, name = _cut(times, at)
    after = (times >= cut).to_numpy()
    user = np.repeat(np.arange(len(sequences)), sequences["items"].list.len().to_numpy())
    asked = np.bincount(user, weights=after) > 0
    train = sequences.filter(pl.Series(~asked)).select("user", "items", "times")
    if train.is_empty() or not asked.any():
        raise ValueError(
            f"The cut at {name} leaves {len(train)} users before it and {int(asked.sum())} after; "
            "choose a time between."
        )

    token = sequences["items"].explode()
    kept = asked[user]
    if past == "after":
        kept &= after
    if cold_items == "drop":
        kept &= token.is_in(train["items"].explode().unique().implode()).to_numpy()
    lengths = np.bincount(user[kept], minlength=len(sequences))
    held_out = (
        sequences.select("user")
        .with_columns(items=as_lists(token.filter(pl.Series(kept)), lengths))
        .filter(pl.Series(lengths >= 3))
    )
    if held_out.is_empty():
        raise ValueError(
            f"None of the {int(asked.sum())} users after the cut at {name} has 3 events to ask "
            "for; choose an earlier time, or keep all of the past."
        )
    protocol = (
        f"temporal at {name}; histories: events "
        f"{'after the cut' if past == 'after' else 'before and after the cut'}; items unseen in "
        f"training: {'left out' if cold_items == 'drop' else 'kept'}; {TIE_RULE}"
    )
    return Split(
        train=train,
        validation=_questions(held_out, range(-2, -1)),
        test=_questions(held_out, range(-1, 0)),
        protocol=protocol,
    )


def _cut(times: pl.Series, at: float | int | str | date):
    """The time of the cut in the log's type, and its name for the protocol."""
    if isinstance(at, float) and 0 < at < 1:
        place = round(at * (len(times) - 1))
        cut = times.sort()[place]
        return cut, f"the {at:g} quantile of time ({cut})"
    try:
        value = text_time(at) if isinstance(at, str) else pl.Series([at])
        here, there = time_kind(times.dtype, "The log"), time_kind(value.dtype, "The cut")
        if here != there:
            raise ValueError(f"the log has {here} and the cut is one of {there}")
        # Numbers stay as they are: a cut at 5.5 is not one at 5.
        cut = (value if value.dtype.is_numeric() else value.cast(times.dtype))[0]
    except (pl.exceptions.PolarsError, ValueError, TypeError) as error:
        raise ValueError(
            f"The cut {at!r} cannot be compared with times of type {times.dtype} "
            f"({str(error).splitlines()[0].rstrip('.')}); give a quantile between 0 and 1, or a "
            "time of that kind, such as 2024-05-01T00:00Z where times have a zone."
        ) from error
    return cut, str(cut)
