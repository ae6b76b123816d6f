"""Time and memory of a model's whole training step: forward, backward and optimiser.

The stock model against the same model with our losses, on the same rows of text; each line is a
process of its own. "s / step" is the median over steps, after one that is not counted, and "in the
loss" what our losses took of it. Held is what lies in memory between steps, the parameters and
AdamW's moments, and peak what a step needs over that. With --lora the model is frozen and
has LoRA adapters on all linear layers.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from sce_lm import objectives
from sce_lm.benchmarks import report
from sce_lm.benchmarks.methods import DEFAULT_STRATA, Method, choose
from sce_lm.benchmarks.peers import PEERS
from sce_lm.benchmarks.rows import or_error
from sce_lm.training.loss_cost import STOCK
from sce_lm.training.measure import held_bytes, start_peak, time_calls

METHODS = [
    Method(STOCK, "stock", {"name": STOCK}),
    Method("exact", "exact (ours)", {"name": "exact"}),
    Method("published", "published SCE", {"name": "sce", "published": True}),
    Method("corrected", "corrected SCE", DEFAULT_STRATA),
]
LEARNING_RATE = 1e-6
"""Small enough that a few steps on few rows leave the model what it is."""
MIB = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument(
        "--model", type=Path, metavar="DIR", required=True, help="a folder of transformers"
    )
    parser.add_argument("--gguf", metavar="NAME", help="GGUF file in that folder with the model")
    parser.add_argument("--text", type=Path, help="text for the model; default: the embedded text")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step, about")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--lora", type=int, default=0, metavar="R", help="rank; 0: train it all")
    parser.add_argument("--methods", metavar="A,B", help="rows to measure, by name; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="steps whose median is taken")
    parser.add_argument(
        "--budget", type=float, default=120.0, help="seconds after which no step is repeated"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for."""
    rows = []
    for method in choose(METHODS, arguments.methods):
        report.progress(method.label)
        found = or_error(
            measure_step,
            model=str(arguments.model),
            gguf=arguments.gguf,
            text=None if arguments.text is None else str(arguments.text),
            tokens=arguments.tokens,
            dtype=arguments.dtype,
            lora=arguments.lora,
            specification=method.specification,
            repeats=arguments.repeats,
            budget=arguments.budget,
            device=arguments.device,
        )
        rows.append({"name": method.name, "label": method.label} | found)
    seconds = {row["name"]: row["seconds"] for row in rows if "seconds" in row}
    for row in rows:
        if row["name"] in seconds and STOCK in seconds:
            row["speedup"] = seconds[STOCK] / row["seconds"]
    sizes = next((row for row in rows if "positions" in row), None)
    if sizes is None:
        raise ValueError(f"nothing could be measured; {rows[0]['label']}: {rows[0]['error']}")
    described = report.machine(arguments.device)
    report.write_json(arguments.json, {"command": "step", "machine": described, "rows": rows})
    trained = f"LoRA of rank {arguments.lora}" if arguments.lora else "all parameters trained"
    report.print_heading(
        described,
        f"{arguments.model.name}: {sizes['positions']:,} positions a step, vocabulary "
        f"{sizes['vocab_size']:,}, {sizes['parameters'] / 1e6:.0f}M parameters, "
        f"{arguments.dtype}, {trained}",
    )
    _print(rows)
    report.draw(arguments.plot, [_panel(rows)])


def measure_step(
    model: str,
    gguf: str | None,
    text: str | None,
    tokens: int,
    dtype: str,
    lora: int,
    specification: dict[str, Any],
    repeats: int,
    budget: float,
    device: str,
) -> dict[str, float]:
    """Seconds and memory of a training step, in this process."""
    # transformers and its friends take some seconds.
    from sce_lm.benchmarks.real import load_model, load_tokenizer, text_rows
    from sce_lm.training.models import add_lora

    torch.manual_seed(0)
    trained, tokenizer = load_model(Path(model), dtype, gguf), load_tokenizer(Path(model), gguf)
    blocks = text_rows(trained, tokenizer, None if text is None else Path(text))
    count = max(1, tokens // blocks.shape[1])
    if len(blocks) < count:
        raise ValueError(
            f"the text has {blocks.numel():,} tokens and {tokens:,} a step were asked for; give "
            "more text by --text, or fewer --tokens."
        )
    sizes = {
        "positions": count * (blocks.shape[1] - 1),
        "vocab_size": len(trained.get_output_embeddings().weight),
        "parameters": trained.num_parameters(),
    }
    if lora:
        trained = add_lora(trained, lora)
    batches = blocks.split(count)[: len(blocks) // count]
    return sizes | time_steps(trained, batches, specification, repeats, budget, device)


def time_steps(
    model: Any,
    batches: Sequence[torch.Tensor],
    specification: dict[str, Any],
    repeats: int,
    budget: float,
    device: str,
) -> dict[str, float]:
    """Seconds and memory of a training step of a model of transformers, in this process.

    Args:
        batches: token ids, ``[rows, length]`` each, taken in turn.
        specification: a :class:`~sce_lm.benchmarks.methods.Method`'s; a peer's leaves the model's
            own loss in place.
    """
    from sce_lm.hf.adapter import apply_sce, loss_seconds

    if specification["name"] not in PEERS:
        apply_sce(model, objectives.get(**specification))
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE
    )
    turns = cycle(batches)

    def step() -> None:
        rows = next(turns).to(device)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes AdamW's moments and sets up libraries
    held, in_loss = held_bytes(device), loss_seconds(model)
    read_peak = start_peak(device)
    seconds = time_calls(step, device, repeats, budget=budget)
    peak = read_peak()
    return {
        "seconds": statistics.median(seconds),
        "loss_seconds": (loss_seconds(model) - in_loss) / len(seconds),
        "held_mib": held / MIB,
        "peak_mib": peak / MIB,
    }


def _print(rows: Sequence[dict[str, Any]]) -> None:
    forms = {"seconds": ".2f", "speedup": ".2f", "loss_seconds": ".2f"}
    forms |= {"held_mib": ",.0f", "peak_mib": ",.0f"}
    report.print_table(
        "A training step (x stock: times faster than stock)",
        ["method", "s / step", "x stock", "in the loss", "held MiB", "peak MiB", "failed"],
        [[row["label"], *report.figures(row, forms), row.get("error", "")] for row in rows],
    )


def _panel(rows: Sequence[dict[str, Any]]) -> report.Panel:
    """Memory against time."""
    series = {
        row["label"]: [(row["seconds"], row["peak_mib"], row["label"])]
        for row in rows
        if "seconds" in row
    }
    return report.Panel("A training step", "seconds", "peak MiB", series)
