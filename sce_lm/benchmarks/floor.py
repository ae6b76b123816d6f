"""The least time that a configuration can take here: its work at the machine's own rates.

A candidate of n positions costs three products of 2·n·d operations, forward, dh and dW, or two with
a frozen head; choosing the candidates of buckets costs a product of their centres with all of W:

    6·N·K·d  +  6·N·K_b·d  +  2·n_b·V·d  operations,   or 4 for 6 with a frozen head

K: candidates that all positions meet, K_b: those of a position's own bucket. Then W, if trainable,
is read once if its mean is needed and no scan reads it anyway, and dW is written once, into memory
that the process has already. Rates are taken by the process that has just timed the method:
products in the same shapes, and passes over memory of the same size. Exponentials, gathering and
sampling are not in the floor.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sce_lm import objectives
from sce_lm.benchmarks.peers import PEERS
from sce_lm.objectives import SCE, Exact
from sce_lm.training.measure import time_calls

BLOCK_ELEMENTS = 2**24
"""Results of a product that is timed; a larger product is timed on some of its classes."""
TRIALS = 9
"""Calls whose median counts, as it does for the methods: a machine that others use slows both."""


@dataclass(frozen=True)
class Work:
    """What no implementation of a configuration avoids, for N positions, V classes, width d."""

    shared: int
    """K, shared list and tail together; V if exact."""
    buckets: int = 0
    """n_b."""
    bucket_candidates: int = 0
    """K_b."""
    reads_weight: bool = False
    """Whether W is read for its mean alone."""
    expects_rows: bool = False
    """Whether every row's gradient is expected from the buckets' centres."""

    def amounts(self, n: int, v: int, d: int, itemsize: int, *, trainable: bool) -> dict[str, int]:
        """Operations of the products and bytes of the passes over memory."""
        factor, table = 6 if trainable else 4, v * d * itemsize
        return {
            "shared": factor * n * self.shared * d,
            "buckets": factor * n * self.bucket_candidates * d,
            "scan": (2 + 2 * (self.expects_rows and trainable)) * self.buckets * v * d,
            "read W": table * (self.reads_weight and trainable),  # of a frozen one it is known
            "write dW": table * trainable,
        }


def floor_terms(amounts: dict[str, int], rates: dict[str, float]) -> dict[str, float]:
    """Seconds of each term that there is; the floor is their sum."""
    return {name: amount / rates[name] for name, amount in amounts.items() if amount}


def work_of(
    specification: dict[str, Any], labels: torch.Tensor, counts: torch.Tensor, width: int
) -> Work | None:
    """The work of a method; None where the equation above does not describe it.

    Args:
        specification: a :class:`~sce_lm.benchmarks.methods.Method`'s.
        labels: ``[N]``.
        counts: ``[V]``, how often each class was a label before.
        width: d.
    """
    vocab_size = len(counts)
    if specification["name"] in PEERS:
        return Work(shared=vocab_size)
    objective = objectives.get(**specification)
    if isinstance(objective, Exact):
        return Work(shared=vocab_size)
    if not isinstance(objective, SCE):
        return None
    sizes = objective.config.resolve(len(labels), vocab_size, width=width)
    listed = torch.topk(counts, sizes.shared_frequent).indices
    if objective.config.shared_labels:
        listed = torch.cat([listed, labels])
    shared = len(listed.unique())
    rest = vocab_size - shared
    return Work(
        shared=shared + min(sizes.tail_candidates, rest),
        buckets=sizes.num_buckets,
        bucket_candidates=min(sizes.bucket_candidates, rest),
        reads_weight=sizes.control_variate and not sizes.num_buckets,
        expects_rows=sizes.row_control_variate and sizes.num_buckets > 0,
    )


def measure_floor(
    specification: dict[str, Any],
    labels: torch.Tensor,
    weight: torch.Tensor,
    counts: torch.Tensor,
    *,
    trainable: bool,
) -> dict[str, Any]:
    """Work, and the floor in seconds with its terms and rates; empty where the work is not known.

    Args:
        specification, labels, counts: as in :func:`work_of`.
        weight: ``[V, d]``, of which dtype and device are taken.
    """
    work = work_of(specification, labels, counts, weight.shape[1])
    if work is None:
        return {}
    n, (v, d) = len(labels), weight.shape
    rates = measure_rates(work, n, v, d, weight.dtype, weight.device.type, trainable=trainable)
    terms = floor_terms(work.amounts(n, v, d, weight.itemsize, trainable=trainable), rates)
    return {"seconds": sum(terms.values()), "terms": terms, "rates": rates, "work": asdict(work)}


def measure_rates(
    work: Work, n: int, v: int, d: int, dtype: torch.dtype, device: str, *, trainable: bool
) -> dict[str, float]:
    """Operations and bytes a second, by the names of :meth:`Work.amounts`."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    def seconds_of(run: Callable[[], Any]) -> float:
        return statistics.median(time_calls(run, device, TRIALS))

    def products(groups: int, positions: int, classes: int) -> float:
        """Forward, dh and, if trainable, dW of groups of positions, each with its classes."""
        if not classes:
            return math.inf
        classes = min(classes, max(1, BLOCK_ELEMENTS // (groups * positions)))
        h, w = normal(groups, positions, d), normal(groups, classes, d)
        p, dh, dw = torch.bmm(h, w.mT), torch.empty_like(h), torch.empty_like(w)
        if groups == 1:
            h, w, p, dh, dw = (tensor[0] for tensor in (h, w, p, dh, dw))
        seconds = seconds_of(lambda: torch.matmul(h, w.mT, out=p))
        seconds += seconds_of(lambda: torch.matmul(p, w, out=dh))
        if trainable:
            seconds += seconds_of(lambda: torch.matmul(p.mT, h, out=dw))
        return (6 if trainable else 4) * groups * positions * classes * d / seconds

    def scan(buckets: int) -> float:
        if not buckets:
            return math.inf
        classes = min(v, max(1, BLOCK_ELEMENTS // buckets))
        centers, w = normal(buckets, d), normal(classes, d)
        scores = centers @ w.T
        return 2 * scores.numel() * d / seconds_of(lambda: torch.mm(centers, w.T, out=scores))

    table, ones = normal(v, d), torch.ones(1, v, dtype=dtype, device=device)
    return {
        "shared": products(1, n, work.shared),
        "buckets": products(work.buckets, -(-n // max(1, work.buckets)), work.bucket_candidates),
        "scan": scan(work.buckets),
        "read W": table.nbytes / seconds_of(lambda: ones @ table),
        "write dW": table.nbytes / seconds_of(lambda: table.zero_()),
    }
