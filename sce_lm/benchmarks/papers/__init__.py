"""What the papers claim, measured: their protocol, their figure, and whether the claim held.

    sce-lm benchmark papers xir --json xir.json --plot xir.png

xir: two-tower retrieval by matrix factorisation (Chen et al., NeurIPS 2022) on MovieLens-100K and
Gowalla, in-batch softmax and its resampled forms against sampled, scalable and exact softmax.
kernel: held-out loss and the gradient's bias against the number of draws, for the quadratic kernel
(Blanc and Rendle, ICML 2018), uniform and unigram draws and SCE's tail, on that recommender.

The data are read from `--data`, and a data set that is not there is named before anything begins.
Runs that are finished are not trained again. The default grid is a reduced one.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from sce_lm.benchmarks import methods, results
from sce_lm.benchmarks.papers.claims import CLAIMS
from sce_lm.benchmarks.report import METHOD, Column, Plot, Table
from sce_lm.benchmarks.train import add_run_options

__all__ = ["PLOTS", "TABLES", "add_arguments", "measure"]
PAPERS = ("xir", "kernel")
NDCG, RECALL = Column("NDCG@10", "test.ndcg@10", ".4f"), Column("R@10", "test.recall@10", ".4f")
DRAWS = Column("draws", "draws", "d")
NLL = Column("held-out loss", "test.nll", ".4f")
TABLES = (
    Table(
        "Trained alike (mean and standard deviation over seeds)",
        (
            METHOD,
            DRAWS,
            NLL,
            Column(
                "bias", "gradient_bias", ".3f", "of the mean gradient, over the exact one's norm"
            ),
            Column("noise", "gradient_noise", ".2f", "of one gradient, likewise"),
            NDCG,
            RECALL,
            Column("NDCG@20", "test.ndcg@20", ".4f"),
            Column("R@20", "test.recall@20", ".4f", "recall"),
            Column("NDCG@50", "test.ndcg@50", ".4f"),
            Column("R@50", "test.recall@50", ".4f"),
            Column("coverage@10", "test.coverage@10", ".3f", "share of the items in some list"),
            Column(
                *("'NDCG'@10", "test.code_ndcg@10", ".4f"),
                "by the formula of the authors' evaluator, whose discount does not fall",
            ),
            Column("their code", "code_ndcg@10", ".4f", "the same, by the authors' code, one seed"),
            Column("their R@10", "code_recall@10", ".4f"),
            Column("s / step", "seconds_per_step", ".3f"),
            Column("x stock", "trainable.speedup", ".2f", "the loss alone over plain softmax"),
        ),
    ),
    CLAIMS,
)
PLOTS = (
    Plot("retrieval", RECALL, NDCG, keep=lambda row: "recall@10" in row.get("test", {})),
    Plot("held-out loss", DRAWS, NLL, joined=True),
    Plot("bias", DRAWS, Column("bias of the gradient", "gradient_bias"), joined=True),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("paper", choices=PAPERS)
    methods.add_options(parser, ())
    parser.set_defaults(methods=None)
    add_run_options(parser, Path("runs/papers"))
    parser.set_defaults(seeds=None)
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="default: the paper's")
    parser.add_argument(
        "--data",
        type=Path,
        default=results.ROOT.parent / "shared" / "data",
        help="folder of the data sets; default: shared/data beside the repository",
    )


def measure(arguments: argparse.Namespace) -> Sequence[results.Comparison]:
    """A comparison for each data set, and one of claims."""
    return importlib.import_module(f"{__name__}.{arguments.paper}").measure(arguments)
