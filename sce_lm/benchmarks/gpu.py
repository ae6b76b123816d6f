"""All that is to be known of a card, in one command and under nine minutes.

    python -m sce_lm.benchmarks.gpu [--json DIR] [--rehearse]

`scripts/gpu.sh` calls it from a checkout. The environment is checked, then the tests marked gpu,
errors against float64, the loss by every method on the shapes that people quote, whole training
steps, and profiles. A part that crashes, hangs or is not installed is named and loses its own
results alone; what matters least comes last, in case the time is over.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sce_lm.benchmarks import gpu_parts, report, results
from sce_lm.benchmarks.parts import Part, Result, run_part, start_server
from sce_lm.benchmarks.peers import PEERS, STOCK
from sce_lm.benchmarks.report import METHOD, Column, Table

BUDGET = 520.0
"""Seconds after which no part is begun, and each is ended."""
OURS = ("exact", "sce-tail", "sce", "sce-published")
STEPS = ("stock", "exact", "sce")
TABLES = (
    Table(
        "Largest error against float64",
        (
            Column("loss and dtype", "label"),
            Column("loss", "errors.loss", ".1e"),
            Column("dh", "errors.hidden", ".1e"),
            Column("dW", "errors.weight", ".1e", "over the largest value of each"),
        ),
    ),
    Table(
        "Forward and backward, trainable head",
        (
            METHOD,
            Column("forward ms", "forward_seconds", ".2f", factor=1e3),
            Column("ms", "seconds", ".2f", factor=1e3),
            Column("host ms", "host_seconds", ".2f", "until the passes are queued", 1e3),
            Column("x stock", "speedup", ".2f", "times as fast as plain cross-entropy"),
            Column(
                *("x floor", "over_floor", ".2f"),
                "over the least time of its products and passes over memory on this card",
            ),
            Column("peak MiB", "peak_mib", ",.0f"),
        ),
    ),
    Table(
        "A whole training step, random weights",
        (
            METHOD,
            Column("ms", "step.seconds", ".1f", factor=1e3),
            Column("x stock", "step.speedup", ".2f", "times as fast as the stock model's step"),
            Column("in the loss, host ms", "step.loss_seconds", ".1f", factor=1e3),
            Column("held MiB", "step.held_mib", ",.0f", "parameters and AdamW's moments"),
            Column("peak MiB", "step.peak_mib", ",.0f", "what a step needs over that"),
        ),
    ),
)
PLOTS = ()


@dataclass(frozen=True)
class Sizes:
    """How large the problems are."""

    shapes: tuple[tuple[int, int, int, str], ...]
    """N, V, d and dtype."""
    correctness: tuple[int, int, int]
    batch: tuple[int, int]
    """Rows and length of a training step."""
    model: dict[str, int]
    """Sizes of the models, instead of their own."""
    step_dtype: str
    repeats: int


CARD = Sizes(
    (
        (8192, 151_936, 4096, "bfloat16"),
        (8192, 262_144, 640, "bfloat16"),
        (16_384, 248_320, 2048, "bfloat16"),
        (8192, 128_256, 4096, "bfloat16"),
        (8192, 131_072, 4096, "bfloat16"),
        (4096, 1_000_000, 64, "float32"),
    ),
    (2048, 32_768, 1024),
    (8, 1024),
    {},
    "bfloat16",
    5,
)
REHEARSAL = Sizes(
    ((96, 700, 16, "bfloat16"), (64, 900, 8, "float32")),
    (48, 300, 16),
    (2, 24),
    {
        **{"vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    },
    "float32",
    1,
)


def parts(sizes: Sizes, device: str) -> list[Part]:
    """What is to be done, the most important first."""
    on = {"device": device}

    def losses(names: Iterable[str]) -> list[Part]:
        return [
            Part(
                f"loss-{n}x{v}x{d}-{name}",
                gpu_parts.loss_cost,
                {
                    **{"method": name, "sizes": (n, v, d)},
                    **{"dtype": dtype, "repeats": sizes.repeats, **on},
                },
                limit=100.0 if name == "compile" else 45.0,
            )
            for name in names
            for n, v, d, dtype in sizes.shapes
        ]

    first = {"sizes": sizes.shapes[0][:3], "dtype": sizes.shapes[0][3]}
    return [
        Part("environment", gpu_parts.environment, on),
        # The sanitizer takes minutes: `test.sh --gpu` runs it.
        Part("tests", gpu_parts.tests, {"selection": ["-k", "not sanitizer"]}, limit=150.0),
        *(
            Part(f"correctness-{kind}", gpu_parts.correctness,
                 {"sizes": sizes.correctness, "dtype": kind, **on})
            for kind in ("bfloat16", "float32")
        ),
        *losses((*OURS, STOCK)),
        *(
            Part(
                f"step-{model}-{name}",
                gpu_parts.training_step,
                {
                    **{"model": model, "smaller": sizes.model, "batch": sizes.batch, **on},
                    **{"method": name, "dtype": sizes.step_dtype},
                    "repeats": sizes.repeats,
                },
            )
            for model in gpu_parts.MODELS
            for name in STEPS
        ),
        *(
            Part(
                f"profile-{name}",
                gpu_parts.profiled,
                {"method": name, **first, **on},
            )
            for name in ("exact", "sce")
        ),
        *losses(name for name in PEERS if name != STOCK),
    ]  # fmt: skip


def run(todo: Sequence[Part], folder: Path, budget: float = BUDGET) -> list[Result]:
    """Run the parts one after another; ``folder`` has a file of each as soon as it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    ends, found = time.monotonic() + budget, []
    for number, part in enumerate(todo, 1):
        left = ends - time.monotonic()
        if left < 1.0:
            result = {"part": part.name, "skipped": "the time was over"}
            results.write_json(folder / f"{part.name}.json", result)
        else:
            report.progress(f"{number}/{len(todo)} {part.name}")
            result = run_part(part, folder, min(part.limit, left))
        for kind in ("failed", "skipped"):
            if kind in result:
                report.progress(f"    {kind}: {result[kind]}")
        found.append(result)
        results.write_json(folder / "summary.json", {"parts": found})
    return found


