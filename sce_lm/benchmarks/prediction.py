"""What the roofline model says a method takes on a card, beside which a measurement is shown.

Of our losses every launch is counted (:mod:`sce_lm.benchmarks.roofline`); of the others the three
products of exact cross-entropy alone. All at half of the data sheet's rates.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sce_lm import objectives
from sce_lm.benchmarks.peers import PEERS
from sce_lm.benchmarks.roofline import DEVICES, Device, Shape, steps
from sce_lm.objectives import SCE, PublishedSCE
from sce_lm.ops.triton.configurations import ARCHITECTURES, choose

SHARE = 0.5
"""Of the peak rates."""
NOT_EXACT = ("merge_rows", "zeros of dW", "row_dot")
"""Launches of a list's gradients that the whole catalogue as a list does without."""


def card(name: str) -> Device | None:
    """The data sheet of a GPU by the name that torch gives; None: it is not here."""
    return next((device for device in DEVICES if device.name.split()[0] in name), None)


def milliseconds(
    specification: dict[str, Any],
    n: int,
    v: int,
    d: int,
    dtype: torch.dtype,
    device: Device,
    labels: int,
) -> float:
    """Forward and backward of a method with a trainable head.

    Args:
        specification: a :class:`~sce_lm.benchmarks.methods.Method`'s.
        labels: different labels of the batch.
    """
    rate = device.single_rate if dtype == torch.float32 else device.matrix_rate
    device = Device(device.name, device.architecture, rate, device.memory_rate)
    if specification["name"] in PEERS:
        return 1e3 * 6.0 * n * v * d / (SHARE * rate)
    choice = partial(choose, architecture=ARCHITECTURES[device.architecture], dtype=dtype)
    shape = partial(Shape, n, v, d, item_bytes=dtype.itemsize)
    objective = objectives.get(**specification)
    if isinstance(objective, PublishedSCE):  # all pairs once, then each position's best
        sizes = objective.config.resolve(n, v)
        lists: dict[str, Any] = {
            "buckets": sizes.num_buckets,
            "bucket_size": sizes.bucket_candidates,
        }
        count = sizes.num_buckets * sizes.bucket_positions
        pairs = Shape(count, v, d, item_bytes=dtype.itemsize, **lists)
        found = [s for s in steps(pairs, choice) if s.kernel == "forward"]
        found += steps(shape(**lists), choice)
    elif isinstance(objective, SCE):
        sizes = objective.config.resolve(n, v)
        known = labels * objective.config.shared_labels
        found = steps(
            shape(
                shared=sizes.shared_frequent + known,
                tail=sizes.tail_candidates,
                control=sizes.control_variate,
                buckets=sizes.num_buckets,
                bucket_size=sizes.bucket_candidates,
            ),
            choice,
        )
    else:
        found = [s for s in steps(shape(shared=v), choice) if s.kernel not in NOT_EXACT]
    return 1e3 * sum(step.seconds(device, SHARE) for step in found)
