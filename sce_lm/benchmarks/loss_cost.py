"""What a loss costs on hidden states of a model: seconds and memory, forward and backward.

Every method takes the same hidden states, weight and labels from a file. Memory is the peak of the
first pass over what the process held before it, inputs included; libraries were set up by tiny
passes before, with another instance of the method. Seconds are the median of several passes after
that one. A pass is what a training step asks: the loss, and gradients that start from None, so that
making the weight's gradient is part of both.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, linear

from sce_lm.objectives import Objective
from sce_lm.ops.logits import LogitTransform
from sce_lm.training.measure import start_peak, time_calls

Loss = Callable[..., torch.Tensor]
"""``loss(hidden_states, weight, labels, bias=None)`` in nats, 0-dim."""

Inputs = dict[str, torch.Tensor]
"""``hidden_states [N, d]``, ``weight [V, d]``, ``labels [N]``, perhaps ``bias [V]``."""


@dataclass(frozen=True)
class LossCost:
    """One method's cost."""

    seconds: float
    """Median of a forward and backward pass."""
    forward_seconds: float
    """Median of a forward pass without gradients."""
    peak_mib: float
    """Peak memory of a forward and backward pass over what was held before it, in MiB."""
    loss: float
    """The loss of the first pass, in nats."""


def save_inputs(path: Path, inputs: Inputs, post: LogitTransform) -> None:
    """Write what enters the loss as a safetensors file; ``post`` goes into its metadata."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in inputs.items()},
        path,
        metadata={"post": json.dumps(dataclasses.asdict(post))},
    )


def load_inputs(path: Path, device: str) -> tuple[Inputs, LogitTransform]:
    """What :func:`save_inputs` wrote."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        post = LogitTransform(**json.loads(file.metadata()["post"]))
    # Clones, because a mapped file would be counted when it is first read.
    return {name: tensor.clone().to(device) for name, tensor in tensors.items()}, post


def stock(post: LogitTransform) -> Loss:
    """Plain cross-entropy. No name keeps the logits alive longer than torch needs them."""

    def loss(hidden_states, weight, labels, bias=None):
        return cross_entropy(post(linear(hidden_states, weight, bias)).float(), labels)

    return loss


def loss_of(objective: Objective, post: LogitTransform) -> Loss:
    """An objective called as a user calls it, choice of candidates included."""
    return partial(objective, post=post)


def warm_up(make: Callable[[], Loss], inputs: Inputs) -> None:
    """Let libraries and compilers set themselves up, on tiny problems of two shapes."""
    for size in (64, 48):
        small = {name: tensor[:size].clone() for name, tensor in inputs.items()}
        small["labels"].zero_()
        one_pass(make(), small)


def cost_of(
    loss: Loss,
    inputs: Inputs,
    *,
    trainable: bool = True,
    repeats: int = 7,
    budget: float = math.inf,
) -> LossCost:
    """What ``loss`` costs in this process, which has not called it before.

    Args:
        trainable: whether the head's weight and bias get gradients.
        repeats: passes whose median is taken, forward and backward, and as many forward alone.
        budget: seconds for each of the two after which no further pass is begun.
    """
    device = inputs["weight"].device.type
    read_peak = start_peak(device)
    value = one_pass(loss, inputs, trainable)[0]
    peak = read_peak()
    passes = time_calls(
        lambda: one_pass(loss, inputs, trainable), device, repeats + 1, budget=budget
    )
    with torch.no_grad():
        forward = time_calls(lambda: loss(**inputs), device, repeats + 1, budget=budget)
    return LossCost(_warm_median(passes), _warm_median(forward), peak / 2**20, value)


def _warm_median(seconds: list[float]) -> float:
    """The first call may set something up; it counts only if there is no other."""
    return statistics.median(seconds[1:] or seconds)


def one_pass(loss: Loss, inputs: Inputs, trainable: bool = True) -> tuple[float, Inputs]:
    """The loss, and the gradients of hidden states and, if ``trainable``, weight and bias. They are
    taken off the inputs again, as by ``zero_grad()``, which are the same tensors in each pass."""
    leaves = ("hidden_states", "weight", "bias") if trainable else ("hidden_states",)
    wanted = {name: inputs[name].requires_grad_() for name in leaves if name in inputs}
    value = loss(**inputs)
    value.backward()
    gradients = {name: t.grad for name, t in wanted.items() if t.grad is not None}
    for tensor in wanted.values():
        tensor.grad = None
        tensor.requires_grad_(False)
    return value.item(), gradients
