"""BIR and XIR in their own protocol (Chen et al., NeurIPS 2022, arXiv 2205.14859).

Matrix factorisation, 32 dimensions, rows drawn from N(0, 1), Adam at .01 with weight decay 1e-5 in
the gradient; a random fifth of each user's items is asked for, and those of training are masked.
The authors' rate falls by 5 % every 5 epochs; here it is constant.

Their evaluator takes ``arange(k)`` as boolean, so that its discount is 1, .63, .63, ... and its
"NDCG" can pass 1. It is here for comparison with their code; NDCG is the other column.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from sce_lm.benchmarks import methods, results
from sce_lm.benchmarks.comparison import compare, run_of
from sce_lm.benchmarks.methods import Method
from sce_lm.benchmarks.papers.claims import agrees, better, by_label
from sce_lm.benchmarks.train import run_fields
from sce_lm.recsys.pairs import PairHits, pair_hits
from sce_lm.training.models import load_model
from sce_lm.training.pairs import PairsTask
from sce_lm.training.task_sources import build_task
from sce_lm.training.train_config import TrainConfig


@dataclass(frozen=True)
class Data:
    """A log of the paper, and the run that the default grid makes of it."""

    file: str
    batch: int
    epochs: int
    seeds: int
    code: dict[str, tuple[float, float]]
    """By the authors' own code after as many epochs: their NDCG@10 and recall@10, by method."""


DATA = {
    "movielens-100k": Data(
        *("movielens-100k-pairs.parquet", 512, 20, 5),
        {"in-batch": (0.2867, 0.1732), "bir": (0.2768, 0.1617), "xir-0.2": (0.2758, 0.1660)},
    ),
    "gowalla": Data("gowalla.parquet", 2048, 1, 1, {}),
}


def own_methods(batch: int) -> dict[str, Method]:
    """What is compared; XIR's cache and the draws are as many as the batch, as in their code."""
    importance = {"correction": "importance"}
    unigram = {"num_negatives": batch, "proposal": "unigram"}
    found = (
        ("in-batch", "in-batch, logQ", "in_batch", {}),
        ("in-batch-plain", "in-batch", "in_batch", {"logq": False}),
        ("bir", "BIR (published)", "bir", {}),
        ("xir", "XIR (published)", "xir", {}),
        ("xir-0.2", "XIR (published), cache weight .2", "xir", {"cache_weight": 0.2}),
        ("bir-corrected", "BIR (corrected)", "bir", importance),
        ("xir-corrected", "XIR (corrected)", "xir", importance),
        ("unigram", "sampled softmax, unigram", "sampled_softmax", unigram),
        ("sce-published", "SCE (published)", "sce", {"published": True}),
        ("sce", "SCE (default)", "sce", {}),
        ("exact", "exact (ours)", "exact", {}),
    )
    return {name: Method(name, label, {"name": kind, **how}) for name, label, kind, how in found}


def chosen_data(arguments: argparse.Namespace, default: list[str]) -> list[str]:
    """Names of the data sets that are asked for and there."""
    names = arguments.datasets or default
    for name in names:
        if name not in DATA:
            raise ValueError(f"--datasets has {name!r}; choose from {', '.join(DATA)}.")
        if not (arguments.data / DATA[name].file).is_file():
            raise ValueError(
                f"{arguments.data} has no {DATA[name].file}; name its folder by --data."
            )
    return names


