"""Methods side by side on one problem, each measured in processes of its own.

A method that is missing or fails is a row that says so, and never ends the run. Where the logits of
stock cross-entropy do not fit into memory, it is measured on half of the positions, or on half of
those, and its seconds are multiplied accordingly: its work is proportional to the positions. The
row then has no peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sce_lm.benchmarks.floor import measure_floor
from sce_lm.benchmarks.loss_cost import cost_of, load_inputs, warm_up
from sce_lm.benchmarks.methods import Method, build
from sce_lm.benchmarks.peers import STOCK
from sce_lm.benchmarks.problem import Problem
from sce_lm.benchmarks.quality import quality_of
from sce_lm.benchmarks.report import progress
from sce_lm.candidates.state import SCEState
from sce_lm.training.measure import in_process

HEADS = ("trainable", "frozen")


@dataclass(frozen=True)
class Settings:
    """How each method is measured."""

    device: str
    repeats: int = 7
    """Passes whose median is taken."""
    budget: float = math.inf
    """Seconds after which no pass is repeated."""
    draws: int = 1
    """Choices of candidates over which quality is averaged."""
    heads: tuple[str, ...] = HEADS
    """Of ``HEADS``; "trainable" has quality too."""
    floors: bool = True
    """Whether to measure each method's least time."""


def measure_methods(
    problem: Problem, folder: Path, methods: Sequence[Method], settings: Settings
) -> list[dict[str, Any]]:
    """A row for each method: its fields, ``resolved``, and for each head the fields of ``LossCost``
    with ``speedup`` (over stock), ``floor`` and ``over_floor``. The quality is there if the
    problem's folder has a reference."""
    rows = []
    for number, method in enumerate(methods, start=1):
        progress(f"{number}/{len(methods)} {method.label}")
        row: dict[str, Any] = {**asdict(method), "notes": [], "positions": problem.positions}
        row["resolved"] = method.resolved(problem.positions, problem.vocab_size, problem.width)
        rows.append(row)
        if method.peer is not None:
            reason = _unavailable(method, row, problem.vocab_size, settings.device)
            if reason is not None:
                row["notes"].append(f"skipped; {reason}")
                continue
            row["version"] = method.peer.version
        for head in settings.heads:
            row[head] = measured_apart(
                row,
                measure_method,
                folder=str(folder),
                specification=method.specification,
                trainable=head == "trainable",
                settings=asdict(settings),
                positions=row["positions"],
            )
            floor = row[head].get("floor")
            if floor and method.peer is None:
                shares = {name: took / floor["seconds"] for name, took in floor["terms"].items()}
                parts = " + ".join(f"{name} {share:.0%}" for name, share in shares.items())
                row["notes"].append(f"{head}, floor = {parts}")
        row["quality"] = row.get("trainable", {}).pop("quality", {})
    _add_ratios(rows)
    return rows


def _unavailable(method: Method, row: dict[str, Any], vocab_size: int, device: str) -> str | None:
    """Why a peer cannot run; stock on as many positions as fit."""
    peer, positions = method.peer, row["positions"]
    assert peer is not None
    reason = peer.unavailable(row["positions"] * vocab_size, device)
    while reason is not None and method.name == STOCK and row["positions"] > 1:
        row["positions"] //= 2
        reason = peer.unavailable(row["positions"] * vocab_size, device)
    if reason is None and row["positions"] < positions:
        row["notes"].append(
            f"measured on {row['positions']:,} positions, as many as fit, and seconds multiplied "
            f"by {positions / row['positions']:g}"
        )
    return reason


def measured_apart(
    row: dict[str, Any], function: Callable[..., Any], **arguments: Any
) -> dict[str, Any]:
    """The function's result in a process of its own; if it fails, nothing, and a note why."""
    try:
        return in_process(function, **arguments)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        progress(f"    failed: {reason}")
        row.setdefault("notes", []).append(f"failed; {reason}")
        return {}


def _add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    stock = next((row for row in rows if row["name"] == STOCK), {})
    for row in rows:
        for head in HEADS:
            cost = row.get(head, {})
            references = {
                "speedup": (stock.get(head, {}).get("seconds"), cost.get("seconds")),
                "over_floor": (cost.get("seconds"), cost.get("floor", {}).get("seconds")),
            }
            cost |= {name: a / b for name, (a, b) in references.items() if a and b}


def measure_method(
    folder: str,
    specification: dict[str, Any],
    trainable: bool,
    settings: dict[str, Any],
    positions: int,
) -> dict[str, Any]:
    """Cost, floor if asked for, and quality if the head is trainable, in this process.

    Of fewer ``positions`` than there are the seconds are scaled to all of them; peak memory, the
    loss and its quality, which are not proportional to positions, are left out.
    """
    how = Settings(**settings)
    torch.manual_seed(0)
    inputs, post = load_inputs(Path(folder) / "inputs.safetensors", how.device)
    labels, share = inputs["labels"], len(inputs["labels"]) / positions
    inputs |= {name: inputs[name][:positions] for name in ("hidden_states", "labels")}
    warm_up(lambda: build(specification, post, how.device)[0], inputs)
    loss, objective = build(specification, post, how.device)
    state = Path(folder) / "state.safetensors"
    if objective is not None and isinstance(objective.state, SCEState) and state.exists():
        objective.state.load(state)
    cost = cost_of(loss, inputs, trainable=trainable, repeats=how.repeats, budget=how.budget)
    result: dict[str, Any] = asdict(cost)
    if share > 1:
        result = {name: result[name] * share for name in ("seconds", "forward_seconds")}
    weight = inputs["weight"]
    if how.floors:
        counts = load_file(state)["counts"] if state.exists() else torch.zeros(len(weight))
        result["floor"] = measure_floor(
            specification, labels.cpu(), weight, counts, trainable=trainable
        )
    reference = Path(folder) / "reference.safetensors"
    if trainable and share == 1 and reference.exists():
        draws = how.draws if objective is not None and objective.state is not None else 1
        result["quality"] = quality_of(loss, objective, inputs, post, reference, draws)
    return result
