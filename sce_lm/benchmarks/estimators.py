"""Estimators of the loss on a model: error against products and time.

Each row is a choice of candidates. Products are inner products a position in the forward pass, the
scan of the catalogue included. True error is the root mean square of Zhat/Z - 1 over positions,
reported error what the loss says of it in its statistics. Seconds are the median of a forward and
backward pass. With --initial the model is measured again with fresh weights, on the same text.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sce_lm.benchmarks import report
from sce_lm.benchmarks.loss import add_common_arguments, measure
from sce_lm.benchmarks.methods import TAIL_ONLY, Method, choose
from sce_lm.benchmarks.rows import Row

SIZES = (512, 1024, 2048, 4096, 8192)


def _tail(size: int, **options: Any) -> dict[str, Any]:
    return {**TAIL_ONLY, "tail_candidates": size, **options}


def _strata(frequent: int, tail: int, **buckets: int) -> dict[str, Any]:
    fields = {"shared_frequent": frequent, "tail_candidates": tail}
    return {"name": "sce", "num_buckets": 0, **fields, **buckets}


def _published(size: int, **options: Any) -> dict[str, Any]:
    return {"name": "sce", "published": True, "bucket_candidates": size, **options}


_BUCKETS = {"num_buckets": 64, "bucket_candidates": 1024}
_SMALL_BUCKETS = {"num_buckets": 64, "bucket_candidates": 256}

ESTIMATORS: list[tuple[str, str, dict[str, Any]]] = [
    *(("published SCE", f"published-{k}", _published(k)) for k in (64, 256, 1024, 4096)),
    ("published SCE", "published-256-random", _published(256, mix=False)),
    *(("tail", f"tail-{k}", _tail(k, control_variate=True)) for k in SIZES),
    *(("tail, no control variate", f"plain-{k}", _tail(k, control_variate=False)) for k in SIZES),
    ("strata", "labels+tail-2048", _strata(0, 2048)),
    ("strata", "labels+1024+tail-2048", _strata(1024, 2048)),
    ("strata", "labels+4096+tail-4096", _strata(4096, 4096)),
    ("strata", "labels+1024+64x256+tail-1024", _strata(1024, 1024, **_SMALL_BUCKETS)),
    ("strata", "labels+1024+64x1024+tail-1024", _strata(1024, 1024, **_BUCKETS)),
    ("strata", "labels+4096+64x1024+tail-2048", _strata(4096, 2048, **_BUCKETS)),
    ("strata", "labels+1024+64x1024", _strata(1024, 0, **_BUCKETS)),
    ("other", "uniform-2048", _tail(2048, prior="uniform")),
    ("other", "exact", {"name": "exact"}),
]
"""Family, name, and arguments of ``objectives.get``: any registered objective can be a row."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    add_common_arguments(parser, needs_model=True)
    parser.add_argument("--initial", action="store_true", help="also with fresh weights")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    methods = [Method(name, name, options) for _, name, options in ESTIMATORS]
    chosen = choose(methods, arguments.methods)
    described = report.machine(arguments.device, arguments.threads)
    tables, panels = [], []
    for initial in (False, True)[: 1 + arguments.initial]:
        problem, rows = measure(
            arguments, chosen, initial=initial, heads=("trainable",), floors=False
        )
        report.print_heading(described, problem)
        _print_rows(rows)
        tables.append({"problem": asdict(problem), "rows": rows})
        panels += _panels(problem.title, rows)
    result = {"command": "estimators", "machine": described, "tables": tables}
    report.write_json(arguments.json, result)
    report.draw(arguments.plot, panels)


def _print_rows(rows: Sequence[Row]) -> None:
    forms = {
        "products": ",.0f",
        "coverage": ".3f",
        "bias": "+.4f",
        "sd": ".4f",
        "relative_error": ".4f",
        "reported_error": ".4f",
        "cos_hidden": ".5f",
        "cos_weight": ".5f",
        "seconds": ".3f",
    }
    headings = ["products", "coverage", "bias", "sd log Z", "true error", "reported", "cos dh"]
    report.print_table(
        "Estimators against exact cross-entropy",
        ["estimator", *headings, "cos dW", "seconds"],
        [[r["label"], *report.figures(r["quality"] | r["trainable"], forms)] for r in rows],
    )
    for row in rows:
        if "error" in row["trainable"]:
            report.print_line(f"{row['label']}: failed; {row['trainable']['error']}")


def _panels(title: str, rows: Sequence[Row]) -> list[report.Panel]:
    """Error against time, for the partition function and for the gradient of the weight."""
    errors = {
        "root mean square of Zhat/Z - 1": lambda quality: quality.get("relative_error") or 0.0,
        "1 - cosine of dL/dW": lambda quality: 1.0 - quality["cos_weight"],
    }
    family = {name: family for family, name, _ in ESTIMATORS}
    panels = []
    for heading, error in errors.items():
        series: dict[str, list[tuple[float, float, str]]] = {}
        for row in rows:
            if row["quality"] and row["name"] != "exact":
                point = (row["trainable"]["seconds"], error(row["quality"]), row["name"])
                series.setdefault(family[row["name"]], []).append(point)
        panels.append(report.Panel(title, "seconds of a pass", heading, series))
    return panels
