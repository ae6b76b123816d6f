"""Times of the kernels' configurations, and of those beside them, on this machine's GPU.

One kernel's configuration is changed at a time, by one field, and the whole operation that launches
it is timed, so that a tile which is fast by itself and slows its neighbours down is no gain. The
table in :mod:`sce_lm.ops.triton.configurations` is changed by hand: its rows must also pass the
offline compilation for every dtype and variant.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sce_lm.benchmarks import report, results
from sce_lm.config import SCEConfig
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.triton.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.triton.catalogue_scan import catalogue_topk
from sce_lm.ops.triton.configurations import Configuration, configuration, replaced
from sce_lm.ops.triton.priority_sample import priority_sample

LOSS_KERNELS = (
    "forward",
    "forward_weighted",
    "logit_gradient",
    "logit_gradient_weighted",
    "hidden_gradient",
    "row_gradient",
    "row_dot",
    "row_sum",
    "merge_rows",
)
WARM_UP, REPEATS = 3, 20
LEAST_TILE = 16
"""Smallest side of a tile that a product takes."""


def neighbours(row: Configuration) -> list[Configuration]:
    """The configurations that differ from ``row`` by a factor of two in one size, or a stage."""
    found = []
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if field.name == "num_stages":
            steps = [value - 1, value + 1]
        else:
            steps = [value // 2, value * 2] if value > 1 else []
        least = {"num_warps": 1, "num_stages": 1}.get(field.name, LEAST_TILE)
        found += [dataclasses.replace(row, **{field.name: s}) for s in steps if s >= least]
    return found


def tune(kernel: str, like: torch.Tensor, milliseconds: Callable[[], float]) -> dict[str, Any]:
    """Times of an operation with the table's configuration of a kernel and with its neighbours.

    Args:
        like: a tensor of the device and dtype.
        milliseconds: runs the operation and times it.
    """
    row, times, failed = configuration(kernel, like), {}, {}
    for tried in [row, *neighbours(row)]:
        with replaced(kernel, tried):
            try:
                times[str(tried)] = milliseconds()
            except Exception as error:
                failed[str(tried)] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"kernel": kernel, "table": str(row), "milliseconds": times, "failed": failed}


def measure(arguments: argparse.Namespace) -> results.Comparison:
    """Times of every kernel's configurations, the fastest first.

    Raises:
        ValueError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "--tune times the kernels on a GPU, and torch finds none here; leave it out to compile "
            "them offline."
        )
    head, operations = problem(arguments.positions, arguments.vocab, arguments.dim)
    rows = []
    for operation, kernels in operations.items():
        for kernel in kernels:
            found = tune(kernel, head, partial(_milliseconds, operation))
            report.progress(kernel)
            for name, time in sorted(found["milliseconds"].items(), key=lambda item: item[1]):
                shown = name + " (table)" * (name == found["table"])
                rows.append({"label": kernel, "config": shown, "milliseconds": time})
            rows[-1]["notes"] = [f"{name}: {why}" for name, why in found["failed"].items()]
    title = f"Milliseconds of the operation on {torch.cuda.get_device_name()}, bf16"
    return results.Comparison(title, {}, rows)


def _milliseconds(operation: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(WARM_UP):
        operation()
    start.record()
    for _ in range(REPEATS):
        operation()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPEATS


def problem(
    positions: int, vocab: int, width: int
) -> tuple[torch.Tensor, dict[Callable[[], Any], tuple[str, ...]]]:
    """A weight on the GPU, and operations on it, each with the kernels that it launches."""
    sizes = SCEConfig(bucket_sampling="top").resolve(positions, vocab, width=width)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(positions, width, **options, requires_grad=True)
    weight = torch.randn(vocab, width, **options).div_(width**0.5).requires_grad_()
    labels = torch.randint(vocab, (positions,), device="cuda")
    order = torch.randperm(vocab, device="cuda")
    shared = order[: sizes.shared_frequent + 4096]
    rest = order[len(shared) :]
    tail = rest[: sizes.tail_candidates]
    buckets = max(sizes.num_buckets, 1)
    queries = torch.randn(buckets, width, **options)
    own = max(sizes.bucket_candidates, 1024)
    head = Head(weight.detach())
    items = catalogue_topk(queries, head, own, excluded=shared)
    candidates = Candidates(
        shared,
        tail,
        torch.rand(len(tail), device="cuda"),
        items,
        torch.randint(buckets, (positions,), device="cuda"),
        control_variate=True,
    )

    def loss() -> None:
        positions = Positions(hidden, labels)
        value = candidate_cross_entropy(Head(weight), positions, candidates).loss.mean()
        torch.autograd.grad(value, (hidden, weight))

    def scan() -> None:
        catalogue_topk(queries, head, own, excluded=shared)

    proposal, noise = torch.randn(vocab, device="cuda"), torch.Generator("cuda")

    def sample() -> None:
        priority_sample(proposal, sizes.tail_candidates, noise)

    operations = {
        loss: LOSS_KERNELS,
        scan: ("catalogue_scan",),
        sample: ("priority_sample",),
    }
    return weight, operations
