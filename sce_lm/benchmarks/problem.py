"""Hidden states, weight and labels on which losses are measured, in a folder for all processes.

    inputs.safetensors      hidden_states [N, d], weight [V, d], labels [N], perhaps bias [V]
    state.safetensors       an SCEState that has counted the labels of other text, as it has after
                            some steps of training; missing where there is no other text
    reference.safetensors   exact losses and gradients (:func:`sce_lm.benchmarks.quality.reference`)

Problems of a model are made by :mod:`sce_lm.benchmarks.real`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from sce_lm.benchmarks.loss_cost import Inputs, load_inputs, save_inputs
from sce_lm.candidates.state import SCEState
from sce_lm.ops.logits import LogitTransform

LOGIT_SPREAD = 1.5
"""Standard deviation of drawn logits."""
PAST = 50
"""Labels that the state of a drawn problem has counted, for each position."""


@dataclass(frozen=True)
class Problem:
    """What a problem's folder holds."""

    title: str
    """Where it comes from."""
    positions: int
    vocab_size: int
    width: int
    dtype: str
    gradient_mib: float
    """Size of the weight, and so of its gradient."""

    @classmethod
    def of(cls, folder: Path, title: str, past: torch.Tensor) -> Problem:
        """The problem whose inputs were written to ``folder``; its state has counted ``past``."""
        with safe_open(folder / "inputs.safetensors", "pt") as file:
            weight, positions = file.get_tensor("weight"), len(file.get_tensor("labels"))
        if past.numel():
            state = SCEState()
            state.begin_call(past, len(weight), seed=0)
            state.save(folder / "state.safetensors")
        dtype = str(weight.dtype).removeprefix("torch.")
        vocab_size, width = weight.shape
        size = weight.nbytes / 2**20
        return cls(title, positions, vocab_size, width, dtype, size)

    def __str__(self) -> str:
        return (
            f"{self.title}: {self.positions:,} positions, vocabulary {self.vocab_size:,}, width "
            f"{self.width}, {self.dtype}; the weight's gradient is {self.gradient_mib:,.0f} MiB"
        )


def random_problem(
    folder: Path, positions: int, vocab_size: int, width: int, dtype: str, seed: int = 0
) -> Problem:
    """Gaussian hidden states and weights, Zipf labels: costs are real, quality means little."""
    generator = torch.Generator().manual_seed(seed)
    inputs, past = random_inputs(positions, vocab_size, width, getattr(torch, dtype), generator)
    save_inputs(folder / "inputs.safetensors", inputs, LogitTransform())
    return Problem.of(folder, "Random data", past)


def random_inputs(
    positions: int, vocab_size: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Inputs, torch.Tensor]:
    """What enters the loss, and labels of the past, on the generator's device."""
    options = {"generator": generator, "device": generator.device}
    weight = torch.randn(vocab_size, width, **options).mul_(LOGIT_SPREAD / width**0.5)
    hidden = torch.randn(positions, width, **options)
    inputs = {
        "hidden_states": hidden.to(dtype),
        "weight": weight.to(dtype),
        "labels": zipf_labels(positions, vocab_size, generator),
    }
    return inputs, zipf_labels(PAST * positions, vocab_size, generator)


def scale_logits(folder: Path, factor: float) -> None:
    """Make the problem's softmax flatter (a factor below 1) or more peaked."""
    inputs, post = load_inputs(folder / "inputs.safetensors", "cpu")
    post = replace(post, scale=post.scale * factor)
    save_inputs(folder / "inputs.safetensors", inputs, post)


def zipf_labels(count: int, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """int64 ``[count]``; class j has probability log((j+2) / (j+1)) / log(V+1), close to Zipf."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
    return ((vocab_size + 1) ** uniform).long().sub_(1).clamp_(0, vocab_size - 1)
