"""Every objective at equal logits a position on one model: error against cost and peakedness.

Logits (--logits) are those that a position's softmax runs over; products are inner products a
position in the forward pass with all that choosing candidates costs, true error is the root mean
square of Zhat/Z - 1 over positions, reported error what the loss says of it. Seconds are the median
of a forward and backward pass. --scales multiplies the model's logits: a softmax that is flatter or
more peaked, whose mean largest probability (top 1) and effective number of classes, exp(entropy),
head each table; the last table says which objective is nearest to exact at each. With --initial the
model is measured again with fresh weights, on the same text. BCE and gBCE have no partition
function and are not shown. XIR's cache has met the very positions that it is measured on, in the
passes before, as no training run's has.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sce_lm.benchmarks import report
from sce_lm.benchmarks.loss import add_common_arguments, measure
from sce_lm.benchmarks.methods import KERNEL, TAIL_ONLY, Method, choose, equal_logits
from sce_lm.benchmarks.rows import Row


def _strata(frequent: int, tail: int, **buckets: int) -> dict[str, Any]:
    fields = {"shared_frequent": frequent, "tail_candidates": tail}
    return {"name": "sce", "num_buckets": 0, **fields, **buckets}


def estimators(logits: int, vocab_size: int) -> list[Method]:
    """All rows: objectives and forms of SCE at ``logits`` a position, and some of SCE's strata at
    fixed sizes, which are measured where they are named."""
    tail = {**TAIL_ONLY, "tail_candidates": logits}
    flat = tail | {"prior_power": 1.0}
    by_gradient = tail | {"prior": "gradient"}
    small = {"num_buckets": 64, "bucket_candidates": 256}
    large = {"num_buckets": 64, "bucket_candidates": 1024}
    own = {
        "name": "sce",
        "num_buckets": 16,
        "bucket_candidates": logits,
        "bucket_sampling": "priority",
        "shared_labels": False,
        "shared_frequent": 0,
    }
    forms: dict[str, dict[str, Any]] = {
        "tail": tail,
        "tail, no control": tail | {"control_variate": False},
        "tail, power 1": flat,
        "tail, uniform": tail | {"prior": "uniform"},
        "tail, gradient": by_gradient,
        "tail, mixture": flat | {"prior": {"labels": 1, "gradient": 3}},
        "tail, row control": tail | {"row_control_variate": True},
        "tail, gradient, row control": by_gradient | {"row_control_variate": True},
        "16 bucket samples": own,
        "bucket samples, gradient": own | {"prior": "gradient"},
    }
    fixed = {
        "labels+2048": _strata(0, 2048),
        "labels+1024+2048": _strata(1024, 2048),
        "labels+4096+4096": _strata(4096, 4096),
        "labels+1024+64x256+1024": _strata(1024, 1024, **small),
        "labels+1024+64x1024+1024": _strata(1024, 1024, **large),
        "labels+4096+64x1024+2048": _strata(4096, 2048, **large),
        "labels+1024+64x1024": _strata(1024, 0, **large),
        # What Blanc & Rendle compare.
        "kernel, 100": {"name": "kernel", "num_negatives": 100, **KERNEL},
        "unigram, 1000": {"name": "sampled_softmax", "num_negatives": 1000},
    }
    binary = ("bce", "gbce")
    rows = [m for m in equal_logits(logits, vocab_size) if m.name not in binary]
    for label, options in {**forms, **fixed}.items():
        rows.append(Method(label.replace(", ", "-").replace(" ", "-"), label, options))
    return rows


FIXED = 9
"""Rows at the end of :func:`estimators` that are measured only where they are named."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    add_common_arguments(parser, needs_model=True)
    parser.add_argument("--logits", type=int, default=2048, help="logits of a position")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], help="factors on the model's logits"
    )
    parser.add_argument("--initial", action="store_true", help="also with fresh weights")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    described = report.machine(arguments.device)

    def chosen(vocab_size: int) -> list[Method]:
        known = estimators(arguments.logits, vocab_size)
        return choose(known, arguments.methods) if arguments.methods else known[:-FIXED]

    tables = []
    for initial in (False, True)[: 1 + arguments.initial]:
        for scale in arguments.scales:
            problem, rows = measure(
                arguments, chosen, initial=initial, scale=scale, heads=("trainable",), floors=False
            )
            report.print_heading(described, problem)
            _print_rows(rows)
            tables.append({"problem": asdict(problem), "scale": scale, "rows": rows})
    if len(tables) > 1:
        _print_nearest(tables)
    result = {"command": "estimators", "machine": described, "tables": tables}
    report.write_json(arguments.json, result)
    report.draw(arguments.plot, _panels(tables))


