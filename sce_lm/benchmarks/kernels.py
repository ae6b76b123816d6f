"""Triton kernels compiled for GPUs that are not here, and a prediction of their time.

Compiles the launches of every configuration in the table, for each architecture and dtype, and
reads registers, spilled registers, shared memory and matrix instructions from the machine code; of
several variants of a kernel the one with the most arguments is shown. Results are kept beside
Triton's own cache. The second part is a model, not a measurement: operations and bytes of each
launch at a share of two devices' peak rates.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from sce_lm.benchmarks import report, roofline, tune
from sce_lm.config import SCEConfig
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import Positions
from sce_lm.ops.row_reductions import Asked
from sce_lm.ops.triton.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.triton.catalogue_scan import catalogue_topk
from sce_lm.ops.triton.compile_offline import Compiled, Launch, compile_launch, recording
from sce_lm.ops.triton.configurations import ARCHITECTURES, DTYPES, Architecture, choose
from sce_lm.ops.triton.exact_cross_entropy import exact_cross_entropy
from sce_lm.ops.triton.priority_sample import priority_sample
from sce_lm.ops.triton.row_reductions import row_reductions

CACHE = Path(knobs.cache.dir) / "sce_lm"
"""Where results are kept, by a hash of source, types and options."""
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
ALIGNED, RAGGED, UNALIGNED = 2048, 1040, 300
"""Widths: whole tiles; not whole tiles; rows that do not start at multiples of 16."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--archs", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtypes", nargs="*", choices=DTYPE_NAMES, default=list(DTYPE_NAMES))
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--positions", type=int, default=16_384, help="N of the prediction")
    parser.add_argument("--vocab", type=int, default=248_320, help="V")
    parser.add_argument("--dim", type=int, default=2048, help="d")
    parser.add_argument("--labels", type=int, default=4096, help="different labels of a batch")
    parser.add_argument("--share", type=float, default=0.5, help="of the peak rates")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="instead: on this machine's GPU, time what lies beside the table's configurations",
    )


def run(arguments: argparse.Namespace) -> None:
    """Compile, predict, print, and write what was asked for."""
    if arguments.tune:
        tune.run(arguments)
        return
    rows = compile_table(arguments.archs, arguments.dtypes, arguments.processes)
    columns = ("kernel", "arch", "dtype", "config", "registers", "spills", "shared_bytes")
    columns += ("matrix_instructions", "tile_bytes", "tile_operations")
    cells = [[str(row[name]) for name in columns] for row in rows]
    report.print_table("Compiled offline", columns, cells)
    wrong = [row for row in rows if row["fault"]]
    for row in wrong:
        report.print_line(f"{row['kernel']} on {row['arch']} in {row['dtype']}: {row['fault']}")
    predictions = predict(arguments)
    report.write_json(arguments.json, {"kernels": rows, "predictions": predictions})
    if wrong:
        raise ValueError(f"{len(wrong)} kernels are not as they must be")


# -- compilation -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What a call has that decides which code is compiled."""

    width: int = ALIGNED
    bias: bool = False
    post: LogitTransform = LogitTransform()
    buckets: bool = False
    weighted: bool = False
    control: bool = False


_CAP = LogitTransform(1.0, 30.0)
FULL = (
    Variant(bias=True, post=_CAP, buckets=True, control=True),
    Variant(bias=True, post=_CAP, buckets=True, weighted=True),
)
"""The variants with the most arguments."""
VARIANTS = (
    *FULL,
    *(replace(v, width=width) for v in FULL for width in (RAGGED, UNALIGNED)),
    Variant(),
    Variant(control=True),
    Variant(post=_CAP, control=True),
    Variant(bias=True, buckets=True),
    Variant(width=UNALIGNED),
)


def launches(architecture: Architecture, dtype: torch.dtype, variant: Variant) -> list[Launch]:
    """Different launches of all operations, as their launchers make them."""
    n, v, d = 64, 320, variant.width
    hidden = torch.zeros(n, d, dtype=dtype, requires_grad=True)
    weight = torch.zeros(v, d, dtype=dtype, requires_grad=True)
    bias = torch.zeros(v, dtype=dtype, requires_grad=True) if variant.bias else None
    labels = torch.zeros(n, dtype=torch.int64)
    items = torch.arange(160, 288).view(2, 64) if variant.buckets else None
    candidates = Candidates(
        torch.arange(80),
        torch.arange(96, 160),
        torch.zeros(64, dtype=torch.float64),
        items,
        torch.arange(n) % 2 if variant.buckets else None,
        bucket_log_weights=torch.zeros(2, 64) if variant.weighted else None,
        control_variate=variant.control,
    )
    head, positions = Head(weight, None, bias, variant.post), Positions(hidden, labels)
    with recording(architecture) as found:
        for loss in (
            candidate_cross_entropy(head, positions, candidates).loss,
            exact_cross_entropy(head, positions).loss,
            *_everything(head, hidden),
        ):
            loss.sum().backward()
        excluded = torch.arange(16) if variant.bias else None
        catalogue_topk(hidden.detach(), head, 16, excluded=excluded)
        priority_sample(torch.zeros(v), 32, torch.Generator())
    return list({launch.key: launch for launch in found}.values())


