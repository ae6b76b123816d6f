"""The kernels on a GPU: bf16 against fp64, equal bits, no wait for the device, graph capture,
compute-sanitizer. ``scripts/test.sh --gpu`` runs them. They have not been run on hardware yet."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from support.problems import Problem, make_problem, relative_error

from sce_lm import objectives
from sce_lm.objectives.reference import candidate_reference, exact_reference
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.triton.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.triton.catalogue_scan import catalogue_topk
from sce_lm.ops.triton.exact_cross_entropy import exact_cross_entropy
from sce_lm.ops.triton.priority_sample import priority_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def drawn(width: int, dtype: torch.dtype) -> tuple[Problem, Problem, Candidates]:
    """A problem on the GPU, the same numbers in fp64, and candidates in all three lists."""
    n, v = 700, 3000
    exact = make_problem(n, v, width, with_bias=True)
    low = [None if t is None else t.detach().cuda() for t in exact]
    low = [t.to(dtype).requires_grad_() if t.is_floating_point() else t for t in low]
    double = [t.detach().double() if t.is_floating_point() else t for t in low]
    for tensor in double:
        if tensor.is_floating_point():
            tensor.requires_grad_()
    order = torch.randperm(v, generator=torch.Generator().manual_seed(1)).cuda()
    items = torch.stack([order[500 + 7 * k :][:200] for k in range(5)]).sort(dim=1).values
    log_weights = torch.linspace(0, 2, 400, dtype=torch.float64, device="cuda")
    bucket_of = torch.arange(n, device="cuda") % 5
    candidates = Candidates(
        order[:500], order[600:1000], log_weights, items, bucket_of, control_variate=True
    )
    return Problem(*low), Problem(*double), candidates


def results(problem: Problem, candidates: Candidates) -> list[torch.Tensor]:
    head, positions = problem.head(), problem.positions()
    loss = candidate_cross_entropy(head, positions, candidates).loss
    exact = exact_cross_entropy(head, positions).loss
    total = loss.mean() + exact.mean()
    return [loss, exact, *torch.autograd.grad(total, problem.parameters)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 300, 896, 2304])
def test_equals_fp64(width, dtype):
    problem, double, candidates = drawn(width, dtype)
    head, positions = double.head(), double.positions()
    loss = candidate_reference(head, positions, candidates)
    exact = exact_reference(head, positions)
    wanted = torch.autograd.grad(loss.mean() + exact.mean(), double.parameters)
    rounding = 4 * torch.finfo(dtype).eps + 1e-5
    for actual, want in zip(results(problem, candidates), [loss, exact, *wanted]):
        assert relative_error(actual, want) < rounding


def test_the_same_bits_every_time():
    problem, _, candidates = drawn(896, torch.bfloat16)
    first = results(problem, candidates)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, results(problem, candidates)))


def selections(problem: Problem) -> None:
    catalogue_topk(problem.hidden.detach()[:64], Head(problem.weight.detach()), 128)
    noise = torch.Generator("cuda").manual_seed(1)
    priority_sample(torch.zeros(3000, device="cuda"), 256, noise)


def test_nothing_waits_for_the_device():
    problem, _, candidates = drawn(256, torch.bfloat16)
    results(problem, candidates)  # compiles
    selections(problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(problem, candidates)
        selections(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(objective, problem: Problem) -> list[str]:
    """What waits for the device in a training step after the first one."""

    def step():
        objective(*problem[:3], bias=problem.bias).backward()

    step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(w.message) for w in caught if "synchroniz" in str(w.message)]


def test_a_step_waits_where_labels_are_checked_alone():
    """And the lists of distinct labels and frequent classes, where there are any."""
    problem = drawn(256, torch.bfloat16)[0]
    tail = {"num_buckets": 0, "shared_labels": False, "shared_frequent": 0, "tail_candidates": 256}
    assert len(waits(objectives.get("exact"), problem)) == 1
    assert len(waits(objectives.get("sce", **tail), problem)) == 1
    buckets = {"num_buckets": 4, "bucket_candidates": 64, "tail_candidates": 256}
    assert len(waits(objectives.get("sce", **buckets), problem)) <= 3


@pytest.mark.parametrize(
    "specification",
    [
        {"name": "exact"},
        {"name": "in_batch"},
        {"name": "rece"},
        {"name": "sce", "published": True},
        {"name": "sce", "num_buckets": 4, "bucket_candidates": 64, "tail_candidates": 0},
    ],
    ids=lambda s: s["name"],
)
def test_objectives_take_the_kernels_and_equal_torch(specification):
    problem = drawn(256, torch.float32)[0]
    found = []
    for backend in ("triton", "torch"):
        objective = objectives.get(**specification, backend=backend)
        generator = torch.Generator().manual_seed(4)
        loss = objective(*problem[:3], bias=problem.bias, generator=generator)
        found.append([loss, *torch.autograd.grad(loss, problem.parameters)])
    for actual, want in zip(*found):
        assert relative_error(actual, want) < 1e-3


def test_auto_takes_the_kernels():
    problem = drawn(256, torch.bfloat16)[0]
    losses = [
        objectives.get("exact", backend=backend)(*problem[:3], bias=problem.bias)
        for backend in ("auto", "triton")
    ]
    assert torch.equal(*losses)


def test_a_graph_replays():
    problem, _, candidates = drawn(256, torch.bfloat16)
    expected = results(problem, candidates)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(problem, candidates)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))


def test_offsets_past_int32():
    rows, width = 2**31 // 256 + 64, 256
    if torch.cuda.mem_get_info()[0] < 6 * rows * width:
        pytest.skip("needs 12 GiB of GPU memory")
    weight = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    weight[-64:] = torch.randn(64, width, device="cuda").bfloat16()
    hidden = torch.randn(40, width, device="cuda").bfloat16()
    labels = torch.arange(40, device="cuda") + rows - 50
    last = torch.arange(rows - 64, rows, device="cuda")
    candidates = Candidates(last, last[:0], torch.zeros(0, device="cuda"))
    loss = candidate_cross_entropy(Head(weight), Positions(hidden, labels), candidates).loss
    wide = Positions(hidden.double(), labels - rows + 64)
    wanted = exact_reference(Head(weight[-64:].double()), wide)
    assert relative_error(loss, wanted) < 1e-3


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    names = ("test_the_same_bits_every_time", "test_auto_takes_the_kernels")
    tests = [f"{__file__}::{name}" for name in names]
    command = [program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    result = subprocess.run(
        [*command, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
