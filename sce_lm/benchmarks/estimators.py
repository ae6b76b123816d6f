"""Our objectives at equal logits a position on one model: error against cost and peakedness.

--logits are those that a position's softmax runs over. Seconds are the median of a forward and
backward pass. --scales multiplies the model's logits: a softmax that is flatter or more peaked,
whose mean largest probability (top 1) and effective number of classes, exp(entropy), stand in each
table. With --initial the model is measured again with fresh weights, on the same text. BCE and gBCE
have no partition function and cannot be measured here. XIR's cache has met the very positions that
it is measured on, in the passes before, as no training run's has.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sce_lm.benchmarks import loss, methods, results
from sce_lm.benchmarks.report import METHOD, Column, Plot, Table

DEFAULT = ("exact", "sce", "sce-tail", "sce-published", "uniform", "unigram", "in-batch")
DEFAULT += ("bir", "xir", "kernel-sampling", "rece")
TRUE_ERROR = Column(
    *("true error", "quality.relative_error", ".4f"),
    "root mean square of Zhat/Z - 1 over positions",
)
TABLES = (
    Table(
        "Estimators against exact cross-entropy",
        (
            METHOD,
            Column("top 1", "quality.top", ".3f", "mean largest probability of the exact softmax"),
            Column("classes", "quality.classes", ",.0f", "exp of its mean entropy"),
            *(loss.PRODUCTS, loss.COVERAGE),
            Column("bias of Zhat", "quality.bias_partition", "+.4f", "mean of Zhat/Z - 1"),
            *(loss.BIAS, loss.SD, TRUE_ERROR),
            Column(
                *("reported", "quality.reported_error", ".4f"),
                "what the loss itself says of the true error",
            ),
            *loss.COSINES,
            Column("seconds", "trainable.seconds", ".3f"),
        ),
    ),
)
PLOTS = (
    Plot("error of Z", loss.PRODUCTS, TRUE_ERROR),
    Plot("error of dL/dW", loss.PRODUCTS, Column("1 - cos dW", "quality.weight_error")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    loss.add_problem_options(parser, needs_model=True)
    methods.add_options(parser, DEFAULT)
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], help="factors on the model's logits"
    )
    parser.add_argument("--initial", action="store_true", help="also with fresh weights")


def measure(arguments: argparse.Namespace) -> Sequence[results.Comparison]:
    """One comparison for each kind of weights and scale."""
    found = []
    for initial in (False, True)[: 1 + arguments.initial]:
        for scale in arguments.scales:
            problem = loss.measure_problem(
                arguments, initial=initial, scale=scale, heads=("trainable",), floors=False
            )
            problem.title += f", logits x {scale:g}" * (scale != 1.0)
            for row in problem.rows:
                if row.get("quality"):
                    row["quality"]["weight_error"] = 1.0 - row["quality"]["cos_weight"]
            found.append(problem)
    return found
