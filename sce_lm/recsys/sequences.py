"""From the events of a log to token sequences, a training set and statistics."""

import warnings

import numpy as np
import polars as pl
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sce_lm.recsys.events import Events, read_events
from sce_lm.recsys.histories import training_rows
from sce_lm.recsys.tokenizer import UNKNOWN_ITEM, item_tokens


def catalogue(log: pl.LazyFrame | Events) -> list[str]:
    """The distinct item ids of a log, or of its events, by first appearance, an order that a longer
    log only adds to."""
    if isinstance(log, Events):
        return log.items.to_list()
    distinct = log.select(pl.col("item").unique(maintain_order=True))
    return distinct.collect(engine="streaming")["item"].to_list()


def user_sequences(
    log: pl.LazyFrame | Events, tokenizer: PreTrainedTokenizerBase, *, keep_unknown: bool = False
) -> pl.DataFrame:
    """Every user's items as tokens, in order of time (ties keep the order of the file).

    Items that the tokenizer does not know are left out, and a warning counts their events.

    Args:
        log: as from ``read_interactions``, or the events of ``filter_interactions``, for which
            nothing is read again.
        tokenizer: an item tokenizer.
        keep_unknown: keep them, as the token of unknown items.

    Returns:
        A row a user, in order of first appearance: ``user`` (string), ``items`` (list of int32
        token ids) and, if the log has times, ``times`` (a list as long).

    Raises:
        ValueError: the tokenizer knows none of the items.
    """
    events = read_events(log)
    tokens = item_tokens(tokenizer)
    of_item = events.items.replace_strict(
        tokenizer.convert_ids_to_tokens(list(tokens)),
        pl.Series(tokens, dtype=pl.Int32),
        default=UNKNOWN_ITEM,
        return_dtype=pl.Int32,
    ).to_numpy()
    known = (of_item != UNKNOWN_ITEM)[events.item]
    unknown = len(events) - int(known.sum())
    if unknown == len(events):
        raise ValueError(
            f"The tokenizer ({len(tokenizer)} tokens) knows none of the items of "
            f"the log's {unknown} events; build it from this log or give the log behind it."
        )
    order = events.order()
    if unknown and not keep_unknown:
        warnings.warn(
            f"{unknown} of {len(events)} events are of items that the tokenizer does not know; "
            "they are left out.",
            stacklevel=2,
        )
        order = order[known[order]]
    lengths = np.bincount(events.user[order], minlength=len(events.users))
    items = pl.Series(of_item[events.item[order]])
    columns = {"user": events.users, "items": as_lists(items, lengths)}
    if events.time is not None:
        columns["times"] = as_lists(events.time.gather(order), lengths)
    return pl.DataFrame(columns).filter(pl.Series(lengths > 0))


def as_lists(values: pl.Series, lengths: np.ndarray) -> pl.Series:
    """Cut a column into consecutive lists.

    Args:
        values: [sum of lengths], without nulls.
        lengths: int [lists].
    """
    offsets = pa.array(np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))))
    lists = pl.from_arrow(pa.LargeListArray.from_arrays(offsets, values.to_physical().to_arrow()))
    assert isinstance(lists, pl.Series)
    return lists.cast(pl.List(values.dtype))


def training_dataset(sequences: pl.DataFrame, max_length: int) -> Dataset:
    """The training sequences as a ``datasets.Dataset`` with ``input_ids`` and ``labels``.

    Labels are the same ids: as with any causal language model the shift by one happens inside. Each
    user gives one row, the last ``max_length`` items; users with a single item have nothing to
    predict and are left out. Pad with ``transformers.DataCollatorForSeq2Seq(tokenizer)``, which
    fills labels with -100.

    Args:
        sequences: frame with a column ``items``.
        max_length: largest number of items in a row, at least 2.

    Raises:
        ValueError: ``max_length`` below 2, or no user has two items.
    """
    rows = training_rows(sequences, max_length).alias("input_ids").to_frame()
    return Dataset.from_polars(rows.with_columns(labels="input_ids"))


def statistics(sequences: pl.DataFrame) -> dict[str, int | float]:
    """Users, items, events, the distribution of sequence lengths, and ties in time; ready for
    printing or JSON.

    Args:
        sequences: as from :func:`user_sequences`.

    Returns:
        With times also ``tied_events`` (events at the same time as the user's event before) and
        ``users_tied_at_the_end`` (those whose last two events tie: the order of the file decides
        which of the two a leave-one-out split asks for).
    """
    lengths = sequences["items"].list.len()
    quantiles = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
    found = {
        "users": len(sequences),
        "items": sequences["items"].explode().n_unique(),
        "events": int(lengths.sum()),
        "length_mean": float(lengths.cast(pl.Float64).sum() / len(sequences)),
    } | {
        f"length_{name}": int(lengths.quantile(q, "nearest") or 0) for name, q in quantiles.items()
    }
    if "times" in sequences.columns:
        times = sequences["times"].explode().to_physical().to_numpy()
        ends = lengths.cum_sum().to_numpy()
        same = np.zeros(len(times), dtype=bool)
        np.equal(times[1:], times[:-1], out=same[1:])
        same[ends[:-1]] = False  # a user's first event has none before it
        found["tied_events"] = int(same.sum())
        found["users_tied_at_the_end"] = int(same[ends - 1].sum())
    return found
