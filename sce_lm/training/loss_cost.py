"""What a loss costs on hidden states of a trained model: seconds and memory, forward and backward.

Every method takes the same hidden states, weight and labels, in a process of its own:

    python -m sce_lm.training.loss_cost INPUTS.safetensors '{"name": "sce"}'

Seconds are the median of several forward and backward passes after a warm-up. Memory is the peak of
one pass over what the process held before it, inputs included: on the CPU the resident set as the
operating system counts it, on a GPU the allocator's figure. The gradient of the weight, which every
method must return, is part of it.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy

from sce_lm import objectives
from sce_lm.ops.logits import LogitTransform

STOCK = "stock"
"""Name of plain cross-entropy over logits that are kept, as transformers computes it."""


@dataclass(frozen=True)
class LossCost:
    """One method's cost, forward and backward together."""

    seconds: float
    """Median of a pass."""
    peak_mib: float
    """Peak memory of a pass over what was held before it, in MiB."""
    loss: float
    """The loss of the last pass, in nats."""


def measure(path: Path, method: dict[str, Any]) -> LossCost:
    """Run :func:`_measure_here` in a new process.

    Args:
        path: safetensors file with ``hidden_states [N, d]``, ``weight [V, d]``, ``labels [N]``,
            perhaps ``bias [V]``, and the metadata ``post``: a LogitTransform's fields as JSON.
        method: ``Objective.to_dict()``, or ``{"name": "stock"}``.
    """
    command = [sys.executable, "-m", "sce_lm.training.loss_cost", str(path), json.dumps(method)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring {method['name']!r} failed: {result.stderr.strip()[-2000:]}")
    return LossCost(**json.loads(result.stdout))


def _measure_here(path: Path, method: dict[str, Any], repeats: int = 7) -> LossCost:
    with safe_open(path, "pt") as file:
        inputs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        post = LogitTransform(**json.loads(file.metadata()["post"]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Clones, because a mapped file would be counted when it is first read.
    inputs = {name: tensor.clone().to(device) for name, tensor in inputs.items()}
    loss = _stock(post) if method["name"] == STOCK else _objective(method, post)
    small = {name: tensor[:64].clone() for name, tensor in inputs.items()}
    small["labels"].zero_()
    _one_pass(_stock(post), small)  # libraries set themselves up

    held, read_peak = _start_peak(device)
    value = _one_pass(loss, inputs)
    peak = read_peak() - held
    _one_pass(loss, inputs)
    seconds = []
    for _ in range(repeats):
        _synchronise(device)
        started = time.perf_counter()
        value = _one_pass(loss, inputs)
        _synchronise(device)
        seconds.append(time.perf_counter() - started)
    return LossCost(statistics.median(seconds), peak / 2**20, value)


def _one_pass(loss: Callable, inputs: dict[str, torch.Tensor]) -> float:
    fresh = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    value = loss(**fresh)
    value.backward()
    return value.item()


def _stock(post: LogitTransform) -> Callable:
    def loss(hidden_states, weight, labels, bias=None):
        logits = torch.nn.functional.linear(hidden_states, weight, bias)
        return cross_entropy(post(logits).float(), labels)

    return loss


def _objective(method: dict[str, Any], post: LogitTransform) -> Callable:
    objective = objectives.get(**method)

    def loss(hidden_states, weight, labels, bias=None):
        return objective(hidden_states, weight, labels, bias=bias, post=post)

    return loss


def _start_peak(device: str) -> tuple[int, Callable[[], int]]:
    """Bytes held now, and a function that gives the peak since now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    # Resets VmHWM. Where a sandbox forbids it the peak is that since the process began, which
    # can only be larger.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS"), lambda: _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; measure on Linux or on a GPU.")


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one loss on saved inputs.")
    parser.add_argument("inputs", type=Path, help="safetensors file, see measure")
    parser.add_argument("method", type=json.loads, help="JSON: name and options of the objective")
    arguments = parser.parse_args()
    print(json.dumps(asdict(_measure_here(arguments.inputs, arguments.method))))


if __name__ == "__main__":
    main()
