"""A call on a device is one static graph: it completes on tensors that have no numbers, and asks
the device for no more operations than the tables say.
"""

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from support.devices import CARD
from support.static_graph import Counts, a_card
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from sce_lm import LogitTransform, objectives
from sce_lm.candidates import masks
from sce_lm.objectives.exact import Exact

READS = (DataDependentOutputException, DynamicOutputShapeException)
"""What a value raises that the host wants to know."""
CAP = LogitTransform(2.0, 30.0)
TAIL = {"num_buckets": 0, "tail_candidates": 200, "shared_frequent": 20}
SAMPLED_BUCKETS = {"bucket_sampling": "priority", "shared_frequent": 20}

STATIC: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("exact", {}),
    "in batch": ("in_batch", {}),
    "in batch, streaming": ("in_batch", {"frequency": "streaming"}),
    "sampled softmax": ("sampled_softmax", {}),
    "sampled softmax, distinct": ("sampled_softmax", {"sampling": "distinct"}),
    "sampled softmax, priority": ("sampled_softmax", {"sampling": "priority"}),
    "sampled softmax, own": ("sampled_softmax", {"shared": False, "num_negatives": 20}),
    "bir": ("bir", {"num_negatives": 20}),
    "bir, importance": ("bir", {"num_negatives": 20, "correction": "importance"}),
    "bce": ("bce", {"num_negatives": 4}),
    "gbce": ("gbce", {"num_negatives": 200, "shared": True}),
    "sce, tail only": ("sce", TAIL),
    "sce": ("sce", {"num_buckets": 8, "shared_frequent": 20}),
    "sce, buckets by sampling": ("sce", SAMPLED_BUCKETS | {"num_buckets": 8}),
    "sce, gradient prior": ("sce", TAIL | {"prior": "gradient"}),
    "sce, row control variate": ("sce", TAIL | {"row_control_variate": True}),
    "sce, sparse": ("sce", TAIL | {"sparse_grad": True}),
    "sce, published": ("sce", {"published": True}),
    "sce, published, mean": ("sce", {"published": True, "reduce": "mean"}),
    "rece": ("rece", {}),
    "rece, rounds": ("rece", {"rounds": 2}),
    "xir": ("xir", {}),
    "xir, importance": ("xir", {"correction": "importance", "cache_from": "drawn"}),
    "kernel": ("kernel", {}),
    "kernel, auto": ("kernel", {"alpha": "auto", "kernel": "quartic", "center": True}),
    "kernel, shared": ("kernel", {"shared": True}),
}
"""Objectives whose call is a static graph."""

BY_DECISION: dict[str, tuple[str, dict[str, Any]]] = {
    "sce, target": ("sce", TAIL | {"target_relative_error": 0.1}),
}
"""Objectives that wait for the device, and will: sizes of a tail that follow the error measured."""


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


PLAIN = Surroundings()
SURROUNDINGS = {
    "plain": PLAIN,
    "bias and cap": Surroundings(bias=True, post=CAP, items=True, dtype=torch.bfloat16),
    "low rank": Surroundings(bias=True, post=CAP, low_rank=4, items=True, trains_head=False),
    "token weights": Surroundings(weighs=True, reduction="sum"),
    "losses of each": Surroundings(reduction="none", dtype=torch.bfloat16),
}


