"""From the configuration to a task: where its data and tokenizer come from.

A run is made of its data once, when it begins (`build_task`); later starts and evaluations take
what it stored (`resume_task`, `stored_task`), and tell when the data have changed since.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
from datasets import Dataset

from sce_lm import recsys
from sce_lm.training import text_blocks
from sce_lm.training.embedded.api_calls import embedded_interactions
from sce_lm.training.embedded.text import embedded_text
from sce_lm.training.fingerprint import Fingerprint, of_documents, of_log
from sce_lm.training.items import ItemsTask
from sce_lm.training.language_model import LanguageModelTask
from sce_lm.training.models import load_tokenizer
from sce_lm.training.pairs import PairsTask
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.stored_data import read_source, stored
from sce_lm.training.task import Task
from sce_lm.training.train_config import EMBEDDED, TrainConfig

SOURCE_FIELDS = (
    "data",
    "data_name",
    "data_options",
    "held_out",
    "text_column",
    "user_column",
    "item_column",
    "time_column",
    "time_format",
)
"""Where the data are and how they are read: fields that may change when a run is resumed, since the
fingerprints say whether the data are the same."""

Source = dict[str, Fingerprint]
"""By "data", and "held_out" where the held-out text is a source of its own."""


def build_task(config: TrainConfig) -> Task:
    """The data of a new run, read, checked and tokenised; kept in `cache_dir` where that takes
    long.

    Raises ValueError or FileNotFoundError, in one sentence, for data that cannot be used.
    """
    tokenizer = config.tokenizer or config.model
    if config.task == "items":
        log = _read_log(config)
        return _items_task(config).of_log(
            log, load_tokenizer(tokenizer) if tokenizer else None, config
        )
    documents, held_out, own = _read_documents(config)
    tokenizer = tokenizer or own
    if tokenizer is None:
        raise ValueError(
            f"No tokenizer is named for a model from scratch on {config.data!r}; set tokenizer to "
            "a hub id or a folder."
        )
    source = _fingerprints(documents, held_out, config)
    if held_out is None:
        documents, held_out = text_blocks.hold_out(documents, config)
    return LanguageModelTask(documents, held_out, load_tokenizer(tokenizer), config, source)


def resume_task(config: TrainConfig, run: RunFolder) -> tuple[Task, str | None]:
    """The task of a run that has begun, and what to tell about its data, in one sentence.

    A recommender's split is stored whole. The text that is trained on is not: it is read again, in
    the order in which the run began with it.

    Raises ValueError or FileNotFoundError, in one sentence, if the data are others than those that
    the run began with, unless `resume_with_changed_data` is set; or if text is not there any more.
    """
    before = read_source(run)
    if config.task == "items":
        task = _items_task(config).stored(run, config)
        try:
            change = _change(before, {"data": of_log(_read_log(config))})
        except FileNotFoundError:
            return task, (
                f"{config.data} is not there any more; {run} goes on with the split of it that it "
                "stored."
            )
        return task, change and _permitted(change, config, run)

    documents, held_out, _ = _read_documents(config)
    change = _change(before, _fingerprints(documents, held_out, config))
    note = change and _permitted(change, config, run)
    with stored(run) as folder:
        order = pl.read_parquet(folder / "documents.parquet")
    found = text_blocks.document_digests(documents, config)
    if note is None:
        rows = _rows_of(found, order.filter(~pl.col("held_out"))["digest"].to_numpy())
    elif "held_out" in before:
        rows = np.arange(len(found))
    else:
        held = order.filter("held_out")["digest"].to_numpy()
        rows = np.flatnonzero((found != 0) & ~np.isin(found, held))
    return _language_model(config, run, documents.select(rows)), note


def stored_task(config: TrainConfig, run: RunFolder) -> Task:
    """The task of a run for evaluation, from its folder alone; text has nothing to train on."""
    if config.task == "items":
        return _items_task(config).stored(run, config)
    return _language_model(config, run, None)


def changed_since(config: TrainConfig, run: RunFolder) -> str | None:
    """What to tell about the data of a run that is evaluated on what it stored; None if they are as
    they were, or are made or kept elsewhere (embedded, or on the hub)."""
    if config.data == EMBEDDED or not text_blocks.is_local(config.data):
        return None
    before = read_source(run)
    try:
        if config.task == "items":
            now = {"data": of_log(_read_log(config))}
        else:
            documents, held_out, _ = _read_documents(config)
            now = _fingerprints(documents, held_out, config)
    except (OSError, ValueError) as error:
        reason = str(error).split(";")[0].rstrip(".")
        return f"The data of {run} cannot be read any more ({reason}); {_ON_STORED}"
    change = _change(before, now)
    return change and f"The data of {run} have changed since it began ({change}); {_ON_STORED}"


def _items_task(config: TrainConfig) -> type[ItemsTask] | type[PairsTask]:
    return PairsTask if config.split == "random" else ItemsTask


_ON_STORED = "the figures are on what the run stored."


def _language_model(
    config: TrainConfig, run: RunFolder, train: Dataset | None
) -> LanguageModelTask:
    with stored(run) as folder:
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
        tokenised = Dataset.from_file(str(folder / "held_out.arrow"))
    held_out = text_blocks.PackedText(tokenised, config.sequence_length)
    return LanguageModelTask(train, held_out, tokenizer, config, read_source(run))


def _permitted(change: str, config: TrainConfig, run: RunFolder) -> str:
    """What a run does that goes on with other data; ValueError where it may not."""
    what = (
        "the split that it stored"
        if config.task == "items"
        else "the text as it is now, without the documents that it holds out,"
    )
    if not config.resume_with_changed_data:
        raise ValueError(
            f"{run} began with other data than there are now ({change}); give it those data, "
            f"choose another output_dir, or set resume_with_changed_data to go on with {what} "
            "all the same."
        )
    return (
        f"{run} began with other data than there are now ({change}); as told by "
        f"resume_with_changed_data it goes on with {what.rstrip(',')}."
    )


def _change(before: Source, now: Source) -> str | None:
    """What differs, in a few words; None if nothing does."""
    if before.keys() != now.keys():
        return "held-out text is " + ("named now" if "held_out" in now else "no longer named")
    changes = [
        f"{name}: {found.change(now[name])}" if len(before) > 1 else found.change(now[name])
        for name, found in before.items()
        if found.digest != now[name].digest
    ]
    return "; ".join(changes) or None


def _fingerprints(documents: Dataset, held_out: Dataset | None, config: TrainConfig) -> Source:
    named = {"data": documents} | ({} if held_out is None else {"held_out": held_out})
    found = {name: text_blocks.document_digests(each, config) for name, each in named.items()}
    return {name: of_documents(digests[digests != 0]) for name, digests in found.items()}


def _rows_of(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64, the places in `found` of the digests that are wanted, in their order; of equal ones
    each is taken once."""
    by_digest = np.argsort(found, kind="stable")
    order = np.argsort(wanted, kind="stable")
    ranked = wanted[order]
    first = np.searchsorted(ranked, ranked)  # of a run of equal digests
    places = np.searchsorted(found[by_digest], ranked) + np.arange(len(ranked)) - first
    rows = np.empty(len(wanted), dtype=np.int64)
    rows[order] = by_digest[places]
    return rows


