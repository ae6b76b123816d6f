"""The roofline model's counts against what the launchers ask for and touch."""

import pytest
import torch
from support.triton_cases import Case, draw
from support.triton_interpreter import watched

from sce_lm.benchmarks.roofline import Shape, steps
from sce_lm.ops.head import Head
from sce_lm.ops.triton.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.triton.catalogue_scan import catalogue_topk
from sce_lm.ops.triton.configurations import INTERPRETER, configuration

KERNELS = ("forward", "logit_gradient", "hidden_gradient", "row_gradient")
SUMS = ("merge_rows", "row_dot", "row_sum")
CASE = Case(
    "plan", positions=64, vocab=300, width=64, shared=64, tail=48, buckets=4, bucket_size=32
)


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
@pytest.mark.parametrize("buckets", [0, 4])
def test_the_plan_moves_at_most_a_third_more_than_the_model_counts(buckets, control):
    case = Case(**{**vars(CASE), "buckets": buckets, "control": control})
    problem, _, candidates = draw(case)
    if candidates.bucket_of is not None:
        candidates.bucket_of.copy_(torch.arange(case.positions) % buckets)
    own = 32 if buckets else 0
    shape = Shape(64, 300, 64, 64, 48, buckets, own, control, item_bytes=4)
    with watched() as launches:
        loss = candidate_cross_entropy(problem.head(), problem.positions(), candidates).loss.sum()
        torch.autograd.grad(loss, problem.parameters)
    counted = steps(shape, lambda kernel: configuration(kernel, problem.hidden))
    for kernel in KERNELS:
        ran = [x for x in launches if x.kernel == f"{kernel}_kernel"]
        planned = [step for step in counted if step.kernel == kernel]
        assert len(ran) == len(planned)
        for launch, step in zip(ran, planned):
            assert 0.6 < launch.memory_bytes / step.memory_bytes < 1.3, (kernel, step)
            assert 0.6 < launch.tile_bytes / step.tile_bytes < 1.3, (kernel, step)
    for kernel in SUMS:
        ran = sum(x.memory_bytes for x in launches if x.kernel == f"{kernel}_kernel")
        planned = sum(step.memory_bytes for step in counted if step.kernel == kernel)
        assert ran == planned == 0 or 0.6 < ran / planned < 1.3, kernel
    every = {x.kernel.removesuffix("_kernel") for x in launches}
    assert every <= {*KERNELS, *SUMS}  # no launch is left out of the count


def test_the_scan_reads_the_catalogue_twice():
    queries, head = torch.randn(16, 64), Head(torch.randn(256, 64))
    with watched() as launches:
        catalogue_topk(queries, head, 200)
    tile = configuration("catalogue_scan", queries)
    assert tile != INTERPRETER
    shape = Shape(16, 256, 64, buckets=16, bucket_size=1, item_bytes=4)
    counted = [s for s in steps(shape, lambda k: configuration(k, queries)) if s.phase == "scan"]
    assert len(launches) == len(counted) == 2
    for launch, step in zip(launches, counted):
        assert 0.6 < launch.memory_bytes / step.memory_bytes < 1.3
        assert 0.6 < launch.tile_bytes / step.tile_bytes < 1.3
