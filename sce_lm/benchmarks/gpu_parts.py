"""What :mod:`sce_lm.benchmarks.gpu` runs, each function in a process of its own.

Every one of them takes and returns JSON values and runs on a CPU too, at small sizes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sce_lm.benchmarks import methods, results
from sce_lm.benchmarks.floor import measure_floor
from sce_lm.benchmarks.loss_cost import Inputs, Loss, cost_of, warm_up
from sce_lm.benchmarks.parts import Result
from sce_lm.benchmarks.problem import random_inputs
from sce_lm.benchmarks.step import time_steps
from sce_lm.candidates.state import SCEState
from sce_lm.objectives import SCE
from sce_lm.objectives.call import Call
from sce_lm.ops.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.exact_cross_entropy import exact_cross_entropy
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import Positions

ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("torch", "triton", "transformers", "safetensors", "numpy", "accelerate", "peft", "pytest"),
    *("hypothesis", "datasets", "polars", "rich", "psutil", "liger-kernel", "cut-cross-entropy"),
    *("quack-kernels", "trl"),
)
POST = LogitTransform()
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3-270m": (
        "gemma3_text",
        {
            **{"vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2048},
            **{"num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1},
            **{"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512},
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            **{"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072},
            **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
            **{"head_dim": 128, "tie_word_embeddings": True},
        },
    ),
}
"""Model type and sizes, as published; the weights are random."""


def environment(device: str) -> Result:
    """What is installed and what the machine is; on a GPU one kernel is compiled and checked."""
    found: Result = {"machine": results.machine(device), "versions": {}, "missing": []}
    for package in PACKAGES:
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["missing"].append(package)
    tools = ("nvidia-smi", "gcc", "cc", "compute-sanitizer", "ncu")
    found["tools"] = {tool: shutil.which(tool) for tool in tools}
    found["free_gib"] = shutil.disk_usage(ROOT).free / 2**30
    if found["tools"]["nvidia-smi"]:
        fields = "name,driver_version,clocks.max.sm,clocks.sm,power.limit,memory.total"
        shown = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"],
            capture_output=True,
            text=True,
            check=False,
        )
        found["nvidia_smi"] = shown.stdout.splitlines()
    if device == "cuda":
        from sce_lm.ops.triton.configurations import architecture_of
        from sce_lm.ops.triton.row_dot import row_dot

        h = torch.randn(100, 64, device="cuda")
        index = torch.randperm(100, device="cuda")
        started = time.perf_counter()
        difference = (row_dot(h, h, index) - (h * h[index]).sum(dim=1)).abs().max()
        found["kernel_error"] = float(difference)
        found["kernel_seconds"] = time.perf_counter() - started
        found["configurations"] = getattr(architecture_of(h.device), "name", None)
    return found


def tests(selection: list[str]) -> Result:
    """The tests marked gpu, from the checkout. ``selection``: further arguments of pytest."""
    for module in ("pytest", "hypothesis"):
        if importlib.util.find_spec(module) is None:
            return {"skipped": f"{module} is not installed"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    with subprocess.Popen(
        [*command, "tests/ops/triton/test_gpu.py", *selection],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:  # on to the log, where they are if time runs out
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    result: Result = {"summary": lines[-1].strip("= ") if lines else ""}
    if process.returncode:
        result["failed"] = result["summary"]
        result["failures"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return result


def correctness(sizes: tuple[int, int, int], dtype: str, device: str) -> Result:
    """Losses and gradients against the same numbers in float64: exact cross-entropy, and SCE
    on the candidates that it chooses. Beside them the error of plain cross-entropy, computed in
    ``dtype``. An error is the largest difference over the largest value."""
    inputs, past = _inputs(sizes, dtype, device)
    low = {k: t.requires_grad_() if t.is_floating_point() else t for k, t in inputs.items()}
    double = {k: _double(t) for k, t in low.items()}
    state = SCEState()
    state.begin_call(past, sizes[1], seed=0)
    head, positions = _head_and_positions(low)
    call = Call().begin(state, positions.labels, sizes[1], torch.Generator().manual_seed(1))
    candidates = SCE(state=state).choose(head, positions, call).candidates

    def exact(backend, x):
        return exact_cross_entropy(*_head_and_positions(x), backend=backend).loss

    def chosen(backend, x):
        return candidate_cross_entropy(*_head_and_positions(x), candidates, backend=backend).loss

    def stock(backend, x):
        logits = x["hidden_states"] @ x["weight"].T
        return torch.nn.functional.cross_entropy(logits.float(), x["labels"], reduction="none")

    errors = {}
    bound = 4 * torch.finfo(getattr(torch, dtype)).eps + 1e-5
    for name, loss, reference in (
        ("exact (ours)", exact, exact),
        ("SCE (default)", chosen, chosen),
        ("stock", stock, exact),
    ):
        wanted = _with_gradients(reference, "torch", double)
        found = _with_gradients(loss, "auto", low)
        errors[name] = {
            key: float((found[key].double() - wanted[key]).abs().max() / wanted[key].abs().max())
            for key in wanted
        }
    result: Result = {"sizes": sizes, "dtype": dtype, "errors": errors, "bound": bound}
    worst = max(max(errors[name].values()) for name in ("exact (ours)", "SCE (default)"))
    if not worst < bound:
        result["failed"] = f"an error of {worst:.2e} is more than {bound:.2e}"
    return result


def _head_and_positions(x: Inputs) -> tuple[Head, Positions]:
    return Head(x["weight"]), Positions(x["hidden_states"], x["labels"])


def _double(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_()


def _with_gradients(loss: Callable, backend: str, x: Inputs) -> dict[str, torch.Tensor]:
    losses = loss(backend, x)
    leaves = [x["hidden_states"], x["weight"]]
    found = torch.autograd.grad(losses.mean(), leaves)
    return {"loss": losses.detach(), "hidden": found[0], "weight": found[1]}


def loss_cost(
    method: str,
    sizes: tuple[int, int, int],
    dtype: str,
    device: str,
    repeats: int,
) -> Result:
    """One method on one shape, trainable head: seconds, peak memory, the host alone, the floor."""
    n, v, width = sizes
    found = methods.methods(vocab_size=v)[method]
    peer, specification = found.peer, found.specification
    reason = peer.unavailable(n * v, device) if peer else None
    if reason is not None:
        return {"skipped": reason}
    inputs, past = _inputs(sizes, dtype, device)
    if method != "compile":  # it would be compiled for the small shapes too
        warm_up(lambda: methods.build(specification, POST, device)[0], inputs)
    loss = _loss(found, device, past, v)
    cost = cost_of(loss, inputs, repeats=repeats, budget=10.0)
    host = _host_seconds(loss, inputs, device, repeats)
    result: Result = asdict(cost) | {"sizes": sizes, "dtype": dtype, "host_seconds": host}
    result |= asdict(found) | {
        "positions": n,
        "vocab_size": v,
        "resolved": found.resolved(n, v, width),
    }
    result |= {"version": peer.version} if peer else {}
    counts = torch.bincount(past, minlength=v)
    floor = measure_floor(specification, inputs["labels"], inputs["weight"], counts, trainable=True)
    return result | (
        {"floor": floor, "over_floor": cost.seconds / floor["seconds"]} if floor else {}
    )


def _inputs(sizes: tuple[int, int, int], dtype: str, device: str) -> tuple[Inputs, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return random_inputs(*sizes, getattr(torch, dtype), generator)


def _loss(method: methods.Method, device: str, past: torch.Tensor, classes: int) -> Loss:
    """A new loss; an objective's state has counted the labels of the past."""
    loss, objective = methods.build(method.specification, POST, device)
    if objective is not None and isinstance(objective.state, SCEState):
        objective.state.begin_call(past, classes, seed=0)
    return loss


