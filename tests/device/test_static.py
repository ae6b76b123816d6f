"""A call on a device is one static graph: it completes on tensors that have no numbers, and asks the
device for no more operations than the tables say.

What is not there yet stands here as what fails.
"""

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from support.devices import CARD
from support.static_graph import Counts, a_card
from torch._subclasses.fake_tensor import DataDependentOutputException

from sce_lm import LogitTransform, objectives
from sce_lm.objectives.exact import Exact

CAP = LogitTransform(2.0, 30.0)
TAIL = {"num_buckets": 0, "tail_candidates": 200, "shared_frequent": 20}

STATIC: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("exact", {}),
    "in batch": ("in_batch", {}),
    "in batch, streaming": ("in_batch", {"frequency": "streaming"}),
    "sampled softmax": ("sampled_softmax", {}),
    "sampled softmax, distinct": ("sampled_softmax", {"sampling": "distinct"}),
    "sampled softmax, priority": ("sampled_softmax", {"sampling": "priority"}),
    "sce, tail only": ("sce", TAIL),
}
"""Objectives whose call is a static graph."""

WAITING: dict[str, tuple[str, dict[str, Any], str]] = {
    "sce, buckets": ("sce", {"num_buckets": 8}, "blocks of buckets are cut by their sizes"),
    "sce, row control variate": ("sce", TAIL | {"row_control_variate": True}, "empty places"),
    "sce, sparse": ("sce", TAIL | {"sparse_grad": True}, "as many rows as were touched"),
    "sce, target": ("sce", TAIL | {"target_relative_error": 0.1}, "the tail's size is read"),
    "sce, published": ("sce", {"published": True}, "covered positions are picked out"),
    "sampled softmax, own": ("sampled_softmax", {"shared": False}, "distinct rows are found"),
    "rece": ("rece", {}, "chunks are cut by their sizes"),
    "bir": ("bir", {}, "distinct rows are found"),
    "xir": ("xir", {}, "distinct rows are found"),
    "kernel": ("kernel", {}, "blocks are cut by their draws"),
    "bce": ("bce", {}, "distinct rows are found"),
    "gbce": ("gbce", {}, "distinct rows are found"),
}
"""Objectives that wait for the device still, and for what."""


class Surroundings(NamedTuple):
    """What a model gives to a loss."""

    bias: bool = False
    post: LogitTransform = LogitTransform()
    low_rank: int = 0
    trains_head: bool = True
    weighs: bool = False
    """Whether tokens have weights."""
    reduction: str = "mean"
    items: bool = False
    """Whether ``num_items_in_batch`` is given."""
    dtype: torch.dtype = torch.float32


SURROUNDINGS = {
    "plain": Surroundings(),
    "bias and cap": Surroundings(bias=True, post=CAP, items=True, dtype=torch.bfloat16),
    "low rank": Surroundings(bias=True, post=CAP, low_rank=4, items=True, trains_head=False),
    "token weights": Surroundings(weighs=True, reduction="sum"),
    "losses of each": Surroundings(reduction="none", dtype=torch.bfloat16),
}


def steps(
    name: str,
    options: dict[str, Any],
    around: Surroundings = Surroundings(),
    backend: str = "auto",
    sizes: tuple[int, int, int] = (512, 3000, 64),
) -> Counts:
    """Two calls of an objective, each with its backward pass; what the second one asked for."""
    num_positions, vocab_size, width = sizes
    with a_card(vocab_size) as counts:

        def leaf(*shape, needs=True):
            return torch.empty(shape, device=CARD, dtype=around.dtype, requires_grad=needs)

        objective = objectives.get(name, backend=backend, **options)
        rank = around.low_rank
        inputs: dict[str, Any] = {
            "bias": leaf(vocab_size) if around.bias else None,
            "low_rank": leaf(vocab_size, rank) if rank else None,
            "token_weights": leaf(2, num_positions // 2, needs=False) if around.weighs else None,
            "num_items_in_batch": torch.ones((), device=CARD) if around.items else None,
        }
        hidden = leaf(2, num_positions // 2, width + rank)
        weight = leaf(vocab_size, width, needs=around.trains_head)
        labels = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=CARD)
        for _ in range(2):
            counts.operations.clear()
            counts.launches.clear()
            loss = objective(
                hidden, weight, labels, post=around.post, reduction=around.reduction, **inputs
            )
            loss.sum().backward()
        trained = [hidden, weight, *(x for x in inputs.values() if x is not None)]
        for x in trained:
            assert not x.requires_grad or (x.grad.shape, x.grad.device) == (x.shape, x.device)
    return counts


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("name", STATIC)
def test_a_call_is_one_static_graph(name, around, backend):
    steps(*STATIC[name], SURROUNDINGS[around], backend)


@pytest.mark.parametrize("name", WAITING)
def test_not_yet(name):
    objective, options, _ = WAITING[name]
    with pytest.raises((DataDependentOutputException, RuntimeError)):
        steps(objective, options, backend="torch")
