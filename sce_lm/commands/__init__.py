"""The command `sce-lm`: one module a subcommand, and only the chosen one is imported.

Such a module has ``main(prog, arguments)``, which returns the exit status, or None for 0; `prog` is
what its messages begin with. Naming it in ``COMMANDS`` is all that it takes.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "init": "Write a configuration to start from, with every field explained.",
    "train": "Train a causal language model or a recommender on item tokens.",
    "teach": "Store a teacher's best classes for the text that a run trains on.",
    "evaluate": "Evaluate a trained model.",
    "recommend": "Recommend items for raw histories.",
    "export": "Write a recommender's items as vectors, or as an index for fast lists.",
    "append_items": "Add new items to a trained recommender.",
    "benchmark": "Measure losses over a large vocabulary.",
    "demo": "Compare three losses on data made from the installed Python packages.",
}
"""What each does, in a line."""

WRONG_ARGUMENTS = 2
"""The exit status that argparse has for them."""


SECONDS_BETWEEN_LINES = "30"
"""Of a progress bar that goes to a file, and before its first one, as tqdm reads them from the
environment."""


def main(arguments: Sequence[str] | None = None) -> int | None:
    """`sce-lm COMMAND ...`; without arguments those of this process."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        return run(name, f"sce-lm {name}", rest)
    if name in ("-h", "--help"):
        print("usage: sce-lm COMMAND ...\n")
        width = max(map(len, COMMANDS))
        for command, about in COMMANDS.items():
            print(f"  {command:<{width}}  {about}")
        print("\n`sce-lm COMMAND --help` lists its options.")
        return None
    (nearest,) = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
    print(
        f"sce-lm: there is no command {name!r}; did you mean {nearest!r}? See sce-lm --help.",
        file=sys.stderr,
    )
    return WRONG_ARGUMENTS


def recommender_parser(name: str, prog: str, text: str, told: str) -> argparse.ArgumentParser:
    """Parser of a command on a trained recommender, whose folder is its first argument ``run``.

    Args:
        name: of the command.
        text: its module's docstring; the help ends with it from the words ``told`` on.
    """
    parser = argparse.ArgumentParser(
        prog,
        description=COMMANDS[name],
        epilog=text[text.index(told) :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", type=Path, help="folder of a run of sce-lm train, or of a saved model"
    )
    return parser


def calm_bars() -> None:
    """Off a terminal, where each print of a progress bar is a line, few prints of ours and none of
    other libraries; what the user has set stays. To be called before those are imported."""
    if not sys.stderr.isatty():
        for option in ("DELAY", "MININTERVAL"):
            os.environ.setdefault(f"TQDM_{option}", SECONDS_BETWEEN_LINES)
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")


def run(name: str, prog: str, arguments: Sequence[str]) -> int | None:
    """One command; what it raises for the user to read ends the process in a sentence."""
    calm_bars()
    try:
        return importlib.import_module(f"sce_lm.commands.{name}").main(prog, arguments)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{prog}: {error}")
