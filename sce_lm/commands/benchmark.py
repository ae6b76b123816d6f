"""Measure losses over a large vocabulary.

    sce-lm benchmark loss --tokens 2048 --vocab 151936 --dim 896
    sce-lm benchmark estimators --real runs/lm_embedded --plot estimators.png
    sce-lm benchmark step --model DIR --tokens 2048
    sce-lm benchmark train examples/configs/lm_embedded.yaml --steps 150 --seeds 0 1
    sce-lm benchmark scale --plot scale.png
    sce-lm benchmark kernels --json kernels.json
    sce-lm benchmark index --items 100000 1000000

`--help` after a subcommand lists its options and the methods that it can measure. Tables go to
standard output, progress to standard error, and with `--json FILE` everything to a file, with
command, commit, date, machine, versions and the options of each method.
"""

import argparse
import importlib
import importlib.util
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sce_lm.benchmarks import SUBCOMMANDS, report, results
from sce_lm.commands import COMMANDS


def check(arguments: argparse.Namespace) -> None:
    """Refuse at once what would end the measuring, or lose what it found."""
    if arguments.threads < 1:
        raise ValueError(f"--threads is {arguments.threads}; give a number from 1 up.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda and there is no GPU that this PyTorch can use; use cpu.")
    for name, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{name} is {str(path)!r}; give a file in a folder that exists.")
    if arguments.plot is not None and not importlib.util.find_spec("matplotlib"):
        raise ValueError("--plot needs matplotlib, which is not installed; install it.")


def show(found: results.Results, tables: tuple[report.Table, ...]) -> None:
    """The tables of every comparison, and what is to be said of its rows."""
    report.print_line(found.heading)
    for comparison in found.comparisons:
        report.print_line(f"\n{comparison.title}")
        for table in tables:
            table.print(comparison.rows)
        for row in comparison.rows:
            for note in row.get("notes", ()):
                report.print_line(f"{row['label']}: {note}")


def main(prog: str, arguments: Sequence[str]) -> None:
    """Measure, show, and write the files that are asked for."""
    parser = argparse.ArgumentParser(
        prog,
        description=COMMANDS["benchmark"],
        epilog=f"`{prog} SUBCOMMAND --help` lists its options.",
    )
    parser.add_argument("subcommand", choices=SUBCOMMANDS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the subcommand")
    chosen = parser.parse_args(arguments)

    module = importlib.import_module(f"sce_lm.benchmarks.{chosen.subcommand}")
    command = argparse.ArgumentParser(
        f"{prog} {chosen.subcommand}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    command.add_argument("--plot", type=Path, metavar="FILE", help="write a plot (PNG) there")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    command.add_argument(
        "--shared",
        action="store_true",
        help="others use the machine: give ratios and quality, and no seconds",
    )
    module.add_arguments(command)
    told = command.parse_args(chosen.options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary files go then too
    check(told)
    torch.set_num_threads(told.threads)  # every measurement's process has as many
    told.device = told.device or ("cuda" if torch.cuda.is_available() else "cpu")
    origin = results.provenance(told.device, shared=told.shared)
    found = results.Results(chosen.subcommand, list(module.measure(told)), **origin)
    if told.shared:
        found.drop_seconds()
    if told.json is not None:
        found.save(told.json)
    show(found, module.TABLES)
    if told.plot is not None:
        comparisons = [(comparison.title, comparison.rows) for comparison in found.comparisons]
        report.draw(told.plot, module.PLOTS, comparisons)
