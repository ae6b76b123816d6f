"""Recommendations from a file of histories to a file of lists, whatever their number.

Lists are written as they are made, a few thousand users at a time.
"""

import time as clock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sce_lm.files import replacing
from sce_lm.recsys.data import read_interactions
from sce_lm.recsys.events import read_events
from sce_lm.recsys.recommendation import recommend
from sce_lm.recsys.sequences import as_lists

USERS_AT_A_TIME = 8192
COLUMNS = pl.Schema({"user": pl.String, "rank": pl.Int32, "item": pl.String, "score": pl.Float64})
OUTPUT_SUFFIXES = (".csv", ".parquet", ".json", ".jsonl", ".ndjson")


def read_histories(
    source: str | Path,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = None,
) -> pl.DataFrame:
    """Raw histories from an interaction log, or from a file with a history a row.

    Args:
        source: as for ``read_interactions``; or a parquet or JSON-lines file whose item column
            holds lists of ids.
        user, item, time: names of its columns; time is not used where a row is a history.

    Returns:
        ``user`` (string), ``history`` (list of strings, oldest first).

    Raises:
        FileNotFoundError, ValueError: as of ``read_interactions``.
    """
    path = Path(source)
    if path.is_file() and path.suffix.lower() in (".parquet", ".json", ".jsonl", ".ndjson"):
        scan = pl.scan_parquet if path.suffix.lower() == ".parquet" else pl.scan_ndjson
        log = scan(path)
        schema = log.collect_schema()
        if user in schema and isinstance(schema.get(item), pl.List):
            return log.select(
                user=pl.col(user).cast(pl.String),
                history=pl.col(item).cast(pl.List(pl.String)).fill_null([]),
            ).collect()
    events = read_events(read_interactions(source, user=user, item=item, time=time))
    names = events.items.gather(events.item)
    lists = as_lists(names, np.bincount(events.user, minlength=len(events.users)))
    return pl.DataFrame({"user": events.users, "history": lists})


def recommend_file(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    histories: pl.DataFrame,
    output: str | Path,
    k: int = 10,
    *,
    progress: bool = True,
    **options,
) -> dict[str, int | float]:
    """:func:`recommend` for a frame of histories, written to a file as it goes.

    Args:
        histories: ``user``, ``history``, as from :func:`read_histories`.
        output: ``.csv``, ``.parquet`` or JSON lines (``.jsonl``, ``.json``, ``.ndjson``), a row a
            recommendation: ``user``, ``rank`` (from 1), ``item``, ``score``.
        k, options: as of :func:`recommend`.
        progress: show a progress bar.

    Returns:
        ``users``, ``unknown_items``, ``users_without_history``, ``seconds`` and
        ``users_per_second``.

    Raises:
        ValueError: as of :func:`recommend`, or an output of another kind.
    """
    started = clock.perf_counter()
    unknown = without_history = 0
    with (
        _writer(Path(output)) as write,
        tqdm(total=len(histories), unit=" users", disable=not progress) as bar,
    ):
        for part in histories.iter_slices(USERS_AT_A_TIME):
            found = recommend(model, tokenizer, part["history"].to_list(), k, **options)
            lengths = [len(listed) for listed in found.items]
            write(
                pl.DataFrame(
                    {
                        "user": np.repeat(part["user"].to_numpy(), lengths),
                        "rank": [rank + 1 for length in lengths for rank in range(length)],
                        "item": [item for listed in found.items for item in listed],
                        "score": [score for listed in found.scores for score in listed],
                    },
                    schema=COLUMNS,
                )
            )
            unknown += found.unknown_items
            without_history += found.users_without_history
            bar.update(len(part))
    seconds = clock.perf_counter() - started
    return {
        "users": len(histories),
        "unknown_items": unknown,
        "users_without_history": without_history,
        "seconds": seconds,
        "users_per_second": len(histories) / seconds,
    }


@contextmanager
def _writer(path: Path) -> Iterator[Callable[[pl.DataFrame], object]]:
    """A function that appends a frame to a file, which takes its name when it is complete."""
    suffix = path.suffix.lower()
    if suffix not in OUTPUT_SUFFIXES:
        raise ValueError(
            f"{path} ends in {suffix!r}; recommendations are written to a file that ends in "
            f"{', '.join(OUTPUT_SUFFIXES[:-1])} or {OUTPUT_SUFFIXES[-1]}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        if suffix == ".csv":
            COLUMNS.to_frame().write_csv(file)
            yield lambda frame: frame.write_csv(file, include_header=False)
        elif suffix == ".parquet":
            schema: pa.Schema = COLUMNS.to_frame().to_arrow().schema
            with pq.ParquetWriter(file, schema) as writer:
                yield lambda frame: writer.write_table(frame.to_arrow())
        else:
            yield lambda frame: frame.write_ndjson(file)
