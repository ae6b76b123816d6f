"""The losses that are compared, by name: ours, and what a user would pick instead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TAIL_ONLY = {"name": "sce", "num_buckets": 0, "shared_labels": False, "shared_frequent": 0}
"""Corrected SCE without strata; ``tail_candidates`` is its size."""

DEFAULT_STRATA = {"name": "sce"}
"""Corrected SCE as it comes."""

KERNEL = {"alpha": "auto", "center": True}
"""Kernel sampling at its best for trained models."""


@dataclass(frozen=True)
class Method:
    """One row of a table."""

    name: str
    """What ``--methods`` takes."""
    label: str
    """What the table shows."""
    specification: dict[str, Any]
    """Arguments of ``objectives.get``, or ``{"name": peer}`` for one of ``peers.PEERS``."""


def equal_logits(logits: int, vocab_size: int) -> list[Method]:
    """Every objective at about so many logits a position; "corrected" is SCE as it comes.

    What depends on the batch cannot be set: in-batch losses see its distinct labels, BIR and XIR
    those twice, once to resample, and the strata of "sce-labels" have the labels besides. Kernel
    sampling for each position has 64 draws: to find them costs more than their logits.
    """
    half = logits // 2
    frequent = {"name": "sce", "num_buckets": 0, "shared_labels": False, "shared_frequent": half}
    sampled = {"name": "sampled_softmax", "num_negatives": logits}
    specifications: dict[str, tuple[str, dict[str, Any]]] = {
        "exact": ("exact", {"name": "exact"}),
        # alpha² = 4 buckets a position
        "published": (
            "published SCE",
            {"name": "sce", "published": True, "bucket_candidates": max(1, logits // 4)},
        ),
        "corrected": ("corrected SCE", DEFAULT_STRATA),
        "sce": ("SCE, frequent and tail", frequent | {"tail_candidates": logits - half}),
        "sce-labels": (
            "SCE, labels shared",
            frequent | {"shared_labels": True, "tail_candidates": logits - half},
        ),
        "uniform": ("sampled softmax, uniform", sampled | {"proposal": "uniform"}),
        "sampled": ("sampled softmax", sampled | {"proposal": "unigram"}),
        "sampled-priority": (
            "sampled softmax, priority",
            sampled | {"proposal": "unigram", "sampling": "priority"},
        ),
        "in-batch": ("in-batch, logQ", {"name": "in_batch"}),
        "bce": ("BCE", {"name": "bce", "num_negatives": logits, "shared": True}),
        "gbce": ("gBCE", {"name": "gbce", "num_negatives": logits, "shared": True}),
        "bir": ("BIR", {"name": "bir"}),
        "bir-importance": ("BIR, importance", {"name": "bir", "correction": "importance"}),
        "xir": ("XIR", {"name": "xir", "cache_size": half}),
        "xir-importance": (
            "XIR, importance",
            {"name": "xir", "cache_size": half, "correction": "importance"},
        ),
        "kernel": ("kernel, 64", {"name": "kernel", "num_negatives": 64, **KERNEL}),
        "kernel-shared": (
            "kernel, shared",
            {"name": "kernel", "num_negatives": logits, "shared": True, **KERNEL},
        ),
        # A position meets three chunks of V / num_buckets classes.
        "rece": ("RECE", {"name": "rece", "num_buckets": max(1, 3 * vocab_size // logits)}),
    }
    return [Method(name, label, options) for name, (label, options) in specifications.items()]


def choose(methods: Iterable[Method], names: str | None) -> list[Method]:
    """The methods that a comma-separated list names, in its order; all without one."""
    known = {method.name: method for method in methods}
    if names is None:
        return list(known.values())
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"--methods has {name!r}; choose from {', '.join(known)}.")
    return [known[name] for name in names.split(",")]
