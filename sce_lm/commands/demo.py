"""A language model and a recommender on embedded data, each trained by three methods.

    sce-lm demo

Data are made from the installed Python packages: no hub and no GPU. Runs go to runs/demo; those
that are there are not trained again. It ends with tables, a plot, a few lines that the language
model writes and a few lists of the recommender.
"""

import argparse
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed
from transformers.utils import logging

from sce_lm import recsys
from sce_lm.benchmarks import demo, report, results
from sce_lm.benchmarks.comparison import Trained, train, validation_curve
from sce_lm.benchmarks.methods import methods
from sce_lm.commands import COMMANDS
from sce_lm.commands.presets import PRESETS
from sce_lm.recsys.scoring import seen_items, top_items
from sce_lm.training.items import ItemsTask
from sce_lm.training.models import load_model
from sce_lm.training.task_sources import build_task
from sce_lm.training.train_config import TrainConfig

FOLDER = Path("runs/demo")
METHODS = {
    "exact": "every position against the whole vocabulary: the reference, and the slow one",
    "sce-published": "hard negatives of each bucket alone, as in the paper",
    "sce": "a few thousand classes whose softmax is right on average",
}
"""Name of each method, and what it does."""
FEW = {"eval_every": 20, "checkpoint_every": 0, "log_every": 5}
LANGUAGE_MODEL = {
    **FEW,
    "data_options": {"max_bytes": 8_000_000, "heldout_share": 0.015},
    "per_device_batch_size": 4,
    "max_steps": 80,
    "warmup_steps": 20,
    "learning_rate": 2e-3,
    "eval_batches": 4,
}
RECOMMENDER = {**FEW, "max_steps": 200, "warmup_steps": 20, "eval_every": 50, "eval_users": 2000}
PROMPTS = ("Returns the", "A list of", "If the")
HISTORIES = (["open", "json.load"], ["isinstance", "ValueError"], ["super", ".__init__"])
"""What is asked of the recommender at the end."""
SHOWN = 5
"""Items of a list."""


def main(prog: str, arguments: Sequence[str]) -> None:
    """Train, compare and show; results and the plot go to the folder."""
    argparse.ArgumentParser(prog, description=COMMANDS["demo"]).parse_args(arguments)
    started = time.perf_counter()
    logging.disable_progress_bar()  # one bar at a time, that of the training
    language, text = compared(
        "lm", LANGUAGE_MODEL, "Language model", "words of their documentation"
    )
    recommender, lists = compared(
        "items", RECOMMENDER, "Recommender", "which functions theirs call"
    )
    for comparison in (text, lists):
        report.print_line(f"\n{comparison.title}")
        for table in demo.TABLES:
            table.print(comparison.rows)
    report.print_line(f"\n{verdict(lists.rows)}")
    show_text(language[-1])
    show_lists(recommender[-1])

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    took = {
        "took_seconds": time.perf_counter() - started,
        "processor_seconds": sum(one.ru_utime + one.ru_stime for one in used),
    }
    text.sizes |= took
    found = results.Results("demo", [text, lists], **results.provenance("cpu"))
    found.save(FOLDER / "results.json")
    plot = FOLDER / "demo.png"
    report.draw(plot, demo.PLOTS, [(c.title.split(":")[0], c.rows) for c in found.comparisons])
    report.print_line(
        f"\n{plot} shows quality against time; the figures are in {FOLDER}/results.json. "
        f"{took['took_seconds']:.0f} s, {took['processor_seconds']:.0f} s of processor time."
    )


def compared(
    task: str, changes: dict[str, Any], what: str, of: str
) -> tuple[list[Trained], results.Comparison]:
    """The methods' runs on a preset with these changes, and the rows that show them."""
    config = TrainConfig(**{**PRESETS[task], **changes})
    report.print_line(f"\n{what}, on the installed packages: {of}")
    sizes = list(build_task(config).describe().items())[:3]
    size = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in sizes)
    report.print_line(f"  {size}; {config.max_steps} steps by each of three losses")
    found = []
    for name, why in METHODS.items():
        method = methods()[name]
        report.print_line(f"  {method.label}: {why}")
        found.append(train(config, method, FOLDER / task, [config.seed]))
        seconds, figure = validation_curve(found[-1].records[0], found[-1].task)[-1]
        report.print_line(f"    {seconds:.0f} s; {found[-1].task.headline[0].upper()} {figure:.4f}")
    return found, demo.shown(found, config, what)


def verdict(rows: Sequence[report.Row]) -> str:
    """Whether a trained recommender is better than those without training, in a sentence."""
    ndcg = {row["label"]: demo.NDCG.number(row) or 0.0 for row in rows}
    trained = {row["label"]: ndcg[row["label"]] for row in rows if "curve" in row}
    best = max(trained, key=lambda label: trained[label])
    simple = max(ndcg.keys() - trained, key=lambda label: ndcg[label])
    is_better = "is better than" if ndcg[best] > ndcg[simple] else "is not better than"
    return (
        f"The best trained recommender ({best}, NDCG@10 {ndcg[best]:.4f}) {is_better} the best "
        f"one without training ({simple}, {ndcg[simple]:.4f})."
    )


def show_text(found: Trained) -> None:
    """A few lines that a language model goes on with."""
    model: Any = load_model(found.folders[0].model).eval()
    tokenizer = found.task.tokenizer
    seconds, _ = validation_curve(found.records[0], found.task)[-1]
    report.print_line(f"\nWritten after {seconds:.0f} s of training ({found.method.label}):")
    set_seed(0)
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        written = model.generate(
            **asked, max_new_tokens=24, do_sample=True, temperature=0.7, top_k=50
        )
        (text,) = tokenizer.batch_decode(written, skip_special_tokens=True)
        report.print_line(f"  {' '.join(text.split())}")


def show_lists(found: Trained) -> None:
    """What comes after a few histories, by a recommender and by the Markov chain."""
    task = found.task
    assert isinstance(task, ItemsTask)
    model, tokenizer = load_model(found.folders[0].model), task.tokenizer
    listed = recsys.recommend(model, tokenizer, HISTORIES, k=SHOWN).items
    chain = recsys.markov_scorer(task.split.before_test(), task.items)
    tokens = [np.array(tokenizer.convert_tokens_to_ids(history)) for history in HISTORIES]
    _, best = top_items(chain(tokens), task.items, SHOWN, masked=seen_items(tokens))
    for history, ours, theirs in zip(HISTORIES, listed, best.tolist()):
        report.print_line(f"\nafter `{', '.join(history)}`")
        report.print_line(f"  {found.method.label:<14} -> {', '.join(ours)}")
        names = tokenizer.convert_ids_to_tokens(theirs)
        report.print_line(f"  {'Markov chain':<14} -> {', '.join(names)}")
