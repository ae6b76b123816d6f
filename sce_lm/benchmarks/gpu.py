"""All that is to be known of a card, in one command and under nine minutes.

    python -m sce_lm.benchmarks.gpu [--json DIR] [--rehearse]

`scripts/gpu.sh` calls it from a checkout. The environment is checked, then the tests marked gpu,
errors against float64, the loss by every method on the shapes that people quote, whole training
steps, and profiles. A part that crashes, hangs or is not installed is named and loses its own
figures alone; what matters least comes last, in case the time is over. Beside a measurement stands
what the roofline model says of the card.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sce_lm.benchmarks import gpu_parts, loss, report
from sce_lm.benchmarks.parts import Part, Result, run_part, start_server

BUDGET = 520.0
"""Seconds after which no part is begun, and each is ended."""
OURS = ("exact", "tail", "strata", "published")
PEERS = ("stock", "torch_fused", "liger", "cce", "quack", "trl", "compile")
STEPS = ("stock", "exact", "strata")
TAIL = 2048


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
    methods = {method.name: method for method in loss.methods(TAIL)}
    on = {"device": device}

    def losses(names: Iterable[str]) -> list[Part]:
        return [
            Part(
                f"loss-{n}x{v}x{d}-{name}",
                gpu_parts.loss_row,
                {
                    **{"specification": methods[name].specification, "sizes": (n, v, d)},
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
        *losses((*OURS, "stock")),
        *(
            Part(
                f"step-{model}-{name}",
                gpu_parts.step_row,
                {
                    **{"model": model, "smaller": sizes.model, "batch": sizes.batch, **on},
                    **{"specification": methods[name].specification, "dtype": sizes.step_dtype},
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
                {"specification": methods[name].specification, **first, **on},
            )
            for name in ("exact", "strata")
        ),
        *losses(name for name in PEERS if name != "stock"),
    ]  # fmt: skip


def run(todo: Sequence[Part], folder: Path, budget: float = BUDGET) -> list[Result]:
    """Run the parts one after another; ``folder`` has a file of each as soon as it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    ends, found = time.monotonic() + budget, []
    for number, part in enumerate(todo, 1):
        left = ends - time.monotonic()
        if left < 1.0:
            result = {"part": part.name, "skipped": "the time was over"}
            report.write_json(folder / f"{part.name}.json", result)
        else:
            report.progress(f"{number}/{len(todo)} {part.name}")
            result = run_part(part, folder, min(part.limit, left))
        for kind in ("failed", "skipped"):
            if kind in result:
                report.progress(f"    {kind}: {result[kind]}")
        found.append(result)
        report.write_json(folder / "summary.json", {"parts": found})
    return found


def print_summary(found: Sequence[Result]) -> None:
    """Tables of what was measured, and what is missing, by name."""
    by_name = {result["part"]: result for result in found}
    where = by_name.get("environment", {})
    if "machine" in where:
        report.print_heading(
            where["machine"], f"missing: {', '.join(where['missing']) or 'nothing'}"
        )
    if "summary" in by_name.get("tests", {}):
        report.print_line(f"\nTests marked gpu: {by_name['tests']['summary']}")
    errors = [
        [f"{result['dtype']}, {name}", *(f"{value:.1e}" for value in values.values())]
        for result in found
        for name, values in result.get("errors", {}).items()
    ]
    if errors:
        columns = ("largest error against float64", "loss", "dh", "dW")
        report.print_table(
            "Correctness (stock: plain cross-entropy in the same dtype)", columns, errors
        )
    _print_losses(found)
    _print_steps(found)
    for result in found:
        if "kernels" in result:
            title = (
                f"{result['part']}: {result['wall_ms']:.2f} ms, of which the device was at work "
                f"{result['device_ms']:.2f}; queued by the host in {result['host_ms']:.2f}; "
                f"{result['launches']} launches"
            )
            rows = [
                [r["kernel"][:70], str(r["calls"]), f"{r['ms']:.3f}"] for r in result["kernels"]
            ]
            report.print_table(title, ("kernel", "calls", "ms"), rows[:8])
    lost = [r for r in found if "failed" in r or "skipped" in r]
    if lost:
        report.print_line("\nNot measured, or wrong:")
    for result in lost:
        kind = "failed" if "failed" in result else "skipped"
        report.print_line(f"    {result['part']}: {kind}; {result[kind]}")


def _print_losses(found: Sequence[Result]) -> None:
    rows = [result for result in found if "forward_seconds" in result]
    stock = {tuple(r["sizes"]): r["seconds"] for r in rows if r["part"].endswith("-stock")}
    cells = []
    for row in sorted(rows, key=lambda row: tuple(row["sizes"])):
        reference = stock.get(tuple(row["sizes"]))
        times = (row["forward_seconds"], row["seconds"], row["host_seconds"])
        cells.append(
            [
                row["part"].removeprefix("loss-"),
                *(f"{1e3 * t:.2f}" for t in times),
                f"{reference / row['seconds']:.2f}" if reference else "",
                f"{row['predicted_ms']:.2f}" if "predicted_ms" in row else "",
                f"{row['peak_mib']:,.0f}",
            ]
        )
    if cells:
        sheets = {row["predicted_for"] for row in rows if "predicted_for" in row}
        columns = (
            "N x V x d, method",
            "forward ms",
            "ms",
            "host ms",
            "x stock",
            "predicted",
            "MiB",
        )
        report.print_table(
            "The loss, forward and backward, trainable head (predicted: the roofline model at half "
            f"of the rates of {', '.join(sheets) or 'no known card'}; peers: their products alone)",
            (*columns, "predicted", "MiB"),
            cells,
        )


def _print_steps(found: Sequence[Result]) -> None:
    cells = [
        [
            result["part"].removeprefix("step-"),
            *(f"{1e3 * result[name]:.1f}" for name in ("seconds", "loss_seconds")),
            *(f"{result[name]:,.0f}" for name in ("held_mib", "peak_mib")),
        ]
        for result in found
        if "loss_seconds" in result
    ]
    if cells:
        columns = ("model, method", "ms", "in the loss, host ms", "held MiB", "peak MiB")
        report.print_table("A whole training step, random weights", columns, cells)


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
    print_summary(found)
    report.print_line(f"\nResults: {arguments.json}")
    if any("failed" in result for result in found):
        sys.exit("gpu.sh: some parts failed; their logs are beside the results.")


if __name__ == "__main__":
    main()
