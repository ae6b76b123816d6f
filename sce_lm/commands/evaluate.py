"""Evaluate a trained model, exactly, whatever objective it was trained with.

    sce-lm evaluate RUN_DIR [--split validation] [--k 10 50]
    sce-lm evaluate RUN_OR_MODEL_DIR --data LOG_OR_TEXT [--k 10 50]
    accelerate launch --num_processes 2 -m sce_lm evaluate RUN_DIR

Prints a table: a language model's nll (nats a token), perplexity and accuracy on the held-out
text, or a recommender's ndcg, hr, mrr and coverage for the test items over the whole catalogue,
with 95 % intervals, beside popularity, a first-order Markov chain and item-kNN, and the
protocol. What is asked is what the run stored when it began; a sentence says if its data have
changed since. With --data it is another text, all of it, or the last item of each user of another
log.

The same figures go to evaluation.json in the folder (evaluation-validation.json, or
evaluation-of-NAME.json with --data), and the popularity of recommended items to popularity.png.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sce_lm.commands import COMMANDS
from sce_lm.training.processes import build_accelerator, start_missing_processes
from sce_lm.training.run_evaluation import evaluate_on, evaluate_run, print_evaluation
from sce_lm.training.run_folder import RunFolder

COLUMNS = ("user_column", "item_column", "time_column", "text_column")


def read_arguments(prog: str, given: Sequence[str]) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog, description=COMMANDS["evaluate"])
    parser.add_argument(
        "folder", type=Path, help="of a run of sce-lm train, or of a saved model (with --data)"
    )
    parser.add_argument(
        "--split", choices=("validation", "test"), help="what of the run's data; default: test"
    )
    parser.add_argument("--data", help="another log or text: file, folder or hub id")
    parser.add_argument(
        "--k", type=int, nargs="+", help="lengths of a recommender's lists; default: the run's"
    )
    for name in COLUMNS:
        parser.add_argument(f"--{name}", help="of --data; default: the run's")
    return parser.parse_args(given)


def main(prog: str, arguments: Sequence[str]) -> None:
    """Evaluate, print the table, and write the figures."""
    told = read_arguments(prog, arguments)
    columns = {name: getattr(told, name) for name in COLUMNS if getattr(told, name)}
    folder = RunFolder(told.folder)
    if told.data is None and folder.is_saved_model():
        raise ValueError(
            f"{folder} is a saved model, beside which there are no data; give a log "
            "or a text by --data, or the folder of its run."
        )
    if (told.data is None and columns) or (told.data and told.split):
        raise ValueError(
            "--split chooses from a run's own data, and columns are of --data; leave one out."
        )
    asked = told.split or "test"
    start_missing_processes()
    accelerator = build_accelerator()
    if told.data is None:
        rows = evaluate_run(folder, accelerator, asked, told.k)
    else:
        rows = evaluate_on(folder, told.data, accelerator, told.k, **columns)
    if accelerator.is_main_process:
        print_evaluation(rows, told.data or asked)
        print(f"Figures as JSON: {folder.evaluation(asked, told.data)}")
    accelerator.end_training()