def comparisons(found: Sequence[Result]) -> list[results.Comparison]:
    """What was measured, one for each shape and model, as the page of results shows it."""
    errors = [
        {"label": f"{result['dtype']}, {name}", "errors": values}
        for result in found
        for name, values in result.get("errors", {}).items()
    ]
    grouped: dict[str, list[Result]] = {}
    for result in found:
        if "forward_seconds" in result:
            n, v, d = result["sizes"]
            title = f"N={n:,}, V={v:,}, d={d:,}, {result['dtype']}"
            grouped.setdefault(title, []).append(result)
        elif "step" in result:
            grouped.setdefault(result["model"], []).append(result)
    made = (
        [results.Comparison("Correctness (stock: in the same dtype)", {}, errors)] if errors else []
    )
    for title, rows in grouped.items():
        costs = [row.get("step", row) for row in rows]
        stock = next((c["seconds"] for c, r in zip(costs, rows) if r["name"] == STOCK), math.nan)
        for cost in costs:
            cost["speedup"] = stock / cost["seconds"]
        made.append(results.Comparison(title, {}, rows))
    return made


def print_summary(found: Sequence[Result]) -> None:
    """Tables of what was measured, and what is missing, by name."""
    by_name = {result["part"]: result for result in found}
    where = by_name.get("environment", {})
    if "missing" in where:
        report.print_line(f"Missing packages: {', '.join(where['missing']) or 'none'}")
    if "summary" in by_name.get("tests", {}):
        report.print_line(f"\nTests marked gpu: {by_name['tests']['summary']}")
    for comparison in comparisons(found):
        report.print_line(f"\n{comparison.title}")
        for table in TABLES:
            table.print(comparison.rows)
    for result in found:
        if "kernels" in result:
            title = (
                f"{result['part']}: {result['wall_ms']:.2f} ms, of which the device was at work "
                f"{result['device_ms']:.2f}; queued by the host in {result['host_ms']:.2f}; "
                f"{result['launches']} launches"
            )
            cells = [
                [k["kernel"][:70], str(k["calls"]), f"{k['ms']:.3f}"] for k in result["kernels"]
            ]
            report.print_table(title, ("kernel", "calls", "ms"), cells[:8])
    lost = [r for r in found if "failed" in r or "skipped" in r]
    if lost:
        report.print_line("\nNot measured, or wrong:")
    for result in lost:
        kind = "failed" if "failed" in result else "skipped"
        report.print_line(f"    {result['part']}: {kind}; {result[kind]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, metavar="DIR", default=Path("runs/gpu"), help="folder of the results"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy sizes")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        sys.exit("gpu.sh: torch finds no GPU here; --rehearse runs every part on the CPU.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part in progress ends too
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    start_server("sce_lm.benchmarks.gpu_parts", "sce_lm.hf")
    todo = parts(REHEARSAL, "cpu") if arguments.rehearse else parts(CARD, "cuda")
    # A process that is ended may leave half of a file in the compiler's cache.
    with tempfile.TemporaryDirectory(prefix="sce_lm-gpu-") as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        try:
            found = run(todo, arguments.json)
        except OSError as error:
            sys.exit(f"gpu.sh: {error}")
    origin = results.provenance("cpu" if arguments.rehearse else "cuda")
    shown = results.Results("gpu", comparisons(found), **origin)
    shown.save(arguments.json / "results.json")
    report.print_line(shown.heading)
    print_summary(found)
    report.print_line(f"\nResults: {arguments.json}")
    if any("failed" in result for result in found):
        sys.exit("gpu.sh: some parts failed; their logs are beside the results.")


if __name__ == "__main__":
    main()
