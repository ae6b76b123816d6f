"""Time and memory of a model's whole training step: forward, backward and optimiser.

The stock model against the same model with our losses, on the same text; each method is a process
of its own. "s / step" is the median over steps, after one that is not counted. With --lora the
model is frozen and has LoRA adapters on all linear layers. A peer stands for the stock model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from sce_lm import objectives
from sce_lm.benchmarks import methods, report, results
from sce_lm.benchmarks.peers import PEERS, STOCK
from sce_lm.benchmarks.report import METHOD, Column, Plot, Table
from sce_lm.benchmarks.side_by_side import measured_apart
from sce_lm.training.measure import held_bytes, start_peak, time_calls

LEARNING_RATE = 1e-6
"""Small enough that a few steps on few sequences leave the model what it is."""
MIB = 2**20
SPEEDUP = Column("x stock", "speedup", ".2f", "times as fast as the stock model's step")
PEAK = Column("peak MiB", "peak_mib", ",.0f", "what a step needs over that")
TABLES = (
    Table(
        "A training step",
        (
            METHOD,
            Column("s / step", "seconds", ".2f"),
            SPEEDUP,
            Column("in the loss", "loss_seconds", ".2f", "seconds of it that the loss took"),
            Column(
                *("share of the loss", "loss_share", ".3f"), "of our losses' seconds in the step's"
            ),
            Column(
                *("held MiB", "held_mib", ",.0f"), "between steps: parameters and AdamW's moments"
            ),
            PEAK,
        ),
    ),
)
PLOTS = (Plot("A training step", SPEEDUP, PEAK),)


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
    methods.add_options(parser, ("stock", "exact", "sce-published", "sce"))
    parser.add_argument("--repeats", type=int, default=5, help="steps whose median is taken")
    parser.add_argument(
        "--budget", type=float, default=120.0, help="seconds after which no step is repeated"
    )


def measure(arguments: argparse.Namespace) -> Sequence[results.Comparison]:
    """One comparison."""
    rows: list[dict[str, Any]] = []
    for method in methods.choose(arguments):
        report.progress(method.label)
        row = asdict(method)
        row |= measured_apart(
            row,
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
        if "positions" in row:
            row["resolved"] = method.resolved(row["positions"], row["vocab_size"], row["width"])
        rows.append(row)
    sizes = next((row for row in rows if "positions" in row), None)
    if sizes is None:
        raise ValueError(f"nothing could be measured; {rows[0]['label']}: {rows[0]['notes'][0]}")
    stock = next((row["seconds"] for row in rows if row["name"] == STOCK), None)
    for row in (row for row in rows if "seconds" in row):
        row["loss_share"] = row["loss_seconds"] / row["seconds"] or None  # of stock it is not known
        if stock is not None:
            row["speedup"] = stock / row["seconds"]
    trained = f"LoRA of rank {arguments.lora}" if arguments.lora else "all parameters trained"
    title = (
        f"{arguments.model.name}: {sizes['positions']:,} positions a step, vocabulary "
        f"{sizes['vocab_size']:,}, {sizes['parameters'] / 1e6:.0f}M parameters, "
        f"{arguments.dtype}, {trained}"
    )
    known = {n: sizes[n] for n in ("positions", "vocab_size", "width", "parameters")}
    return [results.Comparison(title, known, rows)]


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
    from sce_lm.benchmarks.real import load_model, load_tokenizer, text_sequences
    from sce_lm.training.models import add_lora

    torch.manual_seed(0)
    trained, tokenizer = load_model(Path(model), dtype, gguf), load_tokenizer(Path(model), gguf)
    blocks = text_sequences(trained, tokenizer, None if text is None else Path(text))
    count = max(1, tokens // blocks.shape[1])
    if len(blocks) < count:
        raise ValueError(
            f"the text has {blocks.numel():,} tokens and {tokens:,} a step were asked for; give "
            "more text by --text, or fewer --tokens."
        )
    output: Any = trained.get_output_embeddings()
    vocab_size, width = output.weight.shape
    sizes = {
        "positions": count * (blocks.shape[1] - 1),
        "vocab_size": vocab_size,
        "width": width,
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
        batches: token ids, ``[sequences, length]`` each, taken in turn.
        specification: a :class:`~sce_lm.benchmarks.methods.Method`'s; a peer's leaves the model's
            own loss in place.
    """
    from sce_lm.hf.adapter import apply_sce, loss_seconds

    if specification["name"] not in PEERS:  # a peer's is the model's own loss
        apply_sce(model, objectives.get(**specification))
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE
    )
    turns = cycle(batches)

    def step() -> None:
        ids = next(turns).to(device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
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
