"""Recommend items for raw histories with the model of a run, or of any saved folder.

    python scripts/recommend.py RUN_DIR --history ID [ID ...] --k 10
    python scripts/recommend.py RUN_DIR --input LOG.csv --output LISTS.parquet --k 10

Lists are exact: the best of the whole catalogue by the model's own logits. An input file is an
interaction log (a row an event; csv, parquet, JSON lines, RecBole's .inter) or, in parquet or JSON
lines, a row a user with a list of items; its columns are named as in the run unless told otherwise.
An output file (csv, parquet, JSON lines) has a row a recommendation: user, rank, item, score.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recommend items for raw histories.")
    parser.add_argument(
        "run", type=Path, help="folder of a run of scripts/train.py, or of a saved model"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--history", nargs="+", metavar="ID", help="items of one user, oldest first"
    )
    source.add_argument("--input", help="file, folder or data set with the histories")
    parser.add_argument("--output", type=Path, help="file for the lists (with --input)")
    parser.add_argument("--k", type=int, default=10, help="length of the lists")
    parser.add_argument("--keep_seen", action="store_true", help="also list items of the history")
    parser.add_argument(
        "--candidates", type=Path, help="file of the only items to list, an id a line"
    )
    parser.add_argument("--exclude", type=Path, help="file of items never to list, an id a line")
    parser.add_argument("--user_column", help="column of the input with the user")
    parser.add_argument("--item_column", help="column of the input with the item, or their list")
    parser.add_argument("--time_column", help="column of the input with the time")
    parser.add_argument(
        "--file_order", action="store_true", help="the input has no times, its order is theirs"
    )
    parser.add_argument("--batch_size", type=int, default=256, help="users at a time")
    arguments = parser.parse_args()
    if (arguments.input is None) != (arguments.output is None):
        parser.error("--input and --output go together")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    from sce_lm import recsys

    config_file = arguments.run / "config.json"
    folder = arguments.run
    trained_with: dict = {}
    if (folder / "model").is_dir():
        folder, trained_with = folder / "model", json.loads(config_file.read_text())
    if not (folder / "config.json").exists():
        raise ValueError(
            f"{arguments.run} holds no model; give the folder of a finished run, or one written by "
            "save_pretrained."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {
        "exclude_seen": not arguments.keep_seen,
        "candidates": read_ids(arguments.candidates),
        "exclude": read_ids(arguments.exclude) or (),
        "max_length": trained_with.get("sequence_length"),
        "batch_size": arguments.batch_size,
    }
    if arguments.history:
        found = recsys.recommend(model, tokenizer, [arguments.history], arguments.k, **options)
        if found.unknown_items:
            print(f"{found.unknown_items} items of the history are not known and were skipped.")
        for rank, (item, score) in enumerate(zip(found.items[0], found.scores[0]), 1):
            print(f"{rank:4d}  {score:10.4f}  {item}")
        return
    histories = recsys.read_histories(
        arguments.input,
        user=arguments.user_column or trained_with.get("user_column", "user_id"),
        item=arguments.item_column or trained_with.get("item_column", "item_id"),
        time=None
        if arguments.file_order
        else arguments.time_column or trained_with.get("time_column"),
    )
    report = recsys.recommend_file(
        model, tokenizer, histories, arguments.output, arguments.k, **options
    )
    print(json.dumps({**report, "output": str(arguments.output)}, indent=2))


def read_ids(path: Path | None) -> list[str] | None:
    return None if path is None else path.read_text(encoding="utf-8").splitlines()


def main() -> None:
    arguments = read_arguments()
    try:
        run(arguments)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"recommend.py: {error}")


if __name__ == "__main__":
    main()
