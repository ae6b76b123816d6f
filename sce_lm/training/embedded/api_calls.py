"""Item sequences from source code: which functions a library's functions call, and in what order.

A function of an installed package is the user, and the names that it calls are the items, in the
order in which one reads them (`calls` has the rules of naming). Predicting the next one is API
recommendation as editors do it, with a long-tailed catalogue of tens of thousands of items that is
on every machine where the package is installed.

What keeps the task honest:

- A name counts once a function, at its first call. Evaluation masks the items already seen, so a
  repeated call could never be recommended, and a third of all functions end on one.
- Functions with the same sequence, their modules' own names apart, are one function. Libraries copy
  code (transformers by policy), and a copy in training would give away the held-out item.
- Functions of fewer than `min_calls` calls have too little to predict from, and are left out.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import polars as pl
from tqdm.auto import tqdm

from sce_lm.files import new_folder
from sce_lm.training.embedded import calls
from sce_lm.training.embedded.sources import (
    DEFAULT_PACKAGES,
    find_sources,
    fingerprint,
    read_files,
)


@dataclasses.dataclass(frozen=True)
class EmbeddedInteractions:
    """An interaction log on disk and its size."""

    path: Path
    """Parquet: user_id (string, "package.module:function"), item_id (string, called name),
    timestamp (int64, position in the function from 0); sorted by user and time."""
    sequences: int
    events: int
    items: int


def embedded_interactions(
    cache_dir: str | Path,
    *,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    min_calls: int = 5,
    keep_repeats: bool = False,
    keep_copies: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> EmbeddedInteractions:
    """Read the API-call sequences of installed packages into a parquet file.

    A second call finds it in the cache and returns.

    Args:
        cache_dir: holds one finished folder for each set of package versions and options.
        packages: top-level names, "stdlib" for the standard library; missing ones are skipped.
        min_calls: functions with fewer calls, counted after repeats are dropped, are left out.
        keep_repeats: keep every call of a name instead of its first.
        keep_copies: keep functions whose sequence another function already has.
        workers: reading processes; by default one for each processor of this process.
        progress: show a bar.

    Raises:
        ValueError: no function has enough calls.
    """
    sources = find_sources(packages)
    options = {"min_calls": min_calls, "keep_repeats": keep_repeats, "keep_copies": keep_copies}
    folder = Path(cache_dir) / f"api-calls-{fingerprint(packages, sources, options)}"
    if not folder.is_dir():
        answers = read_files(calls.__file__, sources, workers)
        bar = tqdm(answers, "reading API calls", len(sources), unit=" files", disable=not progress)
        functions = [
            (module, function, names)
            for (module, _), found in zip(sources, bar, strict=True)
            for function, names in found
        ]
        sequences = _select(functions, min_calls, keep_repeats, keep_copies)
        if not sequences:
            raise ValueError(
                f"no function with at least {min_calls} calls in {len(sources)} Python files of "
                f"{', '.join(packages) or 'no package'}: name installed packages that carry source "
                "code, or lower min_calls"
            )
        with new_folder(folder) as unfinished:
            _write_log(sequences, unfinished)
    statistics = json.loads((folder / "statistics.json").read_text())
    return EmbeddedInteractions(folder / "interactions.parquet", **statistics)


def _select(
    functions: Iterable[tuple[str, str, list[str]]],
    min_calls: int,
    keep_repeats: bool,
    keep_copies: bool,
) -> dict[str, list[str]]:
    """User id -> items. A name defined again in its module (by a branch, say) gets "#2", "#3"."""
    definitions: Counter[str] = Counter()
    seen: set[tuple[str, ...]] = set()
    sequences: dict[str, list[str]] = {}
    for module, function, names in functions:
        user = f"{module}:{function}"
        definitions[user] += 1
        if definitions[user] > 1:
            user = f"{user}#{definitions[user]}"
        items = names if keep_repeats else list(dict.fromkeys(names))
        pattern = tuple(item.removeprefix(f"{module}.") for item in items)
        if len(items) < min_calls or (not keep_copies and pattern in seen):
            continue
        seen.add(pattern)
        sequences[user] = items
    return dict(sorted(sequences.items()))


def _write_log(sequences: dict[str, list[str]], folder: Path) -> None:
    lengths = [len(items) for items in sequences.values()]
    events = pl.DataFrame(
        {
            "user_id": [user for user, items in sequences.items() for _ in items],
            "item_id": list(chain.from_iterable(sequences.values())),
            "timestamp": [position for length in lengths for position in range(length)],
        }
    )
    events.write_parquet(folder / "interactions.parquet")
    statistics = {
        "sequences": len(sequences),
        "events": len(events),
        "items": events["item_id"].n_unique(),
    }
    (folder / "statistics.json").write_text(json.dumps(statistics))