def _read_documents(config: TrainConfig) -> tuple[Dataset, Dataset | None, str | None]:
    """The documents, those that are held out where that is a source of its own, and the tokenizer
    that belongs to them."""
    _check_options(embedded_text, config)
    if config.data != EMBEDDED:
        return *text_blocks.read_documents(config), None
    found = embedded_text(_cache(config), **config.data_options)
    train = text_blocks.read(str(found.train), "train", "text", config.cache_dir)
    held_out = text_blocks.read(str(found.heldout), "train", "text", config.cache_dir)
    return train, held_out, str(found.tokenizer)


def _read_log(config: TrainConfig) -> pl.LazyFrame:
    _check_options(embedded_interactions, config)
    if config.data == EMBEDDED:
        found = embedded_interactions(_cache(config), **config.data_options)
        return recsys.read_interactions(found.path, time="timestamp")
    return recsys.read_interactions(
        Path(config.data).expanduser(),
        user=config.user_column,
        item=config.item_column,
        time=config.time_column,
        time_format=config.time_format,
    )


def _cache(config: TrainConfig) -> Path:
    return Path(config.cache_dir).expanduser()


def _check_options(builder: Callable, config: TrainConfig) -> None:
    if config.data != EMBEDDED and config.data_options:
        raise ValueError(
            f"data_options are given ({', '.join(config.data_options)}) but data is "
            f"{config.data!r}; they belong to the embedded data; leave them out."
        )
    parameters = inspect.signature(builder).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in config.data_options:
        if name not in known:
            raise ValueError(
                f"data_options sets {name!r}, which the embedded data do not have; they have "
                f"{', '.join(known)}; correct it."
            )
