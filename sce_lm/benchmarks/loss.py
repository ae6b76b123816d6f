"""Time, memory and quality of the loss, every method side by side.

Each method runs in processes of its own on the same hidden states, weight and labels, and is called
as a user calls it: choosing candidates is part of the time. Times are medians, of a forward pass
without gradients and of a training step's forward and backward pass, with a trainable and with a
frozen head. Peak is memory over what the inputs take, the weight's gradient included. Floor is the
least time that the same configuration could take on this machine (sce_lm/benchmarks/floor.py).
Bias, sd and cosines are against exact cross-entropy (sce_lm/benchmarks/quality.py) and mean little
on drawn data.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sce_lm.benchmarks import report
from sce_lm.benchmarks.methods import DEFAULT_STRATA, TAIL_ONLY, Method, choose
from sce_lm.benchmarks.problem import Problem, random_problem, scale_logits
from sce_lm.benchmarks.rows import Row, Settings, measure_rows

HEADS = ("trainable", "frozen")
TEXT = "text for the model; default: a run's own training data, for other models the embedded text"


def methods(candidates: int) -> list[Method]:
    """All rows of the table; ``candidates`` is the size of the tail-only form."""
    tail = {**TAIL_ONLY, "tail_candidates": candidates}
    by_gradient = tail | {"prior": {"labels": 1, "gradient": 3}, "prior_power": 1.0}
    return [
        Method("stock", "stock", {"name": "stock"}),
        Method("compile", "torch.compile of stock", {"name": "compile"}),
        Method("torch_fused", "F.linear_cross_entropy", {"name": "torch_fused"}),
        Method("cce", "Cut Cross-Entropy", {"name": "cce"}),
        Method("liger", "Liger", {"name": "liger"}),
        Method("trl", "TRL, chunked", {"name": "trl"}),
        Method("exact", "exact (ours)", {"name": "exact"}),
        Method("published", "published SCE", {"name": "sce", "published": True}),
        Method("tail", f"SCE, tail of {candidates}", tail),
        Method("gradient", f"SCE, tail of {candidates} by gradient", by_gradient),
        Method("strata", "SCE, default strata", DEFAULT_STRATA),
        Method("kernel", "kernel, 64 draws", {"name": "kernel", "num_negatives": 64}),
    ]


def add_common_arguments(parser: argparse.ArgumentParser, *, needs_model: bool) -> None:
    """Where hidden states come from, and how often is measured."""
    parser.add_argument(
        "--real",
        type=Path,
        metavar="DIR",
        required=needs_model,
        help="the model: a run of scripts/train.py, or a folder of transformers",
    )
    parser.add_argument("--gguf", metavar="NAME", help="GGUF file in that folder with the model")
    parser.add_argument("--text", type=Path, metavar="FILE", help=TEXT)
    parser.add_argument("--tokens", type=int, default=2048, help="positions N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--methods", metavar="A,B", help="rows to measure, by name; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="passes whose median is taken")
    parser.add_argument("--draws", type=int, default=3, help="draws of candidates for quality")
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds after which no pass is repeated"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    add_common_arguments(parser, needs_model=False)
    parser.add_argument("--vocab", type=int, default=151_936, help="classes V of drawn data")
    parser.add_argument("--dim", type=int, default=896, help="width d of drawn data")
    parser.add_argument("--candidates", type=int, default=2048, help="of the tail-only form")


def measure(
    arguments: argparse.Namespace,
    chosen: Sequence[Method] | Callable[[int], Sequence[Method]],
    *,
    initial: bool = False,
    scale: float = 1.0,
    **rows: Any,
) -> tuple[Problem, list[Row]]:
    """Make the problem that the arguments describe and measure the methods on it.

    Args:
        chosen: the methods, or a function that gives them for a number of classes.
        initial: the model with fresh weights.
        scale: factor on its logits.
        rows: further arguments of :func:`measure_rows`.
    """
    settings = Settings(arguments.repeats, arguments.budget, arguments.draws, arguments.device)
    with tempfile.TemporaryDirectory(prefix="sce_lm-benchmark-") as name:
        folder = Path(name)
        if arguments.real is None:
            for option in ("text", "gguf"):
                if getattr(arguments, option) is not None:
                    raise ValueError(
                        f"--{option} goes with a model and none is named; give its folder by "
                        f"--real, or leave --{option} out to measure on drawn data."
                    )
            sizes = (arguments.tokens, arguments.vocab, arguments.dim)
            problem = random_problem(folder, *sizes, arguments.dtype)
        else:
            from sce_lm.benchmarks.real import real_problem  # transformers: some seconds

            problem = real_problem(
                folder,
                arguments.real,
                arguments.tokens,
                arguments.dtype,
                gguf=arguments.gguf,
                text=arguments.text,
                initial=initial,
                device=arguments.device,
            )
        if scale != 1.0:
            scale_logits(folder, scale)
        methods = chosen(problem.vocab_size) if callable(chosen) else chosen
        return problem, measure_rows(problem, folder, methods, settings, **rows)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    chosen = choose(methods(arguments.candidates), arguments.methods)
    problem, rows = measure(arguments, chosen, heads=HEADS, floors=True)
    described = report.machine(arguments.device)
    report.write_json(
        arguments.json,
        {"command": "loss", "machine": described, "problem": asdict(problem), "rows": rows},
    )
    report.print_heading(described, problem)
    _print_cost(rows, problem.positions)
    _print_quality(rows, drawn=arguments.real is None)
    report.draw(arguments.plot, [_panel(head, rows) for head in HEADS])


def _print_cost(rows: Sequence[Row], positions: int) -> None:
    columns = ["method", "forward s"]
    for name in ("train s", "frozen s"):
        columns += [name, "x stock", "x floor", "peak MiB"]
    forms = {"seconds": ".3f", "speedup": ".2f", "over_floor": ".2f", "peak_mib": ",.0f"}
    table = []
    for row in rows:
        costs = [row.get(head, {}) for head in HEADS]
        cells = report.figures(costs[0], {"forward_seconds": ".3f"})
        table.append(
            [row["label"], *cells, *(c for cost in costs for c in report.figures(cost, forms))]
        )
    title = "Cost (x stock: times faster than stock; x floor: times the least time)"
    report.print_table(title, columns, table)
    for row in rows:
        for note in _notes(row, positions):
            report.print_line(f"{row['label']}: {note}")


def _notes(row: Row, positions: int) -> list[str]:
    """Why figures are missing, and what the floor of one of our own losses is made of."""
    if "skipped" in row:
        return [f"skipped; {row['skipped']}"]
    notes = []
    if row["positions"] < positions:
        notes.append(
            f"measured on {row['positions']:,} positions, as many as fit, and seconds multiplied "
            f"by {positions / row['positions']:g}"
        )
    notes += [
        f"{part} failed; {row[part]['error']}" for part in HEADS if "error" in row.get(part, {})
    ]
    for head in HEADS:
        floor = row.get(head, {}).get("floor")
        if floor and "version" not in row:
            terms = " + ".join(f"{name} {seconds:.3f}" for name, seconds in floor["terms"].items())
            notes.append(f"{head}, floor {floor['seconds']:.3f} s = {terms}")
    return notes


def _print_quality(rows: Sequence[Row], *, drawn: bool) -> None:
    forms = {
        "loss": ".4f",
        "bias": "+.4f",
        "sd": ".4f",
        "coverage": ".3f",
        "products": ",.0f",
        "cos_hidden": ".5f",
        "cos_weight": ".5f",
        "norm_hidden": ".4f",
        "norm_weight": ".4f",
    }
    headings = ["loss", "bias", "sd log Z", "coverage", "products", "cos dh", "cos dW"]
    report.print_table(
        "Quality against exact cross-entropy" + " (drawn data: means little; use --real)" * drawn,
        ["method", *headings, "|dh| ratio", "|dW| ratio"],
        [
            [row["label"], *report.figures(row["quality"], forms)]
            for row in rows
            if row.get("quality")
        ],
    )


def _panel(head: str, rows: Sequence[Row]) -> report.Panel:
    """Memory against time."""
    series = {
        row["label"]: [(row[head]["seconds"], row[head]["peak_mib"], row["label"])]
        for row in rows
        if "peak_mib" in row.get(head, {})
    }
    return report.Panel(f"{head} head", "seconds, forward and backward", "peak MiB", series)
