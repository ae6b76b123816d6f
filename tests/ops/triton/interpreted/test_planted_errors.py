"""The comparison with the reference must fail where a kernel is wrong."""

import mmap

import numpy as np
import pytest
import torch
from support.triton_cases import Case, draw
from support.triton_interpreter import planted

import sce_lm.ops.triton.candidate_forward as candidate_forward
import sce_lm.ops.triton.hidden_gradient as hidden_gradient
import sce_lm.ops.triton.logit_gradient as logit_gradient
import sce_lm.ops.triton.logit_math as logit_math
import sce_lm.ops.triton.merge_rows as merge_rows
import sce_lm.ops.triton.row_gradient as row_gradient
from sce_lm.objectives.reference import candidate_reference
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.triton.candidate_cross_entropy import candidate_cross_entropy

CASE = Case("planted", bias=True, buckets=2, control=True, vocab=80, shared=35, tail=20, width=70)
PRODUCT = '        x = tl.dot(h, w, x, input_precision="ieee")\n'

MAP_NORESERVE = 0x4000
"""Linux; not in Python's mmap module before 3.13."""


def error() -> float:
    """Largest relative error of loss and gradients."""
    problem, double, candidates = draw(CASE)
    loss = candidate_cross_entropy(problem.head(), problem.positions(), candidates).loss.sum()
    expected = candidate_reference(double.head(), double.positions(), candidates).sum()
    found = [loss, *torch.autograd.grad(loss, problem.parameters)]
    wanted = [expected, *torch.autograd.grad(expected, double.parameters)]
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(found, wanted)]
    return float(torch.stack(errors).nan_to_num(torch.inf).max().detach())


ERRORS = {
    "bias counted once a block": (
        logit_math,
        PRODUCT,
        PRODUCT + "        if bias is not None:\n            x += tl.load(bias + item)[None, :]\n",
    ),
    "no mask at the last tile of columns": (
        candidate_forward,
        "present = is_position[:, None] & is_column[None, :]",
        "present = is_position[:, None] & (column >= 0)[None, :]",
    ),
    "no mask at the last piece of the width": (
        logit_math,
        "inside = lane + start < width",
        "inside = lane + start >= 0",
    ),
    "label not removed, forward": (
        candidate_forward,
        "present &= label[:, None] != item.to(tl.int32)[None, :]",
        "present &= label[:, None] >= 0",
    ),
    "label not removed, backward": (logit_gradient, "present &= ~is_label", "present &= present"),
    "log-weight omitted": (candidate_forward, "            t += c\n", "            t += 0.0 * c\n"),
    "A1 without its weight": (candidate_forward, "inverse * x", "x"),
    "pull without its weight": (logit_gradient, "tl.exp(c) * tl.load(pull", "1.0 * tl.load(pull"),
    "mean row omitted": (
        hidden_gradient,
        "+= tl.load(mean_coefficient",
        "+= 0 * tl.load(mean_coefficient",
    ),
    "offset omitted": (row_gradient, "total -= tl.load(offset", "total -= 0 * tl.load(offset"),
    "label's row omitted": (merge_rows, "r += f[:, None]", "r += 0.0 * f[:, None]"),
}


def test_without_an_error():
    assert error() < 3e-6


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_found(name, tmp_path):
    module, old, new = ERRORS[name]
    with planted(module, old, new, tmp_path):
        assert error() > 1e-4


def rows_far_apart(base: torch.Tensor, stride: int) -> torch.Tensor:
    """``[3, 8]`` rows ``stride`` elements apart, from the middle of ``base``."""
    return base.as_strided((3, 8), (stride, 1), len(base) // 2)


def test_an_offset_past_int32_is_found(tmp_path, monkeypatch):
    """Row 2 starts 2^31 elements after row 0; memory that is never touched is never there."""
    stride = 2**30
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    with mmap.mmap(-1, 5 * stride * 2, flags=flags) as memory:
        base = torch.from_numpy(np.frombuffer(memory, dtype=np.float16))
        weight = rows_far_apart(base, stride)
        weight.copy_(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
        hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).half()
        labels, shared = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 2])
        head, positions = Head(weight), Positions(hidden, labels)
        wide = Head(weight.double()), Positions(hidden.double(), labels)
        candidates = Candidates(shared, torch.arange(0), torch.zeros(0))
        # The interpreter would copy all of the memory back to itself.
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", _nothing)
        expected = candidate_reference(*wide, candidates)
        loss = candidate_cross_entropy(head, positions, candidates).loss
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
        wrong = "item.to(tl.int32)[None, :] * stride_weight"
        with planted(logit_math, "item[None, :] * stride_weight", wrong, tmp_path):
            loss = candidate_cross_entropy(head, positions, candidates).loss
            assert (loss.double() - expected).abs().max() > 1e-2
        del weight, head, base


def _nothing(*arguments):
    """Tensors on the CPU are used in place."""
