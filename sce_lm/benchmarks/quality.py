"""How far a loss and its gradients are from the exact ones.

With delta_t = loss_t - exact loss_t = log Zhat_t - log Z_t at each position:

    bias            mean of delta
    bias of Zhat    mean of exp(delta) - 1
    sd              standard deviation of delta over positions
    relative error  root mean square of Zhat / Z - 1 = exp(delta) - 1
    cos, norm       cosine to the exact gradient, and ratio of the norms

each averaged over draws of the candidates. Positions share a sample, and so a part of its error:
the relative error has that part, the sd of a draw has not. Positions without a partition function
(those that published SCE does not train) are left out. The reference is stock cross-entropy in
fp32, a block of positions at a time.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, linear

from sce_lm.benchmarks.loss_cost import Inputs, Loss, load_inputs, one_pass
from sce_lm.objectives import Exact, Objective
from sce_lm.ops.logits import LogitTransform

BLOCK_ELEMENTS = 2**26
"""Logits of a block of the reference (256 MiB; three such buffers are live)."""
CHUNK = 2**14
"""Classes of a gradient that are widened to fp64 at a time."""


Quality = dict[str, float | None]
"""Loss, bias, bias_partition, sd, relative_error, reported_error (what the loss says of itself),
coverage, products (of width d, a position, in the forward pass), cos_hidden, cos_weight,
norm_hidden, norm_weight, without those that a method does not tell; and of the problem top (mean
largest probability) and classes (exp of the mean entropy)."""


def write_reference(folder: str, device: str) -> None:
    """Exact losses ``[N]``, gradients of their mean, and the softmax's largest probabilities and
    entropies ``[N]``, as fp32, to reference.safetensors."""
    inputs, post = load_inputs(Path(folder) / "inputs.safetensors", device)
    labels = inputs.pop("labels")
    leaves = {name: tensor.float().requires_grad_() for name, tensor in inputs.items()}
    hidden, weight, bias = leaves["hidden_states"], leaves["weight"], leaves.get("bias")
    losses, largest, entropy = [], [], []
    for block in torch.arange(len(labels)).split(max(1, BLOCK_ELEMENTS // len(weight))):
        logits = post(linear(hidden[block], weight, bias))
        loss = cross_entropy(logits, labels[block], reduction="none")
        (loss.sum() / len(labels)).backward()
        losses.append(loss.detach())
        with torch.no_grad():
            log_p = logits.detach().log_softmax(dim=1)
            largest.append(log_p.amax(dim=1).exp())
            entropy.append(-torch.linalg.vecdot(log_p.exp(), log_p))
    reference = {"losses": torch.cat(losses)}
    reference |= {"largest": torch.cat(largest), "entropy": torch.cat(entropy)}
    for name, tensor in leaves.items():
        assert tensor.grad is not None
        reference[f"grad_{name}"] = tensor.grad
    save_file({k: v.cpu() for k, v in reference.items()}, Path(folder) / "reference.safetensors")


def quality_of(
    loss: Loss,
    objective: Objective | None,
    inputs: Inputs,
    post: LogitTransform,
    reference: Path,
    draws: int,
) -> Quality:
    """Compare with the reference.

    Args:
        loss: called once a draw, with gradients.
        objective: what is behind it; None for a peer, which is exact and asked for its mean only.
        reference: the file of :func:`write_reference`.
        draws: independent choices of candidates; exact losses are called once.
    """
    exact = load_file(reference)
    found: list[Quality] = []
    is_exact = objective is None or isinstance(objective, Exact)
    for _ in range(1 if is_exact else draws):
        value, gradients = one_pass(loss, inputs)
        drawn: Quality = {"loss": value}
        drawn["bias"] = value - exact["losses"].mean().item()
        for short, name in (("hidden", "hidden_states"), ("weight", "weight")):
            drawn |= _compare(gradients.pop(name), exact[f"grad_{name}"], short)
        if objective is not None:
            drawn |= _errors(objective, inputs, post, exact["losses"])
        drawn["top"] = exact["largest"].mean().item()
        drawn["classes"] = exact["entropy"].mean().exp().item()
        found.append(drawn)
    return {name: _mean([drawn[name] for drawn in found]) for name in found[0]}


@torch.no_grad()
def _errors(
    objective: Objective, inputs: Inputs, post: LogitTransform, exact: torch.Tensor
) -> Quality:
    hidden, weight, labels = (inputs[name] for name in ("hidden_states", "weight", "labels"))
    losses, stats = objective(
        hidden,
        weight,
        labels,
        bias=inputs.get("bias"),
        post=post,
        reduction="none",
        return_stats=True,
    )
    trained = slice(None) if stats.covered is None else stats.covered.cpu()
    delta = (losses.double().cpu() - exact.double())[trained]
    reported = stats.relative_error
    return {
        "bias": delta.mean().item(),
        "bias_partition": delta.expm1().mean().item(),
        "sd": delta.std(correction=0).item(),
        "relative_error": delta.expm1().square().mean().sqrt().item(),
        "reported_error": None if reported is None else reported.square().mean().sqrt().item(),
        "coverage": stats.coverage,
        "products": stats.products_per_position,
    }


def _compare(gradient: torch.Tensor, exact: torch.Tensor, name: str) -> Quality:
    """Cosine and ratio of norms, summed in fp64."""
    got = gradient.to_dense().cpu()
    inner = got_square = exact_square = 0.0
    for a, b in zip(got.split(CHUNK), exact.split(CHUNK)):
        a, b = a.double(), b.double()
        inner += (a * b).sum().item()
        got_square += a.square().sum().item()
        exact_square += b.square().sum().item()
    norms = math.sqrt(got_square * exact_square)
    return {
        f"cos_{name}": inner / norms if norms else math.nan,
        f"norm_{name}": math.sqrt(got_square / exact_square) if exact_square else math.nan,
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
