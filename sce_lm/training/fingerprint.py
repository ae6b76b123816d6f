"""Whether two sources hold the same data, whatever their order, path, format or cut into files.

Each event of a log, or document of a text, is hashed to 64 bits, and the hashes are added modulo
2^64: a sum knows no order. The hash of an event mixes digests of its user and its item with its
time, or, in a log without times, with its place among the user's events, whose order is content
then. Digests are BLAKE2b and the mixing is integer arithmetic, so that a fingerprint written today
is the one computed tomorrow by other versions of the libraries.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl

from sce_lm.recsys.events import Events, read_events

BLOCK = 2**22
"""Events hashed at a time: a few hundred megabytes of temporaries at most."""


@dataclass(frozen=True)
class Fingerprint:
    """Of one source; equal for equal content."""

    digest: str
    """16 hexadecimal digits."""
    counts: dict[str, int]
    """What a message can say of a change: users, items and events, or documents."""

    def change(self, now: "Fingerprint") -> str:
        """What differs in `now`, in a few words, e.g. "3 more items, 12 more events"."""
        changes = []
        for name, count in self.counts.items():
            difference = now.counts[name] - count
            if difference:
                noun = name.removesuffix("s") if abs(difference) == 1 else name
                changes.append(f"{abs(difference)} {'more' if difference > 0 else 'fewer'} {noun}")
        *others, last = self.counts
        names = f"{', '.join(others)} and {last}" if others else last
        return ", ".join(changes) or f"as many {names} as before, but others"


def of_log(log: pl.LazyFrame | Events) -> Fingerprint:
    """The fingerprint of a log, as from `recsys.read_interactions`, or of its events."""
    events = read_events(log)
    users, items = digests(events.users), digests(events.items)
    when = _ranks_of_events(events.user) if events.time is None else events.time
    total = 0
    for start in range(0, len(events.user), BLOCK):
        part = slice(start, start + BLOCK)
        hashed = _mixed(users[events.user[part]]) + items[events.item[part]]
        total += _sum(_mixed(hashed) + _as_integers(when[part]))
    counts = {"users": len(users), "items": len(items), "events": len(events.user)}
    return Fingerprint(f"{total % 2**64:016x}", counts)


def of_documents(*parts: np.ndarray) -> Fingerprint:
    """The fingerprint of a text.

    Args:
        parts: uint64, :func:`digests` of documents that are not blank.
    """
    total = sum(_sum(part) for part in parts)
    return Fingerprint(f"{total % 2**64:016x}", {"documents": sum(map(len, parts))})


def digests(texts: Iterable[str]) -> np.ndarray:
    """uint64, a BLAKE2b digest of each text."""
    found = b"".join(hashlib.blake2b(t.encode(), digest_size=8).digest() for t in texts)
    return np.frombuffer(found, dtype="<u8").astype(np.uint64)


def _as_integers(when: pl.Series) -> np.ndarray:
    """uint64: times in a form that does not depend on their type."""
    if when.dtype in (pl.Date, pl.Datetime):
        when = when.cast(pl.Datetime("us"))
    elif when.dtype.is_decimal():
        when = when.cast(pl.Float64)
    values = when.to_physical().to_numpy()
    if values.dtype.kind != "f":
        return values.astype(np.int64).view(np.uint64)
    # A whole number is the same as an integer and as a float.
    values = values.astype(np.float64)
    is_whole = (values == np.floor(values)) & (np.abs(values) < 2.0**63)
    whole = np.where(is_whole, values, 0).astype(np.int64)
    return np.where(is_whole, whole, values.view(np.int64)).view(np.uint64)


def _ranks_of_events(user: np.ndarray) -> pl.Series:
    """[events], place among the events of the user, from 0."""
    places, counts = np.empty(len(user), dtype=np.int64), np.bincount(user)
    places[np.argsort(user, kind="stable")] = np.arange(len(user)) - np.repeat(
        np.cumsum(counts) - counts, counts
    )
    return pl.Series(places)


def _sum(values: np.ndarray) -> int:
    """The sum of the mixed values, modulo 2^64."""
    return int(_mixed(values).sum(dtype=np.uint64))


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), a bijection of uint64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
