"""Time and memory of what trainers read off logits, on real logits and on lazy ones.

What is asked: log-probabilities of given tokens, with their gradient, as DPO and KTO take them;
log-probabilities and entropies without gradient, and with it, as GRPO takes them; the best classes,
for metrics; and GKD's divergence from a teacher (a head of the same size). Real and lazy logits are
given to the very functions of TRL. TRL's chunked kernel, Cut Cross-Entropy and Liger take hidden
states, and answer what they can. Every task of a method is measured in a process of its own, and
the methods take turns: a ratio is the median of those within a turn. On a CPU seconds are those of
the processor, over all threads, which other work on the machine disturbs least. Peak is memory over
hidden states and weight, gradients included.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sce_lm.benchmarks import report, results
from sce_lm.benchmarks.report import METHOD, Column, Plot, Table
from sce_lm.benchmarks.side_by_side import measured_apart
from sce_lm.config import SCEConfig
from sce_lm.distillation import HeadScores, distillation_loss
from sce_lm.hf.lazy_logits import LazyLogits
from sce_lm.training.measure import start_peak, time_calls

ROWS = 4
"""Sequences in the batch, over which TRL loops."""

STOCK = "stock"


@dataclass(frozen=True)
class Inputs:
    """One problem."""

    hidden_states: torch.Tensor
    """``[rows, T, d]``."""
    head: nn.Linear
    labels: torch.Tensor
    """``[rows, T]``."""
    teacher_hidden_states: torch.Tensor
    teacher_head: nn.Linear


Logits = Callable[[nn.Linear, torch.Tensor], torch.Tensor]
"""Of a head and hidden states."""

Answer = Callable[[Inputs], torch.Tensor]
"""A number whose gradient a task may want."""


def _log_probs(logits: Logits, inputs: Inputs) -> torch.Tensor:
    trl = importlib.import_module("trl.trainer.utils")
    found = logits(inputs.head, inputs.hidden_states)
    return -trl.selective_log_softmax(found, inputs.labels).mean()


def _log_probs_and_entropy(logits: Logits, inputs: Inputs) -> torch.Tensor:
    trl = importlib.import_module("trl.trainer.utils")
    found = logits(inputs.head, inputs.hidden_states)
    log_probs = trl.selective_log_softmax(found, inputs.labels)
    return (0.1 * trl.entropy_from_logits(found) - log_probs).mean()


def _best(logits: Logits, inputs: Inputs) -> torch.Tensor:
    found = logits(inputs.head, inputs.hidden_states).argmax(-1)
    return (found == inputs.labels).float().mean()


def _divergence(inputs: Inputs) -> torch.Tensor:
    gkd = importlib.import_module("trl.experimental.gkd.gkd_trainer")
    ours = inputs.head(inputs.hidden_states)
    with torch.no_grad():
        theirs = inputs.teacher_head(inputs.teacher_hidden_states)
    return gkd.GKDTrainer.generalized_jsd_loss(
        ours, theirs, inputs.labels, num_items_in_batch=inputs.labels.numel()
    )


def _streamed_divergence(objective: Any, inputs: Inputs) -> torch.Tensor:
    student = HeadScores(inputs.hidden_states, inputs.head.weight)
    teacher = HeadScores(inputs.teacher_hidden_states, inputs.teacher_head.weight)
    return distillation_loss(student, teacher, inputs.labels, divergence="jsd", objective=objective)


def _trl_chunked(outputs: tuple[str, ...], inputs: Inputs) -> torch.Tensor:
    kernels = importlib.import_module("trl.kernels")
    classes_a_chunk = 32768  # as in trl.trainer.utils.add_fused_lm_head
    hidden = inputs.hidden_states.flatten(0, 1)
    found = kernels.ChunkedLogProbFunction.apply(
        *(hidden, inputs.head.weight, None, inputs.labels.flatten(), 1.0, classes_a_chunk),
        *(None, 1.0, outputs),
    )
    log_probs = found[0]
    return (0.1 * found[1] - log_probs).mean() if outputs else -log_probs.mean()


def _cut(inputs: Inputs) -> torch.Tensor:
    cut_cross_entropy = importlib.import_module("cut_cross_entropy")
    hidden = inputs.hidden_states.flatten(0, 1)
    implementation = "cce" if hidden.is_cuda else "torch_compile"
    return cut_cross_entropy.linear_cross_entropy(
        hidden, inputs.head.weight, inputs.labels.flatten(), reduction="none", impl=implementation
    ).mean()


def _liger(inputs: Inputs) -> torch.Tensor:
    liger = importlib.import_module("liger_kernel.transformers")
    fused = liger.LigerFusedLinearCrossEntropyLoss()
    hidden = inputs.hidden_states.flatten(0, 1)
    return fused(inputs.head.weight, hidden, inputs.labels.flatten())


def _formed(head: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    return head(hidden_states)


TASKS = {
    "log_probs": "log-probabilities, forward and backward",
    "log_probs_frozen": "the same, frozen head",
    "forward": "log-probabilities and entropies, forward",
    "entropy": "log-probabilities and entropies, forward and backward",
    "best": "best classes",
    "distillation": "Jensen-Shannon divergence from a teacher, forward and backward",
}
"""By the name in a row."""

WITHOUT_GRADIENT = ("forward", "best")


@dataclass(frozen=True)
class Method:
    """One way to answer."""

    label: str
    answers: dict[str, Answer]
    """By task; what is not there it cannot answer."""
    module: str | None = None
    """What it needs; None: torch and TRL alone."""
    package: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")

    def unavailable(self, device: str) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"not installed: pip install {self.package}"
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        return None


def _of_logits(logits: Logits, wrap: Callable[[Answer], Answer] = lambda f: f) -> dict[str, Answer]:
    both = wrap(partial(_log_probs_and_entropy, logits))
    one = wrap(partial(_log_probs, logits))
    best = wrap(partial(_best, logits))
    return {
        "log_probs": one,
        "log_probs_frozen": one,
        "forward": both,
        "entropy": both,
        "best": best,
    }


def _compiled(answer: Answer) -> Answer:
    return lambda inputs: torch.compile(answer)(inputs)


METHODS = {
    STOCK: Method("stock", {**_of_logits(_formed), "distillation": _divergence}),
    "compile": Method(
        "torch.compile of stock",
        {**_of_logits(_formed, _compiled), "distillation": _compiled(_divergence)},
    ),
    "lazy": Method(
        "lazy logits (ours)",
        {
            **_of_logits(LazyLogits.from_head),
            "distillation": partial(_streamed_divergence, "exact"),
        },
    ),
    "sampled": Method(
        "SCE (default), sampled", {"distillation": partial(_streamed_divergence, SCEConfig())}
    ),
    "trl": Method(
        "TRL, chunked",
        {
            "log_probs": partial(_trl_chunked, ()),
            "log_probs_frozen": partial(_trl_chunked, ()),
            "forward": partial(_trl_chunked, ("entropy",)),
            "entropy": partial(_trl_chunked, ("entropy",)),
        },
    ),
    "cce": Method(
        "Cut Cross-Entropy",
        {"log_probs": _cut, "log_probs_frozen": _cut},
        "cut_cross_entropy",
        "cut-cross-entropy",
    ),
    "liger": Method(
        "Liger",
        {"log_probs": _liger, "log_probs_frozen": _liger},
        "liger_kernel",
        "liger-kernel",
        devices=("cuda",),
    ),
}
"""By the name on the command line."""


def _columns(task: str) -> tuple[Column, ...]:
    return (
        Column("s", f"{task}.seconds", ".2f"),
        Column("x stock", f"{task}.speedup", ".2f", "times as fast as stock"),
        Column("peak MiB", f"{task}.peak_mib", ",.0f"),
        Column("of stock's", f"{task}.memory_share", ".3f", "share of the peak of stock"),
    )


TABLES = tuple(
    Table(title[0].upper() + title[1:], (METHOD, *_columns(task))) for task, title in TASKS.items()
)
PLOTS: tuple[Plot, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--tokens", type=int, default=2048, help="positions, in 4 sequences")
    parser.add_argument("--vocab", type=int, default=262_144, help="classes V")
    parser.add_argument("--dim", type=int, default=640, help="width d of both models")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--turns", type=int, default=3, help="of the methods, one after the other")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])


def measure(arguments: argparse.Namespace) -> Sequence[results.Comparison]:
    """One comparison, a row for each method."""
    if importlib.util.find_spec("trl") is None:
        raise ValueError("benchmark reductions measures TRL's functions: pip install trl.")
    if arguments.tokens < ROWS or min(arguments.turns, arguments.dim) < 1 or arguments.vocab < 2:
        raise ValueError(f"give at least {ROWS} tokens, 2 classes, 1 turn and a width of 1.")
    sizes = {
        "positions": arguments.tokens // ROWS * ROWS,
        "vocab_size": arguments.vocab,
        "width": arguments.dim,
        "dtype": arguments.dtype,
    }
    rows: dict[str, dict[str, Any]] = {}
    for name in arguments.methods:
        method = METHODS[name]
        rows[name] = {"label": method.label, "notes": []}
        reason = method.unavailable(arguments.device)
        if reason is not None:
            rows[name]["notes"].append(f"skipped; {reason}")
    for task in arguments.tasks:
        able = [n for n in rows if task in METHODS[n].answers and not rows[n]["notes"]]
        for turn in range(arguments.turns):
            for name in able:
                report.progress(f"{task}, turn {turn + 1}/{arguments.turns}: {METHODS[name].label}")
                row = rows[name]
                cost = measured_apart(
                    row, measure_task, name=name, task=task, sizes=sizes, device=arguments.device
                )
                for figure, value in cost.items():
                    row.setdefault(task, {}).setdefault(figure, []).append(value)
        _summarise([rows[name] for name in able], task)
    title = "Random data: {positions:,} positions in 4 sequences, vocabulary {vocab_size:,}, "
    title += "width {width}, {dtype}"
    return [results.Comparison(title.format(**sizes), sizes, list(rows.values()))]


def _summarise(rows: Sequence[dict[str, Any]], task: str) -> None:
    """Medians of the turns, and of the ratios to stock within each."""
    stock = next((row.get(task, {}) for row in rows if row["label"] == METHODS[STOCK].label), {})
    found = []
    for row in rows:
        turns = row.get(task, {})
        figures = {name: statistics.median(values) for name, values in turns.items()}
        ratios = {
            "speedup": [a / b for a, b in zip(stock.get("seconds", ()), turns.get("seconds", ()))],
            "memory_share": [
                b / a for a, b in zip(stock.get("peak_mib", ()), turns.get("peak_mib", ()))
            ],
        }
        figures |= {name: statistics.median(values) for name, values in ratios.items() if values}
        found.append((row, figures))
    for row, figures in found:
        row[task] = figures


def measure_task(name: str, task: str, sizes: dict[str, Any], device: str) -> dict[str, float]:
    """Seconds, peak and the value of one pass in this process, after tiny ones that set libraries
    up."""
    answer = METHODS[name].answers[task]
    for vocab_size in (64, 96):
        _one_pass(
            answer, task, _inputs(sizes | {"positions": 16, "vocab_size": vocab_size}, device)
        )
    inputs = _inputs(sizes, device)
    read_peak = start_peak(device)
    value = _one_pass(answer, task, inputs)
    peak = read_peak()
    started = time.process_time()
    (seconds,) = time_calls(lambda: _one_pass(answer, task, inputs), device, 1)
    seconds = seconds if device == "cuda" else time.process_time() - started
    return {"seconds": seconds, "peak_mib": peak / 2**20, "value": value}


def _inputs(sizes: dict[str, Any], device: str) -> Inputs:
    """The same in each process; logits have a standard deviation of 3."""
    draw, width = torch.Generator().manual_seed(0), sizes["width"]
    dtype = getattr(torch, sizes["dtype"])

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw) * scale).to(device, dtype)

    def head() -> nn.Linear:
        layer = nn.Linear(width, 1, bias=False, device=device, dtype=dtype)
        layer.weight = nn.Parameter(normal(sizes["vocab_size"], width, scale=3 / width**0.5))
        return layer

    shape = (ROWS, sizes["positions"] // ROWS)
    labels = torch.randint(sizes["vocab_size"], shape, generator=draw).to(device)
    return Inputs(normal(*shape, width), head(), labels, normal(*shape, width), head())


def _one_pass(answer: Answer, task: str, inputs: Inputs) -> float:
    """The value; gradients start from None and are taken off again."""
    weight = inputs.head.weight
    with torch.set_grad_enabled(task not in WITHOUT_GRADIENT):
        inputs.hidden_states.requires_grad_(task not in WITHOUT_GRADIENT)
        weight.requires_grad_(task not in WITHOUT_GRADIENT and task != "log_probs_frozen")
        value = answer(inputs)
        if value.requires_grad:
            value.backward()
    inputs.hidden_states.grad = weight.grad = None
    inputs.hidden_states.requires_grad_(False)
    return value.item()
