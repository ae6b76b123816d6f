"""Recommend items for raw histories with the model of a run, or of any saved folder.

    sce-lm recommend RUN_DIR --history ID [ID ...] --k 10
    sce-lm recommend RUN_DIR --input LOG.csv --output LISTS.parquet --k 10

Lists are exact (the best of the whole catalogue) unless an --index proposes what is scored. Scores
are the model's own logits: they compare the items of one user, and neither users nor models. An
input file is an interaction log (a row an event; csv, parquet, JSON lines, RecBole's .inter) or, in
parquet or JSON lines, a row a user with a list of items; its columns are named as in the run unless
told otherwise. An output file (csv, parquet, JSON lines) has a row a recommendation: user, rank,
item, score, source.

Users are read and answered a few thousand at a time. What is done when the command is interrupted
stays beside the output, and the same command goes on from there.

A user of whose history nothing is known gets the most popular items of the training data (source
"popularity", the score is their number of events); where a model was saved without that, one row
without an item (source "none"). Ids after --history may begin with a dash, with two behind "--".

Exit codes: 0, done (what was skipped is counted on stderr); 1, an error, no output is written; 2,
wrong arguments; 3, done, but nothing is known of any user, so that no list is the model's.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sce_lm import recsys
from sce_lm.commands import recommender_parser
from sce_lm.training.recommenders import load_recommender

NOTHING_KNOWN = 3
"""The exit code where no list is the model's."""
SKIPPED = {
    "unknown_items": "items of histories are not in the catalogue and were skipped",
    "unknown_candidates": "candidates are not in the catalogue, so they are in no list",
    "unknown_user_candidates": "candidates of users are not in the catalogue",
    "unknown_excluded": "items to exclude are not in the catalogue anyway",
    "users_without_history": "users have no known item, and get what is popular if the model was "
    "saved with that",
    "users_without_list": "users have no list",
}
"""What is said on stderr about each of these counts."""


def read_arguments(prog: str, given: Sequence[str]) -> argparse.Namespace:
    """What the command line says."""
    parser = recommender_parser("recommend", prog, __doc__ or "", "Lists are exact")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--history", action="append", metavar="ID ...", help="items of one user, oldest first"
    )
    source.add_argument("--input", help="file, folder or data set with the histories")
    parser.add_argument("--output", type=Path, help="file for the lists (with --input)")
    parser.add_argument("--k", type=int, default=10, help="length of the lists")
    parser.add_argument("--keep_seen", action="store_true", help="also list items of the history")
    parser.add_argument(
        "--candidates",
        type=Path,
        help="file of the only items to list, an id a line; unknown ones are counted",
    )
    parser.add_argument(
        "--exclude",
        type=Path,
        help="file of items never to list, an id a line; unknown ones are counted",
    )
    parser.add_argument(
        "--trained_only",
        action="store_true",
        help="leave out items without training, such as appended ones",
    )
    parser.add_argument(
        "--index", type=Path, help="folder of sce-lm export: approximate lists, in far less time"
    )
    parser.add_argument("--user_column", help="column of the input with the user")
    parser.add_argument("--item_column", help="column of the input with the item, or their list")
    parser.add_argument(
        "--candidates_column",
        help="column of an input with a row a user, with a list of the only items for this user",
    )
    parser.add_argument("--time_column", help="column of the input with the time")
    parser.add_argument("--time_format", help="how text times are written, as for strptime")
    parser.add_argument(
        "--file_order", action="store_true", help="the input has no times, its order is theirs"
    )
    parser.add_argument("--batch_size", type=int, default=256, help="users at a time")
    arguments = parser.parse_args(spelled_out(given))
    if (arguments.input is None) != (arguments.output is None):
        parser.error("--input and --output go together")
    if arguments.candidates_column and arguments.input is None:
        parser.error("--candidates_column is one of --input")
    return arguments


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """``--history -a b`` as ``--history=-a --history=b``, since argparse takes -a for an option.
    Ids end at the next argument with two dashes; behind "--" all are ids."""
    spelled, is_id = [], False
    for place, argument in enumerate(arguments):
        if is_id and argument == "--":
            return [*spelled, *(f"--history={id}" for id in arguments[place + 1 :])]
        if is_id and argument != "-h" and not argument.startswith("--"):
            spelled.append(f"--history={argument}")
            continue
        is_id = argument == "--history"
        if not is_id:
            spelled.append(argument)
    return spelled


def main(prog: str, arguments: Sequence[str]) -> int:
    """List items, and return 0, or NOTHING_KNOWN."""
    told = read_arguments(prog, arguments)
    model, tokenizer, trained_with = load_recommender(told.run)
    options = {
        "exclude_seen": not told.keep_seen,
        "candidates": read_ids(told.candidates, tokenizer),
        "exclude": read_ids(told.exclude, tokenizer) or (),
        "trained_only": told.trained_only,
        "max_length": trained_with.get("sequence_length"),
        "index": None if told.index is None else recsys.load_index(told.index, tokenizer),
        "batch_size": told.batch_size,
    }
    if told.history:
        found = recsys.recommend(model, tokenizer, [told.history], told.k, **options)
        for rank, (item, score) in enumerate(zip(found.items[0], found.scores[0]), 1):
            print(f"{rank:4d}  {score:10.4f}  {item}")
        counts = {"users": 1, "users_without_list": found.sources.count("none"), **vars(found)}
    else:
        time = told.time_column or trained_with.get("time_column")
        time_format = told.time_format or trained_with.get("time_format")
        if told.file_order or time is None:
            time = time_format = None
        with warnings.catch_warnings(record=True) as caught:
            histories = recsys.scan_histories(
                told.input,
                user=told.user_column or trained_with.get("user_column", "user_id"),
                item=told.item_column or trained_with.get("item_column", "item_id"),
                time=time,
                time_format=time_format,
                candidates=told.candidates_column,
            )
        for warning in caught:
            print(warning.message, file=sys.stderr)
        counts = recsys.recommend_file(model, tokenizer, histories, told.output, told.k, **options)
        print(json.dumps({**counts, "output": str(told.output)}, indent=2))
    for name, what in SKIPPED.items():
        if counts[name]:
            print(f"{counts[name]} {what}.", file=sys.stderr)
    if counts["users_without_history"] < counts["users"]:
        return 0
    example = tokenizer.convert_ids_to_tokens(recsys.item_tokens(tokenizer)[0])
    print(
        f"No list is the model's: no item of a history is one of the catalogue's, such as "
        f"{example!r}; check the ids, or the column that holds them.",
        file=sys.stderr,
    )
    return NOTHING_KNOWN


def read_ids(path: Path | None, tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """The ids of a file, an id a line, without blank lines and the spaces round an id (but those
    of an id of the catalogue)."""
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8, "
            "an id a line."
        ) from None
    catalogue = tokenizer.get_vocab()
    return [line if line in catalogue else line.strip() for line in lines if line.strip()]