def _print_rows(rows: Sequence[Row]) -> None:
    forms = {
        "products": ",.0f",
        "coverage": ".3f",
        "bias_partition": "+.4f",
        "bias": "+.4f",
        "sd": ".4f",
        "relative_error": ".4f",
        "reported_error": ".4f",
        "cos_hidden": ".5f",
        "cos_weight": ".5f",
        "seconds": ".3f",
    }
    measured = next((row["quality"] for row in rows if row["quality"]), {})
    peakedness = (
        f"; top 1 {measured['top']:.3f}, {measured['classes']:,.0f} classes" if measured else ""
    )
    headings = ["products", "coverage", "bias of Zhat", "bias", "sd log Z", "true error"]
    report.print_table(
        "Estimators against exact cross-entropy" + peakedness,
        ["estimator", *headings, "reported", "cos dh", "cos dW", "seconds"],
        [[r["label"], *report.figures(r["quality"] | r["trainable"], forms)] for r in rows],
    )
    for row in rows:
        if "error" in row["trainable"]:
            report.print_line(f"{row['label']}: failed; {row['trainable']['error']}")


ERRORS = {
    "bias of the loss": lambda quality: abs(quality["bias"]),
    "root mean square of Zhat/Z - 1": lambda quality: quality["relative_error"],
    "1 - cosine of dL/dh": lambda quality: 1.0 - quality["cos_hidden"],
    "1 - cosine of dL/dW": lambda quality: 1.0 - quality["cos_weight"],
}
"""What is compared, by heading; less is better."""


def _candidates(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["quality"] and row["name"] != "exact"]


def _print_nearest(tables: Sequence[dict[str, Any]]) -> None:
    cells = []
    for table in tables:
        rows = _candidates(table["rows"])
        quality = rows[0]["quality"]
        shown = []
        for error in ERRORS.values():
            size, label = min((error(row["quality"]), row["label"]) for row in rows)
            shown.append(f"{label} ({size:.4f})")
        cells.append([f"{quality['top']:.3f}", f"{quality['classes']:,.0f}", *shown])
    report.print_table("Nearest to exact", ["top 1", "classes", *ERRORS], cells)


def _panels(tables: Sequence[dict[str, Any]]) -> list[report.Panel]:
    """Errors against time on each problem, and against peakedness over several."""
    panels = []
    for heading in list(ERRORS)[1::2]:
        error = ERRORS[heading]
        for table in tables:
            points = [
                (row["trainable"]["seconds"], error(row["quality"]), row["label"])
                for row in _candidates(table["rows"])
            ]
            title = f"{table['problem']['title']}, logits x {table['scale']:g}"
            panels.append(report.Panel(title, "seconds of a pass", heading, {"": points}))
    if len(tables) > 1:
        for heading, error in ERRORS.items():
            series: dict[str, list[tuple[float, float, str]]] = {}
            for row in (row for table in tables for row in _candidates(table["rows"])):
                point = (row["quality"]["top"], error(row["quality"]), "")
                series.setdefault(row["label"], []).append(point)
            series = {label: sorted(points) for label, points in series.items()}
            panels.append(report.Panel("peakedness", "mean top-1 probability", heading, series))
    return panels
