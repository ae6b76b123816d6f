"""A run's model evaluated on what the run stored, or any model on data that are named."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sce_lm import objectives, recsys
from sce_lm.files import write_json
from sce_lm.hf.adapter import apply_sce
from sce_lm.recsys.data import TIE_RULE
from sce_lm.training import text_blocks
from sce_lm.training.items import rank_questions
from sce_lm.training.language_model import LanguageModelTask
from sce_lm.training.models import load_model, load_tokenizer
from sce_lm.training.plots import draw_popularity
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.task import HeldOut
from sce_lm.training.task_sources import changed_since, stored_task
from sce_lm.training.train_config import TrainConfig

MODEL = "model"
"""The trained model's name among the rows of an evaluation."""

Rows = dict[str, dict[str, Any]]
"""Figures by name: those of the ``"model"`` and, of a recommender on its run's data, of baselines
without training, each with its protocol."""


def evaluate_run(
    run: RunFolder, accelerator: Accelerator, on: HeldOut = "test", k: Sequence[int] | None = None
) -> Rows:
    """Exact likelihood on the held-out text, or full-catalogue metrics on the items asked for, as
    the run stored them when it began. A warning says if its data have changed since.

    Args:
        run: folder of a finished run; ``evaluation.json`` (or ``evaluation-validation.json``) and,
            of a recommender, ``popularity.png`` are written into it.
        accelerator: evaluation is shared by its processes, in its precision.
        on: what is asked.
        k: lengths of a recommender's lists; None: those of the run.

    Raises ValueError if the folder holds no finished run.
    """
    config = _with_lengths(_run_config(run), k)
    set_seed(config.seed)
    task = stored_task(config, run)
    if accelerator.is_main_process:
        change = changed_since(config, run)
        if change:
            warnings.warn(change, stacklevel=2)
    accelerator.wait_for_everyone()
    model = _prepared(run.model, config.dtype, accelerator)
    trained = task.evaluate(model, accelerator, on)
    rows = {MODEL: trained, **task.baselines(on)}
    if accelerator.is_main_process:
        write_json(run.evaluation(on), rows)
        profile = "list_entries_by_popularity"
        if profile in trained:
            try:
                draw_popularity({n: row[profile] for n, row in rows.items()}, run.popularity)
            except ImportError:
                print("matplotlib is not installed, so no plot is drawn.")
    return rows


def evaluate_on(
    folder: RunFolder,
    data: str,
    accelerator: Accelerator,
    k: Sequence[int] | None = None,
    **columns: str | None,
) -> Rows:
    """A model on other data than its run's: the likelihood of all of a text, or of a log the last
    item of each user whose earlier items are known.

    Args:
        folder: of a finished run, or of a model and its tokenizer as save_pretrained writes them;
            ``evaluation-of-NAME.json`` is written into it.
        data: a text or a log, as `TrainConfig.data`.
        accelerator: as of :func:`evaluate_run`.
        k: lengths of a recommender's lists.
        columns: fields of `TrainConfig` that name columns of the data; those of the run otherwise.

    Raises ValueError or FileNotFoundError for a folder or data that cannot be used.
    """
    is_run = not folder.is_saved_model()
    path = folder.model if is_run else folder.path
    config = _run_config(folder) if is_run else None
    model = _prepared(path, config.dtype if config else "auto", accelerator)
    tokenizer = load_tokenizer(str(path))
    if config is None:
        is_recommender = recsys.is_item_tokenizer(tokenizer)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = TrainConfig.sequence_length
        config = TrainConfig(
            task="items" if is_recommender else "lm",
            model=str(path),
            sequence_length=(positions or length)
            if is_recommender
            else min(positions or length, length),
        )
    config = dataclasses.replace(_with_lengths(config, k), data=data, data_name=None, **columns)
    set_seed(config.seed)
    if config.task == "items":
        report = _last_items(model, tokenizer, config)
    else:
        with accelerator.main_process_first():
            documents = text_blocks.read(data, "train", config.text_column, config.cache_dir)
            task = LanguageModelTask(None, documents, tokenizer, config)
        report = task.evaluate(model, accelerator, "test")
    rows = {MODEL: report}
    if accelerator.is_main_process:
        write_json(folder.evaluation(data=data), rows)
    return rows


def _last_items(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> dict[str, Any]:
    """The report of `recsys.ranking_report` for the last item of each user of a log; items that the
    model does not know are left out of histories, and are misses where they are asked for."""
    items = recsys.item_tokens(tokenizer)
    recsys.check_list_lengths(config.eval_k, items)
    log = recsys.read_interactions(
        Path(config.data).expanduser(),
        user=config.user_column,
        item=config.item_column,
        time=config.time_column,
    )
    log = recsys.filter_interactions(log, duplicates=config.duplicates)
    sequences = recsys.user_sequences(log, tokenizer, keep_unknown=True)
    questions, counts = recsys.last_items(sequences, items)
    if questions.is_empty():
        raise ValueError(
            f"No user of {config.data} has an item that the model knows and another one after it, "
            "so there is nothing to ask; give a log of its items."
        )
    protocol = f"the last item of each user of {config.data}; {TIE_RULE}"
    _, report = rank_questions(model, questions, items, protocol, config)
    return {**report, **counts}


def _run_config(run: RunFolder) -> TrainConfig:
    for needed in (run.config, run.model):
        if not needed.exists():
            raise ValueError(
                f"{run} has no {needed.name}; expected the folder of a finished run of "
                "sce-lm train; check the path, or let the run come to its end."
            )
    return TrainConfig(**run.fields())


def _with_lengths(config: TrainConfig, k: Sequence[int] | None) -> TrainConfig:
    if k is None:
        return config
    if config.task != "items":
        raise ValueError(
            "k is the length of a recommender's lists and this is a language model; leave it out."
        )
    return dataclasses.replace(config, eval_k=list(k))


def _prepared(path: Path, dtype: str, accelerator: Accelerator) -> PreTrainedModel:
    """The model of a folder, exact, on its device and ready to be evaluated."""
    model = load_model(path, dtype=dtype)
    apply_sce(model, objectives.get("exact"))
    model = accelerator.prepare_model(model, evaluation_mode=True)
    return accelerator.unwrap_model(model).eval()


def print_evaluation(rows: Rows, title: str) -> None:
    """Print a table, a line a method with 95 % intervals where there are some, and the protocol."""
    trained = rows[MODEL]
    names = [name for name, value in trained.items() if isinstance(value, float)]
    table = Table("method", title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for label, row in rows.items():
        table.add_row(label, *(_cell(row, name) for name in names))
    console = Console(width=24 + 26 * len(names))
    console.print(table)
    for name, value in trained.get("protocol", {}).items():
        console.print(f"{name}: {value}", markup=False)
    for name, value in trained.items():
        if isinstance(value, int):
            console.print(f"{name}: {value}")


def _cell(row: dict[str, Any], name: str) -> str:
    cell = f"{row[name]:.4f}"
    if name in row.get("intervals", {}):
        low, high = row["intervals"][name]
        cell += f" [{low:.4f}, {high:.4f}]"
    return cell
