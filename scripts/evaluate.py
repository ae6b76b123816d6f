"""Evaluate a trained model, exactly, whatever objective it was trained with.

    python scripts/evaluate.py RUN_DIR [--split validation] [--k 10 50]
    python scripts/evaluate.py RUN_OR_MODEL_DIR --data LOG_OR_TEXT [--k 10 50]
    accelerate launch --num_processes 2 scripts/evaluate.py RUN_DIR

Prints a table: a language model's nll (nats a token), perplexity and accuracy on the held-out
text, or a recommender's ndcg, hr, mrr and coverage for the test items over the whole catalogue,
with 95 % intervals, beside popularity and a first-order Markov chain, and the protocol. What is
asked is what the run stored when it began; a sentence says if its data have changed since. With
--data it is another text, all of it, or the last item of each user of another log.

The same figures go to evaluation.json in the folder (evaluation-validation.json, or
evaluation-of-NAME.json with --data), and the popularity of recommended items to popularity.png.
"""

import argparse
import sys
from pathlib import Path

from sce_lm.requirements import require

COLUMNS = ("user_column", "item_column", "time_column", "text_column")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a trained model.")
    parser.add_argument(
        "folder", type=Path, help="of a run of scripts/train.py, or of a saved model (with --data)"
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
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    columns = {name: getattr(arguments, name) for name in COLUMNS if getattr(arguments, name)}
    try:
        require("evaluate.py", "accelerate", "psutil", "rich")
        from accelerate import Accelerator

        from sce_lm.training.processes import check_processes, start_missing_processes
        from sce_lm.training.run_evaluation import (
            evaluate_on,
            evaluate_run,
            print_evaluation,
        )
        from sce_lm.training.run_folder import RunFolder

        folder = RunFolder(arguments.folder)
        if arguments.data is None and folder.is_saved_model():
            raise ValueError(
                f"{folder} is a saved model, beside which there are no data; give a log "
                "or a text by --data, or the folder of its run."
            )
        if (arguments.data is None and columns) or (arguments.data and arguments.split):
            raise ValueError(
                "--split chooses from a run's own data, and columns are of --data; leave one out."
            )
        asked = arguments.split or "test"
        start_missing_processes()
        accelerator = Accelerator()
        check_processes(accelerator)
        if arguments.data is None:
            rows = evaluate_run(folder, accelerator, asked, arguments.k)
        else:
            rows = evaluate_on(folder, arguments.data, accelerator, arguments.k, **columns)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"evaluate.py: {error}")
    if accelerator.is_main_process:
        print_evaluation(rows, arguments.data or asked)
        print(f"Figures as JSON: {folder.evaluation(asked, arguments.data)}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
