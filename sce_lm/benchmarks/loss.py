"""Time, memory and quality of the loss, every method side by side.

Each method runs in processes of its own on the same hidden states, weight and labels, and is called
as a user calls it: choosing candidates is part of the time. Times are medians, of a forward pass
without gradients and of a training step's forward and backward pass, with a trainable and with a
frozen head. Peak is memory over what the inputs take, the weight's gradient included. Quality means
little on drawn data.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sce_lm.benchmarks import methods, problem, report, results
from sce_lm.benchmarks.quality import write_reference
from sce_lm.benchmarks.report import METHOD, Column, Plot, Table
from sce_lm.benchmarks.side_by_side import Settings, measure_methods
from sce_lm.training.measure import in_process

TEXT = "text for the model; default: a run's own training data, for other models the embedded text"
DEFAULT = ("stock", "compile", "torch_fused", "cce", "liger", "quack", "trl", "exact")
DEFAULT += ("sce-published", "sce-tail", "sce")


FLOOR = "seconds over the floor, the least time of these products and passes over memory here"


def _cost(head: str, beside: str = "") -> tuple[Column, ...]:
    return (
        Column(f"s{beside}", f"{head}.seconds", ".3f"),
        Column(
            f"x stock{beside}", f"{head}.speedup", ".2f", "times as fast as plain cross-entropy"
        ),
        Column(f"x floor{beside}", f"{head}.over_floor", ".2f", FLOOR),
        Column(f"peak MiB{beside}", f"{head}.peak_mib", ",.0f"),
    )


BIAS = Column("bias", "quality.bias", "+.4f", "the loss minus exact cross-entropy")
SD = Column(
    *("sd log Z", "quality.sd", ".4f"), "standard deviation of log Zhat - log Z over positions"
)
PRODUCTS = Column(
    *("products", "quality.products", ",.0f"),
    "inner products of the model's width that a position costs, choosing its candidates included",
)
COVERAGE = Column("coverage", "quality.coverage", ".3f", "share of the positions that are trained")
COSINES = (
    Column("cos dh", "quality.cos_hidden", ".5f", "cosine to exact cross-entropy's gradient of h"),
    Column("cos dW", "quality.cos_weight", ".5f", "the same for the head"),
)
TABLES = (
    Table(
        "Cost, forward and backward",
        (
            METHOD,
            Column("forward s", "trainable.forward_seconds", ".3f"),
            *_cost("trainable"),
            *_cost("frozen", ", frozen head"),
        ),
    ),
    Table(
        "Quality against exact cross-entropy",
        (
            METHOD,
            Column("loss", "quality.loss", ".4f"),
            *(BIAS, SD, COVERAGE, PRODUCTS, *COSINES),
            Column("|dh| ratio", "quality.norm_hidden", ".4f"),
            Column(
                *("|dW| ratio", "quality.norm_weight", ".4f"),
                "norm of the gradient over that of exact cross-entropy's",
            ),
        ),
    ),
)
PLOTS = tuple(
    Plot(
        f"{head} head",
        Column("times as fast as stock", f"{head}.speedup"),
        Column("peak MiB", f"{head}.peak_mib"),
    )
    for head in ("trainable", "frozen")
)


def add_problem_options(parser: argparse.ArgumentParser, *, needs_model: bool) -> None:
    """Where hidden states come from, and how often is measured."""
    parser.add_argument(
        "--real",
        type=Path,
        metavar="DIR",
        required=needs_model,
        help="the model: a run of sce-lm train, or a folder of transformers",
    )
    parser.add_argument("--gguf", metavar="NAME", help="GGUF file in that folder with the model")
    parser.add_argument("--text", type=Path, metavar="FILE", help=TEXT)
    parser.add_argument("--tokens", type=int, default=2048, help="positions N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="passes whose median is taken")
    parser.add_argument("--draws", type=int, default=3, help="draws of candidates for quality")
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds after which no pass is repeated"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    add_problem_options(parser, needs_model=False)
    methods.add_options(parser, DEFAULT)
    parser.add_argument("--vocab", type=int, default=151_936, help="classes V of drawn data")
    parser.add_argument("--dim", type=int, default=896, help="width d of drawn data")


def measure_problem(
    arguments: argparse.Namespace, *, initial: bool = False, scale: float = 1.0, **settings: Any
) -> results.Comparison:
    """Make the problem that the arguments describe and measure the methods on it.

    Args:
        initial: the model with fresh weights.
        scale: factor on its logits.
        settings: further fields of :class:`Settings`.
    """
    methods.choose(arguments)  # what is no method ends it before a model is read
    how = Settings(
        arguments.device, arguments.repeats, arguments.budget, arguments.draws, **settings
    )
    with tempfile.TemporaryDirectory(prefix="sce_lm-benchmark-") as name:
        folder = Path(name)
        made = _make_problem(arguments, folder, initial=initial)
        if scale != 1.0:
            problem.scale_logits(folder, scale)
        report.progress(f"{made}\nexact reference")
        in_process(write_reference, folder=name, device=arguments.device)
        chosen = methods.choose(arguments, made.vocab_size)
        rows = measure_methods(made, folder, chosen, how)
    return results.Comparison(str(made), asdict(made), rows)


def _make_problem(arguments: argparse.Namespace, folder: Path, *, initial: bool) -> problem.Problem:
    if arguments.real is None:
        for option in ("text", "gguf"):
            if getattr(arguments, option) is not None:
                raise ValueError(
                    f"--{option} goes with a model and none is named; give its folder by "
                    f"--real, or leave --{option} out to measure on drawn data."
                )
        sizes = (arguments.tokens, arguments.vocab, arguments.dim)
        return problem.random_problem(folder, *sizes, arguments.dtype)
    from sce_lm.benchmarks.real import real_problem  # transformers: some seconds

    return real_problem(
        folder,
        arguments.real,
        arguments.tokens,
        arguments.dtype,
        gguf=arguments.gguf,
        text=arguments.text,
        initial=initial,
        device=arguments.device,
    )


def measure(arguments: argparse.Namespace) -> Sequence[results.Comparison]:
    """One comparison."""
    return [measure_problem(arguments)]
