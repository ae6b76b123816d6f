"""Kernels on lists with empty places, and positions without a label, as calls on a device have."""

from contextlib import nullcontext

import pytest
import torch
from support.problems import gradients, make_problem, relative_error

from sce_lm import LogitTransform, objectives
from sce_lm.ops.static_shapes import static_shapes

TAIL = {"name": "sce", "num_buckets": 0, "tail_candidates": 20}
OBJECTIVES = {
    "exact": {"name": "exact"},
    "in batch": {"name": "in_batch"},
    "sampled softmax": {"name": "sampled_softmax", "num_negatives": 30},
    "tail": {**TAIL, "shared_frequent": 5},
    "tail without labels": {**TAIL, "shared_frequent": 5, "shared_labels": False},
    "tail, no control": {**TAIL, "shared_frequent": 0, "control_variate": False},
    "all classes": {**TAIL, "tail_candidates": 100},
}


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_as_the_ordinary_way(name, cap):
    post = LogitTransform(1.5, 4.0) if cap else LogitTransform()
    problem = make_problem(23, 70, 24, with_bias=cap, dtype=torch.float32)
    problem.labels[::4] = -100
    found = []
    for way in (nullcontext, static_shapes):
        objective = objectives.get(**OBJECTIVES[name], backend="triton")
        with way():
            loss = objective(
                *problem[:3],
                bias=problem.bias,
                post=post,
                generator=torch.Generator().manual_seed(0),
                num_items_in_batch=20,
            )
            found.append([loss, *gradients(loss, problem)])
    for actual, wanted in zip(found[1], found[0]):
        assert relative_error(actual, wanted) < 1e-4
    assert (found[1][1][::4] == 0).all()
