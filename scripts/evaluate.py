"""Evaluate the model of a finished run, exactly, whatever objective it was trained with.

    python scripts/evaluate.py RUN_DIR
    accelerate launch --num_processes 2 scripts/evaluate.py RUN_DIR

Prints a table: a language model's nll (nats a token), perplexity and accuracy on the held-out
text, or a recommender's ndcg, hr, mrr and coverage for the test items over the whole catalogue,
with 95 % intervals, beside popularity and a first-order Markov chain, and the protocol. The same
figures go to RUN_DIR/evaluation.json, and the popularity of recommended items to popularity.png.
"""

import argparse
import sys
from pathlib import Path

from sce_lm.requirements import require


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate the model of a finished run.")
    parser.add_argument("run", type=Path, help="folder of a run of scripts/train.py")
    folder = parser.parse_args().run
    try:
        require("evaluate.py", "accelerate", "psutil", "rich")
        from accelerate import Accelerator

        from sce_lm.training.evaluation import evaluate_run, print_evaluation
        from sce_lm.training.launch import start_missing_processes

        start_missing_processes()
        accelerator = Accelerator()
        rows = evaluate_run(folder, accelerator)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"evaluate.py: {error}")
    if accelerator.is_main_process:
        print_evaluation(rows)
        print(f"Figures as JSON: {folder / 'evaluation.json'}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