def measure(arguments: argparse.Namespace) -> list[results.Comparison]:
    """A comparison a data set, and the claims."""
    comparisons, claims = [], []
    names = chosen_data(arguments, list(DATA))
    for name in names:
        data, own = DATA[name], own_methods(DATA[name].batch)
        config = protocol(data, arguments)
        arguments.methods = arguments.methods or list(own)
        chosen = methods.choose(arguments, 2**17, *own.values())
        seeds = arguments.seeds or list(range(data.seeds))
        folder = arguments.folder / "xir" / name
        comparison = compare(config, chosen, folder, seeds)
        comparison.title = f"{name}: {comparison.title}"
        comparison.sizes["seeds"] = seeds
        rows = by_label(comparison)
        for method in chosen:
            if "seconds_per_step" not in rows[method.label]:
                continue  # its loss did not stay finite
            row = rows[method.label]
            values = [_by_their_code(run_of(folder, method, seed), config) for seed in seeds]
            row["test"]["code_ndcg@10"] = values
            if method.name in data.code and config.max_steps == _steps(config, data):
                row["code_ndcg@10"], row["code_recall@10"] = data.code[method.name]
        comparisons.append(comparison)
        claims += _claims(name, rows, {method.name: method.label for method in chosen})
    return [*comparisons, results.Comparison("What the paper claims", {}, claims)]


def protocol(data: Data, arguments: argparse.Namespace, spread: float = 1.0) -> TrainConfig:
    """The protocol, with what the command line changes of it.

    Args:
        spread: standard deviation of fresh rows.
    """
    config = TrainConfig(
        task="items",
        split="random",
        data=str(arguments.data / data.file),
        model_config={"model_type": "two_tower", "hidden_size": 32, "initializer_range": spread},
        per_device_batch_size=data.batch,
        optimizer="adam",
        learning_rate=0.01,
        betas=[0.9, 0.999],
        weight_decay=1e-5,
        scheduler="constant",
        warmup_steps=0,
        max_grad_norm=0.0,
        eval_every=0,
        eval_k=[10, 20, 50],
        log_every=50,
        checkpoint_every=0,
    )
    given = run_fields(arguments) | {"warmup_steps": 0}
    return dataclasses.replace(config, **{"max_steps": _steps(config, data), **given})


def _steps(config: TrainConfig, data: Data) -> int:
    return data.epochs * -(-build_task(config).num_rows // data.batch)


def _by_their_code(run: Any, config: TrainConfig) -> float:
    """The authors' "NDCG"@10 of a finished run."""
    task = PairsTask.stored(run, config)
    model = load_model(run.model)
    return code_ndcg(pair_hits(model, task.split, items=task.items, depth=10), 10)


def code_ndcg(found: PairHits, k: int) -> float:
    """What the authors' evaluator calls NDCG@k: the list's gains are divided by log2(2), log2(3),
    log2(3), ..., those of the ideal list as they should be."""
    gains = 1 / torch.full((k,), 3.0, dtype=torch.float64).log2()
    gains[0] = 1
    ideal = (1 / torch.arange(2, k + 2, dtype=torch.float64).log2()).cumsum(0)
    share = found.hits[:, :k].double() @ gains / ideal[found.relevant.clamp(max=k) - 1]
    return share.mean().item()


def _claims(name: str, rows: dict[str, Any], labels: dict[str, str]) -> list[dict[str, Any]]:
    """Those whose methods were measured."""
    found = []
    for claim, first, second in (
        ("resampling the batch helps", "bir", "in-batch"),
        ("the cache helps", "xir", "bir"),
        ("XIR is best", "xir", "in-batch"),
        ("(ours) the correction helps", "bir-corrected", "bir"),
        ("(ours) the correction helps", "xir-corrected", "xir"),
    ):
        if {first, second} <= {*labels}:
            pair = (labels[first], labels[second])
            if all("ndcg@10" in rows.get(label, {}).get("test", {}) for label in pair):
                found.append(better(f"{name}: {claim}", rows, "ndcg@10", *pair))
    for label in labels.values():
        row = rows.get(label, {})
        if "code_recall@10" in row:
            for metric in ("code_ndcg@10", "recall@10"):
                published = row["code_ndcg@10" if "ndcg" in metric else "code_recall@10"]
                text = f"{name}: {label} as by the authors' code, {metric}"
                found.append(agrees(text, row["test"][metric], published))
    return found
