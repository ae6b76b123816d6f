"""Triton kernels compiled for GPUs that are not here, or timed on the one that is.

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
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from sce_lm.benchmarks import report, results, tune
from sce_lm.benchmarks.report import Column, Table
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import Positions
from sce_lm.ops.row_reductions import Asked
from sce_lm.ops.triton.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.triton.catalogue_scan import catalogue_topk
from sce_lm.ops.triton.compile_offline import Compiled, Launch, compile_launch, recording
from sce_lm.ops.triton.configurations import ARCHITECTURES, DTYPES, Architecture
from sce_lm.ops.triton.exact_cross_entropy import exact_cross_entropy
from sce_lm.ops.triton.priority_sample import priority_sample
from sce_lm.ops.triton.row_reductions import row_reductions

CACHE = Path(knobs.cache.dir) / "sce_lm"
"""Where results are kept, by a hash of source, types and options."""
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
ALIGNED, RAGGED, UNALIGNED = 2048, 1040, 300
"""Widths: whole tiles; not whole tiles; rows that do not start at multiples of 16."""


TABLES = (
    Table(
        "Kernels",
        (
            Column("kernel", "label"),
            Column("arch", "arch"),
            Column("dtype", "dtype"),
            Column("configuration", "config"),
            Column("registers", "registers"),
            Column("spills", "spills", meaning="instructions that move spilled registers"),
            Column("shared bytes", "shared_bytes"),
            Column("matrix instructions", "matrix_instructions"),
            Column("tile bytes", "tile_bytes"),
            Column("tile operations", "tile_operations"),
            Column("ms", "milliseconds", ".3f", "of the whole operation that launches it"),
        ),
    ),
)
PLOTS = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--archs", nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtypes", nargs="*", choices=DTYPE_NAMES, default=list(DTYPE_NAMES))
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--positions", type=int, default=16_384, help="N of --tune")
    parser.add_argument("--vocab", type=int, default=248_320, help="V of --tune")
    parser.add_argument("--dim", type=int, default=2048, help="d of --tune")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="instead: on this machine's GPU, time what lies beside the table's configurations",
    )


def measure(arguments: argparse.Namespace) -> Sequence[results.Comparison]:
    """Compile everything; or, with --tune, time it."""
    if arguments.tune:
        return [tune.measure(arguments)]
    rows = compile_table(arguments.archs, arguments.dtypes, arguments.processes)
    return [results.Comparison("Compiled offline", {}, rows)]


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
        wrong = fault(launch, compiled, dtype)
        rows.append(
            {
                "label": launch.name,
                "arch": architecture_name,
                "dtype": dtype_name,
                "config": launch.configuration,
                **asdict(compiled),
                "tile_bytes": launch.tile_bytes(dtype.itemsize),
                "tile_operations": launch.tile_operations,
                "notes": [f"{architecture_name}, {dtype_name}: {wrong}"] if wrong else [],
            }
        )
    return rows