def steps(
    name: str,
    options: dict[str, Any],
    around: Surroundings = PLAIN,
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


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("name", STATIC)
def test_a_call_is_one_static_graph(name, around):
    steps(*STATIC[name], SURROUNDINGS[around], "torch")


@pytest.mark.parametrize("around", ["bias and cap", "losses of each"])
@pytest.mark.parametrize("name", STATIC)
def test_a_call_is_one_static_graph_of_kernels(name, around):
    steps(*STATIC[name], SURROUNDINGS[around], "auto")


@pytest.mark.parametrize("name", BY_DECISION)
def test_what_waits_by_decision(name):
    with pytest.raises(READS):
        steps(*BY_DECISION[name], backend="torch")


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", STATIC)
def test_a_bias_that_masks_nothing_waits_for_nothing(name, backend):
    with mock.patch.object(masks, "_found_nothing", mock.MagicMock()) as found:
        found.__contains__.return_value = found.__getitem__.return_value = True
        steps(*STATIC[name], Surroundings(bias=True), backend)


def test_a_bias_that_masks_classes_is_waited_for():
    with mock.patch.object(masks, "_found_nothing", mock.MagicMock()) as found:
        found.__contains__.return_value, found.__getitem__.return_value = True, False
        with pytest.raises(READS):
            steps(*STATIC["sce"], Surroundings(bias=True), "torch")


WITH_KERNELS = {
    "exact": (48, 27),  # 8 pieces of the catalogue, three launches each
    "in batch": (90, 7),
    "in batch, streaming": (117, 7),
    "sampled softmax": (96, 7),
    "sampled softmax, distinct": (100, 7),
    "sampled softmax, priority": (103, 8),
    "sampled softmax, own": (1032, 0),
    "bir": (1465, 0),
    "bir, importance": (1789, 0),
    "bce": (358, 0),
    "gbce": (154, 0),
    "sce, tail only": (173, 16),
    "sce": (303, 11),
    "sce, buckets by sampling": (303, 11),
    "sce, gradient prior": (273, 16),
    "sce, row control variate": (282, 16),
    "sce, sparse": (163, 14),
    "sce, published": (192, 12),
    "sce, published, mean": (153, 9),
    "rece": (216, 7),
    "rece, rounds": (37344, 0),
    "xir": (3612, 0),
    "xir, importance": (2264, 0),
    "kernel": (6016, 0),
    "kernel, auto": (9880, 0),
    "kernel, shared": (314, 7),
}
"""Operations of torch and launches of a call with its backward pass by the kernels, of 8,192
positions and 262,144 classes, as counted when this was written: upper bounds."""

BY_TORCH = {
    "exact": 167,
    "in batch": 217,
    "in batch, streaming": 244,
    "sampled softmax": 223,
    "sampled softmax, distinct": 227,
    "sampled softmax, priority": 215,
    "sampled softmax, own": 119,
    "bir": 160,
    "bir, importance": 171,
    "bce": 112,
    "gbce": 112,
    "sce, tail only": 347,
    "sce": 705,
    "sce, buckets by sampling": 432,
    "sce, gradient prior": 439,
    "sce, row control variate": 448,
    "sce, sparse": 341,
    "sce, published": 469,
    "sce, published, mean": 297,
    "rece": 4273,
    "rece, rounds": 9406,
    "xir": 306,
    "xir, importance": 209,
    "kernel": 214,
    "kernel, auto": 338,
    "kernel, shared": 264,
}
"""The same without kernels, of 512 positions and 3,000 classes."""


@pytest.mark.parametrize("name", STATIC)
def test_it_asks_for_no_more_than_before(name):
    around = SURROUNDINGS["bias and cap"]
    counts = steps(*STATIC[name], around, "auto", (8192, 262144, 640))
    found = (counts.operations.total(), counts.launches.total())
    assert all(n <= most for n, most in zip(found, WITH_KERNELS[name])), found
    counts = steps(*STATIC[name], around, "torch")
    assert not counts.launches
    assert counts.operations.total() <= BY_TORCH[name]


def planted(of_positions):
    """An exact loss that does one thing more."""
    kept = Exact.compute

    def compute(self, head, positions, call):
        of_positions(positions)
        return kept(self, head, positions, call)

    return mock.patch.object(Exact, "compute", compute)


WRONG = {
    "item": lambda positions: positions.hidden.sum().item(),
    "branch": lambda positions: 1 if (positions.labels > 3).any() else 0,
    "shape": lambda positions: positions.hidden[positions.labels > 3],
    "unique": lambda positions: torch.unique(positions.labels),
    "two devices": lambda positions: positions.labels + torch.arange(len(positions)),
    "to the host": lambda positions: positions.labels.tolist(),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_gate_sees(what):
    wrong = (RuntimeError,) if what == "two devices" else READS
    with planted(WRONG[what]), pytest.raises(wrong):
        steps("exact", {})


def test_the_gate_counts_an_operation():
    before = steps("exact", {})
    with planted(lambda positions: positions.hidden * 2.0):
        assert steps("exact", {}).operations - before.operations == {"mul": 1}


def test_the_gate_lets_what_is_right_through():
    with planted(lambda positions: torch.zeros_like(positions.labels)):
        steps("exact", {})
