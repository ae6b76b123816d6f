"""Store a teacher's best classes for the text that a run trains on.

    sce-lm teach CONFIG.yaml FOLDER --teacher MODEL [--k 64] [--rest ghost] [--field value ...]
    sce-lm train CONFIG.yaml --teacher FOLDER
    accelerate launch --num_processes 2 -m sce_lm teach CONFIG.yaml FOLDER --teacher MODEL

The configuration is the run's: its data, tokenizer, sequence_length, held-out text and seed say
which blocks there are. A stopped command goes on when it is given again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from sce_lm.commands import COMMANDS
from sce_lm.ops.teachers import Rest
from sce_lm.training.command_line import parse_config
from sce_lm.training.processes import build_accelerator, start_missing_processes
from sce_lm.training.teaching import store_teacher


def main(prog: str, arguments: Sequence[str]) -> None:
    """Store it, and say where."""
    parser = argparse.ArgumentParser(
        prog,
        description=COMMANDS["teach"],
        epilog="Further --field value pairs are those of sce-lm train.",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="YAML file of the run that is to be taught")
    parser.add_argument("folder", type=Path, help="new, or one that was interrupted")
    parser.add_argument("--k", type=int, default=64, help="classes of a position (default: 64)")
    parser.add_argument(
        "--rest",
        choices=get_args(Rest),
        default="ghost",
        help="what becomes of the mass of all others: one class, spread evenly, or dropped "
        "(default: ghost)",
    )
    told, fields = parser.parse_known_args(arguments)
    config = parse_config([told.config, *fields], prog)
    start_missing_processes()
    accelerator = build_accelerator(mixed_precision=config.mixed_precision)
    found = store_teacher(config, told.folder, accelerator, told.k, told.rest)
    if accelerator.is_main_process:
        stored = found.stored
        print(
            f"{found.path} holds {stored.k} classes for {stored.rows} blocks of {stored.positions} "
            f"positions; train with --teacher {found.path}"
        )
    accelerator.end_training()
