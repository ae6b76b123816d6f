"""Time and memory of a training step as the catalogue and the batch grow.

SCE with row-sparse gradients of the weight against the exact loss, on drawn data; each line is a
process of its own. A step is a forward and backward pass. Between steps, outside the time, plain
SGD changes the rows that have a gradient, so that what a loss derives from the weight does not stay
valid for free. The exact loss is left out where its gradients do not fit, or where a step would
take longer than --budget, by the step before.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from sce_lm import objectives
from sce_lm.benchmarks import methods, report, results
from sce_lm.benchmarks.methods import Method
from sce_lm.benchmarks.peers import free_memory
from sce_lm.benchmarks.problem import LOGIT_SPREAD, zipf_labels
from sce_lm.benchmarks.report import METHOD, Column, Plot, Table
from sce_lm.benchmarks.side_by_side import measured_apart
from sce_lm.objectives import SCE
from sce_lm.training.measure import held_bytes, start_peak, time_calls

WARM_UP = 3
"""Steps before the first that is measured."""
EXACT_GRADIENTS = 4
"""Tables of the size of W that the exact loss and its optimiser step hold, W among them."""
VOCABULARIES = [1000 * v for v in (50, 100, 200, 500, 1000, 2000, 5000, 10_000)]
POSITIONS = [1024, 2048, 4096, 8192, 16_384]
SPARSE_TAIL = 'sce-tail:{"sparse_grad": true}'
N, V = Column("N", "positions", ","), Column("V", "vocab_size", ",")
TIME = Column("x time", "time_ratio", ".2f", "a step over that of the first line of the method")
EXTRA = Column("extra MiB", "extra_mib", ",.1f", "peak of a step over what is held between steps")
TABLES = (
    Table(
        "A training step as V and N grow",
        (
            METHOD,
            *(N, V, TIME),
            Column("s / step", "seconds", ".4f"),
            Column("SGD s", "update_seconds", ".4f"),
            EXTRA,
            Column("W MiB", "table_mib", ",.0f"),
            Column(
                *("state B/item", "state_bytes_an_item", ".1f"),
                "tensors that the loss keeps, in bytes an item",
            ),
            Column("kept MiB", "kept_mib", ",.0f", "all that it keeps, as the system counts it"),
            Column("left out", "left_out"),
        ),
    ),
)
PLOTS = tuple(
    Plot(f"{y.heading} as {x.heading} grows", x, y, True, lambda row, x=x: row["grows"] == x.key)
    for x in (V, N)
    for y in (TIME, EXTRA)
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--dim", type=int, default=64, help="width d")
    parser.add_argument("--tokens", type=int, default=4096, help="positions N while V grows")
    parser.add_argument("--vocab", type=int, default=1_000_000, help="classes V while N grows")
    parser.add_argument("--vocabs", type=int, nargs="*", default=VOCABULARIES, help="V, ascending")
    parser.add_argument(
        "--token-counts", type=int, nargs="*", default=POSITIONS, help="N, ascending"
    )
    methods.add_options(parser, (SPARSE_TAIL, "exact"))
    parser.add_argument("--repeats", type=int, default=7, help="steps whose median is taken")
    parser.add_argument("--budget", type=float, default=60.0, help="most seconds of an exact step")


def measure(arguments: argparse.Namespace) -> Sequence[results.Comparison]:
    """One comparison, whose rows have sizes of their own."""
    grids = {
        V.key: [(arguments.tokens, v) for v in arguments.vocabs],
        N.key: [(n, arguments.vocab) for n in arguments.token_counts],
    }
    rows = [
        row
        for grows, sizes in grids.items()
        for method in methods.choose(arguments)
        for row in _line(method, grows, sizes, arguments)
    ]
    title = f"Random data, width {arguments.dim}, float32"
    return [results.Comparison(title, {"width": arguments.dim}, rows)]


def _line(
    method: Method, grows: str, sizes: Sequence[tuple[int, int]], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Rows of one method; one that is left out says why."""
    if method.peer is not None:
        raise ValueError(f"--methods has {method.name!r}; scale measures our own losses only.")
    is_exact, first, seconds_a_logit = method.name == "exact", 0.0, 0.0
    for n, v in sizes:
        report.progress(f"{method.label}: {n:,} positions, {v:,} classes")
        row = {**asdict(method), "grows": grows, "positions": n, "vocab_size": v}
        row["resolved"] = method.resolved(n, v, arguments.dim)
        needed = EXACT_GRADIENTS * 4 * v * arguments.dim * is_exact
        expected = seconds_a_logit * n * v * is_exact
        if needed > free_memory(arguments.device):
            row["left_out"] = f"needs {needed / 2**30:.0f} GiB"
        elif expected > arguments.budget:
            row["left_out"] = f"about {expected:.0f} s"
        else:
            row |= measured_apart(
                row,
                measure_step,
                positions=n,
                vocab_size=v,
                width=arguments.dim,
                specification=method.specification,
                repeats=arguments.repeats,
                budget=arguments.budget,
                device=arguments.device,
            )
            seconds = row.get("seconds", 0.0)
            first, seconds_a_logit = first or seconds, seconds / (n * v)
            row |= {"time_ratio": seconds / first} if first and seconds else {}
        yield row


def measure_step(
    positions: int,
    vocab_size: int,
    width: int,
    specification: dict[str, Any],
    repeats: int,
    budget: float,
    device: str,
) -> dict[str, float]:
    """Seconds and memory of a training step, in this process."""
    torch.manual_seed(0)
    drawn = torch.randn(vocab_size, width, device=device).mul_(LOGIT_SPREAD / width**0.5)
    weight = torch.nn.Parameter(drawn)
    hidden = torch.nn.Parameter(torch.randn(positions, width, device=device))
    labels = zipf_labels(positions, vocab_size, torch.Generator().manual_seed(0)).to(device)
    objective = objectives.get(**specification)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    if isinstance(objective, SCE):
        objective.state.row_sum.follow(optimizer, weight)
    updates: list[float] = []

    def step() -> None:
        objective(hidden, weight, labels).backward()

    def update() -> None:
        updates.extend(time_calls(optimizer.step, device, 1))
        hidden.grad = weight.grad = None

    objectives.get(**specification)(hidden[:64], weight[:64], labels[:64] % 64)  # sets up libraries
    before = held_bytes(device)
    for _ in range(WARM_UP):
        step()
        update()
    kept = held_bytes(device) - before
    read_peak = start_peak(device)
    step()
    extra = read_peak()
    update()
    seconds = time_calls(step, device, repeats, budget=budget, between=update)
    return {
        "seconds": statistics.median(seconds),
        "update_seconds": statistics.median(updates[-len(seconds) :]),
        "extra_mib": extra / 2**20,
        "table_mib": weight.nbytes / 2**20,
        "kept_mib": kept / 2**20,
        "state_bytes_an_item": tensor_bytes(objective.state) / vocab_size,
    }


def tensor_bytes(value: Any) -> int:
    """Bytes of the distinct tensors that an object holds, in attributes and containers too."""
    storages: dict[int, int] = {}
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        else:
            waiting += getattr(item, "__dict__", {}).values()
            waiting += [getattr(item, name, None) for name in getattr(item, "__slots__", ())]
    return sum(storages.values())
