"""Rows of a table: every method measured in processes of its own.

A method that is missing or fails is a row that says so, and never ends the run. Where the logits of
stock cross-entropy do not fit into memory, it is measured on half of the positions, or on half of
those, and its seconds are multiplied accordingly: its work is proportional to the positions. The
row then has no peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sce_lm import objectives
from sce_lm.benchmarks.floor import measure_floor
from sce_lm.benchmarks.methods import Method
from sce_lm.benchmarks.peers import PEERS
from sce_lm.benchmarks.problem import Problem
from sce_lm.benchmarks.quality import quality_of, write_reference
from sce_lm.benchmarks.report import progress
from sce_lm.candidates.state import SCEState
from sce_lm.objectives import Objective
from sce_lm.ops.logits import LogitTransform
from sce_lm.training.loss_cost import STOCK, Loss, cost_of, load_inputs, loss_of, warm_up
from sce_lm.training.measure import in_process

Row = dict[str, Any]
"""The fields of a Method, and "skipped", why; or "trainable" and "frozen", each the fields of
LossCost with speedup (over stock), over_floor and "floor", and "quality". What failed holds
"error", why, instead. "positions" are those that were measured."""


@dataclass(frozen=True)
class Settings:
    """How each method is measured."""

    repeats: int
    """Passes whose median is taken."""
    budget: float
    """Seconds after which no pass is repeated."""
    draws: int
    """Choices of candidates over which quality is averaged."""
    device: str


def measure_rows(
    problem: Problem,
    folder: Path,
    methods: Sequence[Method],
    settings: Settings,
    *,
    heads: Sequence[str],
    floors: bool,
) -> list[Row]:
    """A row for each method.

    Args:
        folder: the problem's; the reference goes there too.
        heads: "trainable", whose rows have quality too, "frozen", or both.
        floors: whether to measure each method's least time.
    """
    progress(f"{problem}\nexact reference")
    in_process(write_reference, folder=str(folder), device=settings.device)
    rows = []
    for number, method in enumerate(methods, start=1):
        progress(f"{number}/{len(methods)} {method.label}")
        row: Row = asdict(method) | {"positions": problem.positions}
        rows.append(row)
        name = method.specification["name"]
        peer = PEERS.get(name)
        if peer is not None:
            vocab_size, device = problem.vocab_size, settings.device
            reason = peer.unavailable(row["positions"] * vocab_size, device)
            while reason is not None and name == STOCK and row["positions"] > 1:
                row["positions"] //= 2
                reason = peer.unavailable(row["positions"] * vocab_size, device)
            if reason is not None:
                row["skipped"] = reason
                progress(f"    skipped: {reason}")
                continue
            row["version"] = peer.version
        for head in heads:
            row[head] = or_error(
                measure_method,
                folder=str(folder),
                specification=method.specification,
                trainable=head == "trainable",
                settings=asdict(settings),
                positions=row["positions"],
                floor=floors,
            )
        row["quality"] = row.get("trainable", {}).pop("quality", {})
    _add_ratios(rows)
    return rows


def or_error(function: Any, **arguments: Any) -> dict[str, Any]:
    """The function's result in a process of its own, or ``{"error": why}``."""
    try:
        return in_process(function, **arguments)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        progress(f"    failed: {reason}")
        return {"error": reason}


def _add_ratios(rows: Sequence[Row]) -> None:
    stock: Row = next((row for row in rows if row["name"] == "stock"), {})
    for row in rows:
        for head in ("trainable", "frozen"):
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
    floor: bool,
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
    warm_up(lambda: _build(specification, post, how.device)[0], inputs)
    loss, objective = _build(specification, post, how.device)
    state = Path(folder) / "state.safetensors"
    if objective is not None and isinstance(objective.state, SCEState) and state.exists():
        objective.state.load(state)
    cost = cost_of(loss, inputs, trainable=trainable, repeats=how.repeats, budget=how.budget)
    result: dict[str, Any] = asdict(cost)
    if share > 1:
        result = {name: result[name] * share for name in ("seconds", "forward_seconds")}
    weight = inputs["weight"]
    if floor:
        counts = load_file(state)["counts"] if state.exists() else torch.zeros(len(weight))
        result["floor"] = measure_floor(
            specification, labels.cpu(), weight, counts, trainable=trainable
        )
    if trainable and share == 1:
        draws = how.draws if objective is not None and objective.state is not None else 1
        reference = Path(folder) / "reference.safetensors"
        result["quality"] = quality_of(loss, objective, inputs, post, reference, draws)
    return result


def _build(
    specification: dict[str, Any], post: LogitTransform, device: str
) -> tuple[Loss, Objective | None]:
    """A new loss, and the objective behind it if it is one of ours."""
    if specification["name"] in PEERS:
        return PEERS[specification["name"]].build(post, device), None
    objective = objectives.get(**specification)
    return loss_of(objective, post), objective
