"""Launchers on tensors of a card that is not here: all that they make lies on it, in the layout and
the numbers that the kernels read."""

from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from support.devices import DEVICES, absent
from torch._library.custom_ops import CustomOpDef

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from sce_lm.ops.candidate_cross_entropy import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import Positions
from sce_lm.ops.row_reductions import Asked
from sce_lm.ops.triton import candidate_cross_entropy as candidate
from sce_lm.ops.triton import catalogue_scan, priority_sample
from sce_lm.ops.triton import row_reductions as reductions
from sce_lm.ops.triton.compile_offline import POINTERS
from sce_lm.ops.triton.configurations import ARCHITECTURES, compiling_for, configuration
from sce_lm.ops.triton.exact_cross_entropy import exact_cross_entropy

N, V, D = 700, 3000, 96
CAP = LogitTransform(2.0, 30.0)


class Context:
    """What autograd hands to an operator's two functions."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


@pytest.fixture(params=DEVICES)
def a_card(request, monkeypatch):
    """Launches, taken down; the operators' own code runs in place of their fake."""
    monkeypatch.setitem(where, "device", request.param)
    with _a_card(request.param) as launches:
        yield launches


where = {"device": "cpu"}
"""The device of the test at hand."""


@contextmanager
def _a_card(device):
    launches = []

    def record(kernel, *arguments, grid, warmup, **options):
        launches.append((kernel.__name__, arguments, grid))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(CustomOpDef, "__call__", lambda op, *inputs: op._init_fn(*inputs)),
        mock.patch.object(torch.cuda, "device_of", return_value=nullcontext()),
        compiling_for(ARCHITECTURES["sm_90"]),
        absent(device),
        torch.no_grad(),
    ):
        yield launches


def assert_can_be_launched(launches):
    assert launches
    for name, arguments, grid in launches:
        assert len(grid) == 1, f"{name}: dimensions after the first end at 65,535"
        assert 0 < grid[0] < 2**31, name
        for argument in arguments:
            if torch.is_tensor(argument):
                assert argument.device.type == where["device"], name
                assert argument.dtype in POINTERS, name
                assert argument.dim() != 1 or argument.is_contiguous(), name
                assert argument.dim() != 2 or argument.stride(1) == 1, name


def on_card(*shape, dtype=torch.int64, every=1):
    """A tensor there; ``every``: rows, or numbers, that lie so far apart."""
    return torch.empty(shape[0] * every, *shape[1:], dtype=dtype, device=where["device"])[::every]


def problem(dtype, every):
    hidden, weight = (on_card(rows, D + 32, dtype=dtype)[:, :D] for rows in (N, V))
    head = Head(weight, None, on_card(V, dtype=dtype, every=every), CAP)
    return head, Positions(hidden, on_card(N, every=every))


@pytest.mark.parametrize("every", [1, 2], ids=["dense", "strided"])
@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("buckets", [0, 5])
def test_candidate_cross_entropy(a_card, buckets, control, every):
    launches = a_card
    head, positions = problem(torch.bfloat16, every)
    candidates = Candidates(
        on_card(400, every=every),
        on_card(300, every=every),
        on_card(300, dtype=torch.float64),
        on_card(buckets, 64, every=every) if buckets else None,
        on_card(N, every=every) if buckets else None,
        control_variate=control,
    )
    context, kept = Context(), candidate._forward._init_fn
    with mock.patch.object(candidate, "_forward", wraps=kept) as forward:
        result = candidate.candidate_cross_entropy(head, positions, candidates)
    inputs = forward.call_args.args
    outputs = kept(*inputs)
    candidate._save(context, inputs, outputs)
    context.needs_input_grad = (True, True, True)
    gradients = candidate._differentiate(context, on_card(N, dtype=torch.float32))
    assert [x.shape for x in gradients[:3]] == [(N, D), (V, D), (V,)]
    assert all(
        x.dtype == torch.bfloat16 and x.device.type == where["device"] for x in gradients[:3]
    )
    assert result.loss.device.type == where["device"]
    assert_can_be_launched(launches)
    assert {name for name, _, _ in launches} >= {
        *("forward_kernel", "logit_gradient_kernel", "hidden_gradient_kernel"),
        *("row_gradient_kernel", "merge_rows_kernel", "row_dot_kernel"),
    }


@pytest.mark.parametrize("every", [1, 2], ids=["dense", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("everything", [False, True])
def test_exact_cross_entropy_and_row_reductions(a_card, everything, dtype, every):
    launches = a_card
    head, positions = problem(dtype, every)
    context, kept = Context(), reductions._forward._init_fn
    with mock.patch.object(reductions, "_forward", wraps=kept) as forward:
        if everything:
            ids = on_card(N, 3, every=every)
            asked = Asked(True, True, True, 1)
            reductions.row_reductions(head, positions.hidden, ids, asked)
        else:
            exact_cross_entropy(head, positions)
    inputs = forward.call_args.args
    outputs = kept(*inputs)
    reductions._save(context, inputs, outputs)
    context.needs_input_grad = (True, True, True)
    factors = [on_card(*x.shape, dtype=torch.float32) for x in outputs[:6]]
    gradients = reductions._differentiate(context, *factors, None)
    assert [x.shape for x in gradients[:3]] == [(N, D), (V, D), (V,)]
    assert_can_be_launched(launches)


def test_few_positions_and_very_many_classes(a_card):
    """Whose columns fill more programs than a grid's second dimension has."""
    launches = a_card
    weight = on_card(2**24, 16, dtype=torch.float32)
    hidden, ids = on_card(2, 16, dtype=torch.float32), on_card(2, 1)
    log_z, *_ = reductions._forward(hidden, weight, None, ids, 1.0, None, False, False, True)
    factor, at = on_card(2, dtype=torch.float32), on_card(2, 1, dtype=torch.float32)
    inputs = (hidden, weight, None, 1.0, None, True, True)
    reductions._backward(factor, None, None, ids, at, log_z, *inputs)
    assert_can_be_launched(launches)
    assert max(grid[0] for name, _, grid in launches if name == "row_gradient_kernel") > 65535


def test_scan_and_sample(a_card):
    launches = a_card
    head, positions = problem(torch.bfloat16, 2)
    queries, excluded = positions.hidden[:5], positions.labels
    found = catalogue_scan.catalogue_topk(queries, head, 64, excluded=excluded)
    assert (found.shape, found.device.type) == ((5, 64), where["device"])
    seed, proposal = on_card(1), on_card(V, dtype=torch.float64, every=2)
    ids, log_weights = priority_sample._sample(proposal, 100, seed)
    assert ids.device.type == log_weights.device.type == where["device"]
    assert_can_be_launched(launches)


def test_smaller_tiles_where_any_operand_is_not_aligned():
    with compiling_for(ARCHITECTURES["sm_90"]):
        wide = torch.empty(10, 900, dtype=torch.bfloat16)
        aligned = torch.empty(10, 896, dtype=torch.bfloat16)
        smaller = configuration("forward", wide)
        assert configuration("forward", aligned) != smaller
        assert configuration("forward", aligned, wide[:, :896]) == smaller
        assert (
            configuration("forward", torch.empty(10, 1024, dtype=torch.bfloat16)[:, 8:]) == smaller
        )
