"""Sampled softmax against the number of draws (Blanc and Rendle, ICML 2018, arXiv 1712.00527).

The recommender of the XIR protocol, from rows that are small (N(0, .01)) and for 5 epochs, trained
by one sampler and number of draws after the other: exact held-out loss of what came out. And, on
the model that exact cross-entropy trained, how far the mean gradient of a sampler is from the exact
one:

    bias²  = (|mean of D gradients - exact|² - variance / D) / |exact|²

which cannot be told from 0 where it is below its own noise; negative estimates are 0 then. Draws
from the softmax itself, which cost what the exact loss costs, have no bias; they are no row.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

from sce_lm import objectives
from sce_lm.benchmarks import methods, results
from sce_lm.benchmarks.comparison import compare, run_of
from sce_lm.benchmarks.methods import Method
from sce_lm.benchmarks.papers.claims import by_label, judged
from sce_lm.benchmarks.papers.xir import DATA, chosen_data, protocol
from sce_lm.benchmarks.report import progress
from sce_lm.training.models import load_model
from sce_lm.training.pairs import PairsTask
from sce_lm.training.run_folder import RunFolder

DRAWS = (4, 16, 64)
EPOCHS = 5
GRADIENTS = 50
"""Gradients of which the mean is taken."""
CALLS = 20
"""Batches of training that a sampler's counts have seen before."""
EXACT = Method("exact", "exact (ours)", {"name": "exact"})
TAIL = {"num_buckets": 0, "shared_labels": False, "shared_frequent": 0}
OWN = {"shared": False}
SAMPLERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "uniform": ("uniform", "sampled_softmax", {"proposal": "uniform", **OWN}, "num_negatives"),
    "unigram": ("unigram", "sampled_softmax", {"proposal": "unigram", **OWN}, "num_negatives"),
    "quadratic": ("quadratic kernel", "kernel", {}, "num_negatives"),
    "centered": ("quadratic kernel, centred", "kernel", {"center": True}, "num_negatives"),
    "tail": ("SCE's tail, shared", "sce", TAIL, "tail_candidates"),
}
"""Label, objective, options, and the option that is the number of draws."""


def own_methods() -> dict[str, Method]:
    """Exact cross-entropy, and every sampler with every number of draws."""
    found = {"exact": EXACT}
    for name, (label, objective, options, number) in SAMPLERS.items():
        for draws in DRAWS:
            how = {"name": objective, **options, number: draws}
            found[f"{name}-{draws}"] = Method(f"{name}-{draws}", f"{label}, {draws}", how)
    return found


def measure(arguments: argparse.Namespace) -> list[results.Comparison]:
    """A comparison a data set, and the claims."""
    comparisons, claims = [], []
    for name in chosen_data(arguments, ["movielens-100k"]):
        data, own = dataclasses.replace(DATA[name], epochs=EPOCHS), own_methods()
        config = protocol(data, arguments, spread=0.1)
        arguments.methods = arguments.methods or list(own)
        if arguments.methods[0] != "exact":
            raise ValueError("--methods begins with the model of the gradients; put exact first.")
        chosen = methods.choose(arguments, 2**17, *own.values())
        seeds = arguments.seeds or [0]
        folder = arguments.folder / "kernel" / name
        comparison = compare(config, chosen, folder, seeds)
        comparison.title = f"{name}: {comparison.title}"
        rows = by_label(comparison)
        task = PairsTask.stored(run_of(folder, EXACT, seeds[0]), config)
        model = load_model(run_of(folder, EXACT, seeds[0]).model)
        for method in chosen:
            row = rows.get(method.label, {})
            if "seconds_per_step" not in row:
                continue  # its loss did not stay finite
            runs = [run_of(folder, method, seed) for seed in seeds]
            row["test"]["nll"] = [held_out_loss(run, PairsTask.stored(run, config)) for run in runs]
            if method.name != "exact":
                progress(f"gradients of {method.label}")
                row |= gradient_error(model, task, method.specification, config.seed)
                label, draws = method.label.rsplit(", ", 1)
                row |= {"label": label, "draws": int(draws)}
        comparisons.append(comparison)
        claims += _claims(name, comparison.rows)
    return [*comparisons, results.Comparison("What the paper claims", {}, claims)]


@torch.no_grad()
def held_out_loss(run: RunFolder, task: PairsTask) -> float:
    """Exact cross-entropy, in nats, of the test pairs of a finished run."""
    return load_model(run.model).eval()(**task.held_out(20_000)).loss.item()


def gradient_error(
    model: Any, task: PairsTask, specification: dict[str, Any], seed: int
) -> dict[str, float]:
    """Bias and noise of the gradient of one batch's hidden states, over the exact one's norm."""
    objective = objectives.get(**specification)
    weight = model.lm_head.weight.detach()
    random = torch.Generator().manual_seed(seed)

    def gradient(loss: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model.user_embeddings(batch["input_ids"][:, 0]).detach().requires_grad_()
        value = loss(hidden, weight, batch["labels"][:, 1])
        return torch.autograd.grad(value, hidden)[0].double()

    batches = torch.randint(
        task.num_rows, (CALLS, task.config.per_device_batch_size), generator=random
    )
    for rows in batches:
        batch = task.batch(rows.tolist())
        gradient(objective, batch)
    exact = gradient(objectives.get("exact"), batch)
    drawn = torch.stack([gradient(objective, batch) for _ in range(GRADIENTS)])
    noise = drawn.var(0).sum()
    bias = ((drawn.mean(0) - exact).square().sum() - noise / GRADIENTS).clamp(min=0)
    norm = exact.norm()
    return {
        "gradient_bias": (bias.sqrt() / norm).item(),
        "gradient_noise": (noise.sqrt() / norm).item(),
    }


def _claims(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each sampler: whether its most draws end where exact cross-entropy does; and whether the
    kernel's fewest are better than uniform ones."""
    tested = [row for row in rows if "nll" in row.get("test", {})]
    exact = next(row["test"]["nll"] for row in tested if row["label"] == EXACT.label)
    found = []
    for first, second in (("quadratic kernel", "uniform"), ("quadratic kernel", "unigram")):
        for draws in DRAWS:
            losses = {r["label"]: r["test"]["nll"] for r in tested if r.get("draws") == draws}
            if {first, second} <= {*losses}:
                text = f"{name}: {draws} draws, {first} below {second}, held-out loss"
                pairs = zip(losses[second], losses[first])
                found.append(judged(text, [a - b for a, b in pairs]))
    for row in tested:
        if row.get("draws") == max(DRAWS):
            text = f"{name}: {row['label']}, {max(DRAWS)} draws, no worse than exact, held-out loss"
            found.append(judged(text, [a - b for a, b in zip(exact, row["test"]["nll"])]))
    return found
