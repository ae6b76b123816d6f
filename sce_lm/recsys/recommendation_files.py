"""Recommendations from histories to a file of lists, whatever their number.

Lists are made a few thousand users at a time. Those that are done lie in files of their own beside
the output, .NAME.parts/NUMBER.parquet, until all are, and become the output then. Each carries a
digest of what it answers: the model, the choices and its users' histories. So the same call after
an interruption goes on with what is missing, and lists of anything else are never taken.
"""

import hashlib
import json
import shutil
import time as clock
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from sce_lm.files import replacing
from sce_lm.recsys.history_files import HistoryParts
from sce_lm.recsys.recommendation import Recommendations, recommend
from sce_lm.recsys.tokenizer import item_counts, item_tokens

USERS_AT_A_TIME = 8192
COLUMNS = pl.Schema(
    {
        "user": pl.String,
        "rank": pl.Int32,
        "item": pl.String,
        "score": pl.Float64,
        "source": pl.String,
    }
)
WRITERS = {
    ".csv": pl.LazyFrame.sink_csv,
    ".parquet": pl.LazyFrame.sink_parquet,
    ".json": pl.LazyFrame.sink_ndjson,
    ".jsonl": pl.LazyFrame.sink_ndjson,
    ".ndjson": pl.LazyFrame.sink_ndjson,
}
OF_USERS = (
    "users",
    "users_without_history",
    "users_without_list",
    "unknown_items",
    "unknown_user_candidates",
)
"""What is counted in each part."""


def recommend_file(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    histories: pl.DataFrame | HistoryParts,
    output: str | Path,
    k: int = 10,
    *,
    candidates: Iterable[object] | None = None,
    exclude: Iterable[object] = (),
    progress: bool = True,
    **options,
) -> dict[str, int | float]:
    """:func:`recommend` for many histories, written to a file; it may be interrupted at any time,
    and called again.

    Args:
        histories: ``user``, ``history`` and, if users have them, ``candidates``, as from
            :func:`~sce_lm.recsys.read_histories`; or those of
            :func:`~sce_lm.recsys.scan_histories`, of which a part is held at a time.
        output: ``.csv``, ``.parquet`` or JSON lines (``.jsonl``, ``.json``, ``.ndjson``), a row a
            recommendation: ``user``, ``rank`` (from 1), ``item``, ``score`` (as of
            :class:`Recommendations`) and ``source``, "model" or "popularity". A user without a list
            has one row, with the source "none" and no rank, item or score.
        k, candidates, exclude, options: as of :func:`recommend`.
        progress: show a progress bar.

    Returns:
        ``users``, ``users_without_history`` (of whom nothing is known), ``users_without_list``,
        ``unknown_items``, ``unknown_user_candidates``, ``unknown_candidates``,
        ``unknown_excluded``, ``users_done_before`` (in an interrupted call), ``seconds`` and
        ``users_per_second``.

    Raises:
        ValueError: as of :func:`recommend`, or an output of another kind.
    """
    started, output = clock.perf_counter(), Path(output)
    suffix = output.suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(
            f"{output} ends in {suffix!r}; recommendations are written to a file that ends in "
            f"{', '.join([*WRITERS][:-1])} or {[*WRITERS][-1]}."
        )
    if isinstance(histories, pl.DataFrame):
        histories = HistoryParts(len(histories), histories.iter_slices)
    if candidates is not None and not isinstance(candidates, str):
        candidates = list(candidates)
    exclude = exclude if isinstance(exclude, str) else list(exclude)
    filters = {"candidates": candidates, "exclude": exclude}
    asked = _digest(model, tokenizer, k, filters | options)
    folder = output.with_name(f".{output.name}.parts")
    totals = dict.fromkeys((*OF_USERS, "unknown_candidates", "unknown_excluded"), 0)
    files, done_before = [], 0
    with tqdm(total=histories.num_histories, unit=" users", disable=not progress) as bar:
        for number, part in enumerate(histories.parts(USERS_AT_A_TIME)):
            files.append(folder / f"{number}.parquet")
            digest = hashlib.blake2b(part.hash_rows().to_numpy().tobytes(), key=asked).hexdigest()
            counts = _counts_of(files[-1], digest)
            if counts is None:
                own = part["candidates"] if "candidates" in part.columns else None
                found = recommend(
                    model, tokenizer, part["history"], k, user_candidates=own, **filters, **options
                )
                counts = {name: getattr(found, name) for name in totals if hasattr(found, name)}
                counts |= {"users": len(part), "users_without_list": found.sources.count("none")}
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(files[-1]) as partial:
                    of = {"digest": digest, "counts": json.dumps(counts)}
                    _rows(part["user"], found).write_parquet(partial, metadata=of)
            else:
                done_before += len(part)
            for name in OF_USERS:
                totals[name] += counts[name]
            totals |= {name: counts[name] for name in ("unknown_candidates", "unknown_excluded")}
            bar.update(len(part))
    with replacing(output) as partial:
        WRITERS[suffix](pl.scan_parquet(files, glob=False), partial)
    shutil.rmtree(folder)
    seconds = clock.perf_counter() - started
    return {
        **totals,
        "users_done_before": done_before,
        "seconds": seconds,
        "users_per_second": (totals["users"] - done_before) / seconds,
    }


def _digest(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, k: int, options: dict[str, Any]
) -> bytes:
    """What decides a list beside the history: parameters, items and choices."""
    found = hashlib.blake2b(digest_size=32)
    for name, values in model.state_dict().items():
        found.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        found.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    items = list(item_tokens(tokenizer))
    found.update("\n".join(tokenizer.convert_ids_to_tokens(items)).encode())
    counts = item_counts(tokenizer)
    found.update(b"" if counts is None else np.ascontiguousarray(counts).tobytes())
    index = options.get("index")
    choices = {n: v for n, v in options.items() if n not in ("index", "batch_size", "tile_size")}
    found.update(repr((k, sorted(choices.items()), index and index.effort)).encode())
    return found.digest()


def _counts_of(path: Path, digest: str) -> dict[str, int] | None:
    """What was counted in a part, if it is there and answers what is asked."""
    try:
        of = pl.read_parquet_metadata(path)
    except (OSError, pl.exceptions.PolarsError):  # none, or not whole
        return None
    return json.loads(of["counts"]) if of.get("digest") == digest else None


def _rows(users: pl.Series, found: Recommendations) -> pl.DataFrame:
    """A row a recommendation, and one for a user who has none."""
    lengths = [max(len(listed), 1) for listed in found.items]
    return pl.DataFrame(
        {
            "user": np.repeat(users.to_numpy(), lengths),
            "rank": [
                n + 1 if listed else None for listed in found.items for n in range(len(listed) or 1)
            ],
            "item": [item for listed in found.items for item in listed or (None,)],
            "score": [score for listed in found.scores for score in listed or (None,)],
            "source": np.repeat(np.array(found.sources, dtype=object), lengths),
        },
        schema=COLUMNS,
    )
