"""From the configuration to a task: where its data and tokenizer come from."""

import inspect
from collections.abc import Callable
from pathlib import Path

from sce_lm import recsys
from sce_lm.training import text
from sce_lm.training.config import EMBEDDED, TrainConfig
from sce_lm.training.embedded.api_calls import embedded_interactions
from sce_lm.training.embedded.text import embedded_text
from sce_lm.training.items import ItemsTask
from sce_lm.training.language_model import LanguageModelTask
from sce_lm.training.models import load_tokenizer
from sce_lm.training.task import Task


def build_task(config: TrainConfig) -> Task:
    """The data of a run, read, checked and tokenised; kept in `cache_dir` where that takes long.

    Raises ValueError or FileNotFoundError, in one sentence, for data that cannot be used.
    """
    if config.data != EMBEDDED and config.data_options:
        raise ValueError(
            f"data_options are given ({', '.join(config.data_options)}) but data is "
            f"{config.data!r}; they belong to the embedded data; leave them out."
        )
    return _language_model(config) if config.task == "lm" else _items(config)


def _language_model(config: TrainConfig) -> Task:
    tokenizer_source = config.tokenizer or config.model
    if config.data == EMBEDDED:
        _check_options(embedded_text, config)
        found = embedded_text(_cache(config), **config.data_options)
        train = text.read(str(found.train), "train", "text", config.cache_dir)
        held_out = text.read(str(found.heldout), "train", "text", config.cache_dir)
        tokenizer_source = tokenizer_source or str(found.tokenizer)
    else:
        train, held_out = text.read_documents(config)
    if tokenizer_source is None:
        raise ValueError(
            f"No tokenizer is named for a model from scratch on {config.data!r}; set tokenizer to "
            "a hub id or a folder."
        )
    return LanguageModelTask(train, held_out, load_tokenizer(tokenizer_source), config)


def _items(config: TrainConfig) -> Task:
    if config.data == EMBEDDED:
        _check_options(embedded_interactions, config)
        found = embedded_interactions(_cache(config), **config.data_options)
        log = recsys.read_interactions(found.path, time="timestamp")
    else:
        log = recsys.read_interactions(
            Path(config.data).expanduser(),
            user=config.user_column,
            item=config.item_column,
            time=config.time_column,
            time_format=config.time_format,
        )
    source = config.tokenizer or config.model
    return ItemsTask(log, load_tokenizer(source) if source else None, config)


def _cache(config: TrainConfig) -> Path:
    return Path(config.cache_dir).expanduser()


def _check_options(builder: Callable, config: TrainConfig) -> None:
    parameters = inspect.signature(builder).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in config.data_options:
        if name not in known:
            raise ValueError(
                f"data_options sets {name!r}, which the embedded data do not have; they have "
                f"{', '.join(known)}; correct it."
            )
