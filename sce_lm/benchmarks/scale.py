"""Time and memory of a training step as the catalogue and the batch grow.

SCE with row-sparse gradients of the weight against the exact loss, on drawn data; each line is a
process of its own. A step is a forward and backward pass. Between steps, outside the time, plain
SGD changes the rows that have a gradient, so that what a loss derives from the weight does not stay
valid for free; SGD's own time, in which SCE corrects the sum of W's rows, is shown beside a step's.
Extra is a step's peak memory over what is held between steps. W is held, and so is what the loss
keeps (counts, sampler): its tensors in bytes an item, and all of it in MiB as the system counts it.
The exact loss is left out where its gradients do not fit, or where a step would take longer than
--budget, by the step before.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sce_lm import objectives
from sce_lm.benchmarks import report
from sce_lm.benchmarks.methods import TAIL_ONLY
from sce_lm.benchmarks.peers import free_memory
from sce_lm.benchmarks.problem import LOGIT_SPREAD, zipf_labels
from sce_lm.benchmarks.rows import or_error
from sce_lm.objectives import SCE
from sce_lm.training.measure import held_bytes, start_peak, time_calls

WARM_UP = 3
"""Steps before the first that is measured."""
EXACT_GRADIENTS = 4
"""Tables of the size of W that the exact loss and its optimiser step hold, W among them."""
VOCABULARIES = [1000 * v for v in (50, 100, 200, 500, 1000, 2000, 5000, 10_000)]
POSITIONS = [1024, 2048, 4096, 8192, 16_384]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--dim", type=int, default=64, help="width d")
    parser.add_argument("--tokens", type=int, default=4096, help="positions N while V grows")
    parser.add_argument("--vocab", type=int, default=1_000_000, help="classes V while N grows")
    parser.add_argument("--vocabs", type=int, nargs="*", default=VOCABULARIES, help="V, ascending")
    parser.add_argument(
        "--token-counts", type=int, nargs="*", default=POSITIONS, help="N, ascending"
    )
    parser.add_argument("--candidates", type=int, default=2048, help="tail candidates of SCE")
    parser.add_argument("--repeats", type=int, default=7, help="steps whose median is taken")
    parser.add_argument("--budget", type=float, default=60.0, help="most seconds of an exact step")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    grids = {
        "V": [(arguments.tokens, v) for v in arguments.vocabs],
        "N": [(n, arguments.vocab) for n in arguments.token_counts],
    }
    tail = {**TAIL_ONLY, "tail_candidates": arguments.candidates, "sparse_grad": True}
    points = [
        point
        for grid, sizes in grids.items()
        for specification in (tail, {"name": "exact"})
        for point in _line(grid, sizes, specification, arguments)
    ]
    described = report.machine(arguments.device)
    result = {"command": "scale", "machine": described, "width": arguments.dim, "points": points}
    report.write_json(arguments.json, result)
    report.print_heading(
        described,
        f"Random data, width {arguments.dim}, float32; SCE with a tail of {arguments.candidates} "
        "candidates and sparse_grad",
    )
    _print_points(points)
    report.draw(arguments.plot, _panels(points))


def _line(
    grid: str,
    sizes: Sequence[tuple[int, int]],
    specification: dict[str, Any],
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Points of one method; a point that is left out says why."""
    method, seconds_a_logit = specification["name"], 0.0
    for n, v in sizes:
        report.progress(f"{method}: {n:,} positions, {v:,} classes")
        point = {"grid": grid, "method": method, "positions": n, "vocab_size": v}
        needed = EXACT_GRADIENTS * 4 * v * arguments.dim if method == "exact" else 0
        expected = seconds_a_logit * n * v if method == "exact" else 0.0
        if needed > free_memory(arguments.device):
            point["error"] = f"needs {needed / 2**30:.0f} GiB"
        elif expected > arguments.budget:
            point["error"] = f"about {expected:.0f} s"
        else:
            point |= or_error(
                measure_point,
                positions=n,
                vocab_size=v,
                width=arguments.dim,
                specification=specification,
                repeats=arguments.repeats,
                budget=arguments.budget,
                device=arguments.device,
            )
            seconds_a_logit = point.get("seconds", 0.0) / (n * v)
        yield point


def measure_point(
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


def _print_points(points: Sequence[dict[str, Any]]) -> None:
    """One line a point; "x" is over the first point of its line."""
    forms = {"seconds": ".4f", "x_seconds": ".2f", "extra_mib": ",.1f", "x_extra_mib": ".2f"}
    forms = {"positions": ",", "vocab_size": ",", **forms, "update_seconds": ".4f"}
    forms |= {"table_mib": ",.0f", "state_bytes_an_item": ".1f", "kept_mib": ",.0f"}
    table, first = [], {}
    for point in points:
        start = first.setdefault((point["grid"], point["method"]), point)
        ratios = {
            f"x_{name}": point[name] / start[name]
            for name in ("seconds", "extra_mib")
            if name in point and start.get(name)
        }
        cells = report.figures(point | ratios, forms)
        table.append([f"{point['method']}, {point['grid']} grows", *cells, point.get("error", "")])
    columns = ["", "N", "V", "s / step", "x", "extra MiB", "x", "SGD s", "W MiB"]
    report.print_table(
        "A training step as V and N grow", [*columns, "state B/item", "kept MiB", "left out"], table
    )


def _panels(points: Sequence[dict[str, Any]]) -> list[report.Panel]:
    panels = []
    for grid, size in (("V", "vocab_size"), ("N", "positions")):
        for name, heading in (("seconds", "seconds a step"), ("extra_mib", "extra MiB a step")):
            series: dict[str, list[tuple[float, float, str]]] = {}
            for point in points:
                if point["grid"] == grid and name in point:
                    line = series.setdefault(point["method"], [])
                    line.append((point[size], point[name], ""))
            panels.append(report.Panel(f"{heading} as {grid} grows", grid, heading, series))
    return panels