def _host_seconds(loss: Loss, inputs: Inputs, device: str, repeats: int) -> float:
    """Median until a forward and backward pass is queued; on a CPU, until it is done."""
    leaves = [inputs[name].requires_grad_() for name in ("hidden_states", "weight")]
    seconds = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss(**inputs).backward()
        seconds.append(time.perf_counter() - started)
        for leaf in leaves:
            leaf.grad = None
    return statistics.median(seconds)


def training_step(
    model: str,
    smaller: dict[str, int],
    method: str,
    batch: tuple[int, int],
    dtype: str,
    device: str,
    repeats: int,
) -> Result:
    """A whole training step of a model with random weights.

    Args:
        model: of ``MODELS``.
        smaller: sizes instead of its own.
        batch: rows and their length.
    """
    if importlib.util.find_spec("transformers") is None:
        return {"skipped": "transformers is not installed"}
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    kind, sizes = MODELS[model]
    config = AutoConfig.for_model(kind, **(sizes | smaller))
    trained = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    ids = torch.randint(config.vocab_size, (4 * batch[0], batch[1]))
    asked, positions = methods.methods()[method], batch[0] * (batch[1] - 1)
    found = time_steps(trained, ids.split(batch[0]), asked.specification, repeats, 10.0, device)
    size = {"model": model, "parameters": trained.num_parameters(), "positions": positions}
    return {
        **{**asdict(asked), **size, "vocab_size": config.vocab_size, "step": found},
        "resolved": asked.resolved(positions, config.vocab_size, config.hidden_size),
    }


def profiled(method: str, sizes: tuple[int, int, int], dtype: str, device: str) -> Result:
    """The kernels of one forward and backward pass by their time, and the host beside them."""
    inputs, past = _inputs(sizes, dtype, device)
    loss = _loss(methods.methods()[method], device, past, sizes[1])
    leaves = [inputs[name].requires_grad_() for name in ("hidden_states", "weight")]
    for _ in range(3):
        loss(**inputs).backward()
        for leaf in leaves:
            leaf.grad = None
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as found:
        started = time.perf_counter()
        loss(**inputs).backward()
        queued = time.perf_counter() - started
        if device == "cuda":
            torch.cuda.synchronize()
        done = time.perf_counter() - started
    on_gpu = device == "cuda"
    kernels = [e for e in found.key_averages() if (e.device_type.name == "CUDA") == on_gpu]
    launched = [
        {
            "kernel": e.key,
            "calls": e.count,
            "ms": 1e-3 * (e.self_device_time_total if on_gpu else e.self_cpu_time_total),
        }
        for e in kernels
    ]
    launched.sort(key=lambda kernel: -kernel["ms"])
    return {
        "sizes": sizes,
        "dtype": dtype,
        "wall_ms": 1e3 * done,
        "host_ms": 1e3 * queued,
        "device_ms": sum(kernel["ms"] for kernel in launched),
        "launches": sum(kernel["calls"] for kernel in launched),
        "kernels": launched[:40],
    }