def _everything(head: Head, hidden: torch.Tensor) -> list[torch.Tensor]:
    """All that row reductions find, in one sum."""
    ids, asked = torch.zeros(len(hidden), 4, dtype=torch.int64), Asked(True, True, True, 1)
    found = row_reductions(head, hidden, ids, asked)
    parts = [*found[:5], None if found.top is None else found.top.values]
    return [torch.cat([part.flatten() for part in parts if part is not None])]


def configurations_of(architecture: Architecture, dtype: torch.dtype) -> list[Launch]:
    """For each kernel and configuration the launch with the most arguments."""
    best: dict[tuple[str, str], Launch] = {}
    for variant in (FULL[0], replace(FULL[0], width=UNALIGNED)):
        for launch in launches(architecture, dtype, variant):
            key = (launch.name, launch.configuration)
            if key not in best or launch.num_arguments > best[key].num_arguments:
                best[key] = launch
    return list(best.values())


def fault(launch: Launch, compiled: Compiled, dtype: torch.dtype) -> str | None:
    """What is wrong with a compiled launch; None: nothing."""
    limit = launch.architecture.shared_limit
    if compiled.spills:
        return f"{compiled.spills} instructions move spilled registers"
    if compiled.shared_bytes > limit:
        return f"{compiled.shared_bytes} bytes of shared memory, and {limit} are there"
    if launch.has_product and dtype != torch.float32 and not compiled.matrix_instructions:
        return f"no {launch.architecture.matrix_instruction} instruction"
    return None


def compile_table(
    architectures: Sequence[str], dtypes: Sequence[str], processes: int
) -> list[dict[str, Any]]:
    """Rows of the table, in the order of the arguments."""
    tasks = [(a, d) for a in architectures for d in dtypes]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(tasks)), mp_context=context) as pool:
        found = []
        for (architecture, dtype), rows in zip(tasks, pool.map(_compile, *zip(*tasks))):
            report.progress(f"{architecture} {dtype}: {len(rows)} kernels")
            found += rows
    return found


def _compile(architecture_name: str, dtype_name: str) -> list[dict[str, Any]]:
    architecture, dtype = ARCHITECTURES[architecture_name], DTYPE_NAMES[dtype_name]
    rows = []
    for launch in configurations_of(architecture, dtype):
        compiled = compile_launch(launch, CACHE)
        rows.append(
            {
                "kernel": launch.name,
                "arch": architecture_name,
                "dtype": dtype_name,
                "config": launch.configuration,
                **asdict(compiled),
                "tile_bytes": launch.tile_bytes(dtype.itemsize),
                "tile_operations": launch.tile_operations,
                "fault": fault(launch, compiled, dtype),
            }
        )
    return rows


# -- prediction ------------------------------------------------------------------------------


def shapes(arguments: argparse.Namespace) -> dict[str, roofline.Shape]:
    """The problems that are predicted."""
    n, v, d = arguments.positions, arguments.vocab, arguments.dim
    sizes = SCEConfig().resolve(n, v)
    return {
        "tail only, 2048": roofline.Shape(n, v, d, tail=2048),
        "tail only, 2048, control variate": roofline.Shape(n, v, d, tail=2048, control=True),
        "default strata": roofline.Shape(
            n,
            v,
            d,
            shared=sizes.shared_frequent + arguments.labels,
            tail=sizes.tail_candidates,
            buckets=sizes.num_buckets,
            bucket_size=sizes.bucket_candidates,
            control=sizes.control_variate,
        ),
    }


def predict(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print each device's and problem's terms; returns them."""
    share, found = arguments.share, []
    for device in roofline.DEVICES:
        choice = partial(
            choose, architecture=ARCHITECTURES[device.architecture], dtype=torch.bfloat16
        )
        for name, shape in shapes(arguments).items():
            steps = roofline.steps(shape, choice)
            seconds = [step.seconds(device, share) for step in steps]
            rows = [
                [
                    f"{step.phase}: {step.kernel} {step.list}",
                    f"{step.operations / 1e9:,.1f}",
                    f"{step.memory_bytes / 2**20:,.0f}",
                    f"{step.tile_bytes / 2**20:,.0f}",
                    f"{1e3 * time:.3f}",
                ]
                for step, time in zip(steps, seconds)
            ]
            totals = [
                sum(step.operations for step in steps) / 1e9,
                sum(step.memory_bytes for step in steps) / 2**20,
                sum(step.tile_bytes for step in steps) / 2**20,
            ]
            rows.append(["together", *(f"{t:,.0f}" for t in totals), f"{1e3 * sum(seconds):.3f}"])
            title = (
                f"Prediction, not measured: {device.name} at {share:.0%} of "
                f"{device.matrix_rate / 1e12:.0f} TFLOP/s and {device.memory_rate / 1e12:.2f} TB/s"
                f"\n{name}: N={shape.positions}, V={shape.vocab}, d={shape.width}, bf16"
            )
            columns = ("launch", "GFLOP", "memory MiB", "tiles MiB", "ms")
            report.print_table(title, columns, rows)
            found.append(
                {
                    "device": asdict(device),
                    "problem": name,
                    "share": share,
                    "shape": asdict(shape),
                    "steps": [
                        {**asdict(step), "seconds": time} for step, time in zip(steps, seconds)
                    ],
                    "milliseconds": 1e3 * sum(seconds),
                }
            )
    report.print_line(
        f"For comparison: Cut Cross-Entropy, {roofline.PUBLISHED_CCE_MS} ms, measured by its "
        "authors at N=16384, V=248320, d=2048 in bf16 on an H100."
    )
    return found
