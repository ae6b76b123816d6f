"""Time and memory of a rank as the rows of a head are spread over more of them.

What a rank does by itself, candidates and both passes over its V/R rows, is measured in a process
of its own, with its share of the labels (N/R). What the ranks do together is calculated: an
all-reduce of b bytes in rings takes

    2·(R - 1)·latency + 2·(R - 1)/R · b / bandwidth

and a micro-batch has three of them (sce_lm/distributed.py): 4·N and 12·N bytes and, in backward,
4·N·d. Assumed: every rank is as fast as this machine, none waits for another, nothing overlaps, and
the network is that of --latency and --bandwidth. Memory is the rank's rows of W, what the loss
keeps, and a step's peak over both, its gradients included; an optimiser's own state comes on top.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sce_lm import objectives
from sce_lm.benchmarks import report
from sce_lm.benchmarks.methods import DEFAULT_STRATA
from sce_lm.benchmarks.problem import LOGIT_SPREAD, zipf_labels
from sce_lm.benchmarks.rows import or_error
from sce_lm.benchmarks.scale import tensor_bytes
from sce_lm.distributed import VocabParallel, VocabShard
from sce_lm.training.measure import start_peak, time_calls

METHODS: dict[str, dict[str, Any]] = {"exact": {"name": "exact"}, "sce": DEFAULT_STRATA}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="R")
    parser.add_argument("--vocabs", type=int, nargs="+", default=[151_936, 1_000_000], help="V")
    parser.add_argument("--token-counts", type=int, nargs="+", default=[2048], help="N")
    parser.add_argument("--dim", type=int, default=256, help="width d")
    parser.add_argument("--latency", type=float, default=20.0, help="of a message, microseconds")
    parser.add_argument(
        "--bandwidth", type=float, default=12.5, help="of a rank's link, 10^9 bytes a second"
    )
    parser.add_argument("--repeats", type=int, default=5, help="steps whose median is taken")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    points = [
        _point(method, ranks, v, n, arguments)
        for method in METHODS
        for v in arguments.vocabs
        for n in arguments.token_counts
        for ranks in arguments.ranks
    ]
    described = report.machine(arguments.device)
    network = {"latency": arguments.latency, "bandwidth": arguments.bandwidth}
    report.write_json(
        arguments.json,
        {
            "command": "ranks",
            "machine": described,
            "network": network,
            "width": arguments.dim,
            "points": points,
        },
    )
    report.print_heading(
        described,
        f"Random data, width {arguments.dim}, float32; a rank is measured, the network calculated "
        f"from {arguments.latency:g} us and {arguments.bandwidth:g} GB/s",
    )
    _print_points(points)
    report.draw(arguments.plot, _panels(points))


def collective_bytes(positions: int, width: int) -> list[int]:
    """Bytes of each all-reduce of one micro-batch, forward and backward, in fp32."""
    return [4 * positions, 12 * positions, 4 * positions * width]


def network_seconds(sizes: Sequence[int], ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds of all-reduces of these bytes in rings.

    Args:
        latency: seconds of a message.
        bandwidth: bytes a second of a rank's link, in each direction.
    """
    rounds = 2 * (ranks - 1)
    return sum(rounds * latency + rounds / ranks * size / bandwidth for size in sizes)


def _point(
    method: str, ranks: int, vocab_size: int, positions: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    report.progress(f"{method}: {positions:,} positions, {vocab_size:,} classes, {ranks} ranks")
    sizes = collective_bytes(positions, arguments.dim)
    network = network_seconds(sizes, ranks, arguments.latency / 1e6, arguments.bandwidth * 1e9)
    point = or_error(
        measure_rank,
        positions=positions,
        vocab_size=vocab_size,
        width=arguments.dim,
        ranks=ranks,
        specification=METHODS[method],
        repeats=arguments.repeats,
        device=arguments.device,
    )
    if "error" not in point:
        point |= {"network_seconds": network, "seconds": point["own_seconds"] + network}
    given = {"method": method, "ranks": ranks, "vocab_size": vocab_size, "positions": positions}
    return given | point


class _OneOfMany(VocabShard):
    """A rank whose collectives take no time and bring nothing."""

    def add_up(self, found, is_own):
        return found.log_partition, found.label_logit

    def reduce(self, x, op=dist.ReduceOp.SUM):
        return x


def measure_rank(
    positions: int,
    vocab_size: int,
    width: int,
    ranks: int,
    specification: dict[str, Any],
    repeats: int,
    device: str,
) -> dict[str, float]:
    """Seconds and bytes of the first rank's part of a training step, in this process."""
    torch.manual_seed(0)
    rows, own_labels = -(-vocab_size // ranks), -(-positions // ranks)
    drawn = torch.randn(rows, width, device=device).mul_(LOGIT_SPREAD / width**0.5)
    weight = torch.nn.Parameter(drawn)
    hidden = torch.nn.Parameter(torch.randn(positions, width, device=device))
    labels = torch.full((positions,), vocab_size - 1)  # the last rank's, but for
    labels[:own_labels] = zipf_labels(own_labels, rows, torch.Generator().manual_seed(0))
    labels = labels.to(device)

    def objective(rows: int) -> VocabParallel:
        shard = _OneOfMany(rows * ranks, slice(0, rows), None)
        return VocabParallel(objectives.get(**specification), shard)

    def step() -> None:
        loss(hidden, weight, labels).backward()

    def drop() -> None:
        hidden.grad = weight.grad = None

    objective(64)(hidden[:64], weight[:64], labels[:64] % 64).backward()  # sets up libraries
    drop()
    loss = objective(rows)
    step()
    drop()
    read_peak = start_peak(device)
    step()
    extra = read_peak()
    drop()
    seconds = time_calls(step, device, repeats, between=drop)
    kept = tensor_bytes(loss.state)
    return {
        "own_seconds": statistics.median(seconds),
        "weight_bytes": weight.nbytes,
        "kept_bytes": kept,
        "extra_bytes": extra,
        "bytes": weight.nbytes + kept + extra,
    }


def _print_points(points: Sequence[dict[str, Any]]) -> None:
    """One line a point; "x" is over the first point of the same problem."""
    forms = {"ranks": ",", "vocab_size": ",", "positions": ",", "own_seconds": ".4f"}
    forms |= {"network_seconds": ".4f", "seconds": ".4f", "x_seconds": ".2f"}
    forms |= {"mib": ",.0f", "x_bytes": ".2f"}
    table, first = [], {}
    for point in points:
        problem = tuple(point[name] for name in ("method", "vocab_size", "positions"))
        start = first.setdefault(problem, point)
        shown = dict(point)
        for name in ("seconds", "bytes"):
            if name in point and name in start:
                shown[f"x_{name}"] = point[name] / start[name]
        if "bytes" in point:
            shown["mib"] = point["bytes"] / 2**20
        table.append([point["method"], *report.figures(shown, forms), point.get("error", "")])
    columns = ["", "ranks", "V", "N", "own s", "network s", "s / step", "x", "MiB", "x", "left out"]
    report.print_table("A rank of a head that is spread by rows", columns, table)


def _panels(points: Sequence[dict[str, Any]]) -> list[report.Panel]:
    panels = []
    for name, heading in (("seconds", "seconds a step"), ("bytes", "bytes of a rank")):
        series: dict[str, list[tuple[float, float, str]]] = {}
        for point in points:
            if name in point:
                label = f"{point['method']}, V={point['vocab_size']:,}, N={point['positions']:,}"
                series.setdefault(label, []).append((point["ranks"], point[name], ""))
        panels.append(report.Panel(heading, "ranks", heading, series))
    return panels
