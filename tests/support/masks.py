"""Heads with masked classes, beside the same heads without them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from support.problems import Problem, make_problem

from sce_lm import LogitTransform

MASKS = {
    "-1e4": -1e4,
    "-1e9": -1e9,
    "finfo.min": torch.finfo(torch.float32).min,
    "-inf": -torch.inf,
}
N, V, D = 41, 170, 12
"""Positions, classes that are kept, and width."""
AT_THE_END = torch.arange(V, V + 22)
"""As padding is."""
SCATTERED = torch.arange(3, V + 22, 8)[:22]

_TAIL = {"shared_frequent": 20, "tail_candidates": 40, "num_buckets": 0}
_BUCKETS = {"shared_frequent": 20, "num_buckets": 3, "bucket_candidates": 15}
_ALL = {**_BUCKETS, "tail_candidates": 40}
_MIXTURE = {"labels": 1, "gradient": 1, "uniform": 1}

TAILS: dict[str, dict[str, Any]] = {
    "control": {**_ALL, "control_variate": True},
    "plain": {**_ALL, "control_variate": False},
    "auto": _ALL,
    "no buckets": {**_TAIL, "control_variate": True},
    "row control": {**_ALL, "control_variate": True, "row_control_variate": True},
    "row control, no buckets": {**_TAIL, "control_variate": False, "row_control_variate": True},
    "sparse": {**_ALL, "control_variate": True, "sparse_grad": True},
    "no list": {**_ALL, "shared_labels": False, "shared_frequent": 0, "control_variate": True},
    "uniform": {**_TAIL, "prior": "uniform"},
    "gradient": {**_TAIL, "prior": "gradient", "control_variate": True},
    "mixture": {**_ALL, "prior": _MIXTURE},
    "target": {**_ALL, "target_relative_error": 0.1},
    "bucket samples": {**_BUCKETS, "num_buckets": 1, "bucket_sampling": "priority"},
}
"""Options of corrected SCE with a sample: equal draws need equal numbers of the classes before."""

OTHERS: dict[str, dict[str, Any]] = {
    "exact": {"name": "exact"},
    "sce, labels first": {"name": "sce", **_ALL, "labels_first": 3},
    "sce, uncorrected": {"name": "sce", **_BUCKETS}
    | {"tail_candidates": 0, "control_variate": False},
    "sce, published": {"name": "sce", "published": True, "bucket_candidates": 20},
    "sce, random, mean": {"name": "sce", "published": True, "mix": False, "reduce": "mean"},
    "rece": {"name": "rece"},
    "rece, rounds": {"name": "rece", "rounds": 2, "extra_chunks": 0},
    "bir": {"name": "bir"},
    "bir, importance": {"name": "bir", "correction": "importance"},
    "xir": {"name": "xir"},
    "xir, drawn": {"name": "xir", "cache_from": "drawn", "cache_size": 30},
    "xir, importance": {"name": "xir", "correction": "importance", "cache_size": 60},
    "kernel": {"name": "kernel", "num_negatives": 30},
    "kernel, centred": {"name": "kernel", "num_negatives": 30, "center": True, "alpha": "auto"},
    "kernel, quartic": {"name": "kernel", "num_negatives": 30, "kernel": "quartic"},
    "kernel, shared": {"name": "kernel", "num_negatives": 30, "shared": True},
    "kernel, projected": {"name": "kernel", "num_negatives": 30, "projection": 5},
    "sampled_softmax": {"name": "sampled_softmax", "num_negatives": 30},
    "sampled_softmax, uniform": {"name": "sampled_softmax", "num_negatives": 30}
    | {"proposal": "uniform", "sampling": "distinct"},
    "sampled_softmax, zipf": {"name": "sampled_softmax", "num_negatives": 30}
    | {"proposal": "log_uniform", "sampling": "replacement", "shared": False},
    "sampled_softmax, priority": {"name": "sampled_softmax", "num_negatives": 30}
    | {"sampling": "priority", "shared": True},
    "in_batch": {"name": "in_batch"},
    "in_batch, streaming": {"name": "in_batch", "frequency": "streaming"},
    "bce": {"name": "bce", "num_negatives": 5},
    "gbce": {"name": "gbce", "num_negatives": 30, "shared": True},
}
"""Every other objective, and SCE without a sample."""

OBJECTIVES = {f"sce, {name}": {"name": "sce", **o} for name, o in TAILS.items()} | OTHERS


class Pair(NamedTuple):
    """A problem with masked classes and the same without them."""

    masked: Problem
    removed: Problem
    kept: torch.Tensor
    """``[V]`` which classes of the first the second has."""


def make_pair(
    value: float,
    ids: torch.Tensor = AT_THE_END,
    dtype: torch.dtype = torch.float64,
    post: LogitTransform = LogitTransform(),
    spread: float = 1.0,
    positions: int = N,
    classes: int = V,
) -> Pair:
    """``value`` is the bias of the classes ``ids``, as the softmax sees it: under a negative scale
    it is the opposite."""
    size = classes + len(ids)
    problem = make_problem(positions, size, D, dtype=dtype, spread=spread)
    hidden, weight, labels, bias = problem
    assert bias is not None
    kept = torch.ones(size, dtype=torch.bool)
    kept[ids] = False
    kept = kept.nonzero().squeeze(1)
    places = labels * classes // size
    masks = bias.detach().clone()
    masks[ids] = value * (1 if post.scale > 0 else -1)
    leaves = [hidden, weight, masks], [hidden, weight[kept], bias[kept]]
    (h, w, b), (h2, w2, b2) = (
        [t.detach().clone().requires_grad_() for t in part] for part in leaves
    )
    return Pair(Problem(h, w, kept[places], b), Problem(h2, w2, places, b2), kept)


def stock_loss(problem: Problem, post: LogitTransform = LogitTransform()) -> torch.Tensor:
    """Cross-entropy of the formed logits, as PyTorch computes it."""
    assert problem.bias is not None
    logits = problem.hidden @ problem.weight.T + problem.bias
    return torch.nn.functional.cross_entropy(post(logits), problem.labels)
