"""Problems for the kernels: between them they take every branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from support.problems import Problem, make_problem

from sce_lm.ops.candidates import Candidates
from sce_lm.ops.logits import LogitTransform

CAP = LogitTransform(1.5, 2.0)
HALF = torch.float16


@dataclass(frozen=True)
class Case:
    """A problem of candidate cross-entropy; sizes past twice the interpreter's tiles."""

    name: str
    dtype: torch.dtype = torch.float32
    positions: int = 37
    vocab: int = 110
    width: int = 70
    bias: bool = False
    post: LogitTransform = LogitTransform()
    shared: int = 35
    tail: int = 40
    buckets: int = 0
    bucket_size: int = 35
    weighted: bool = False
    control: bool = False
    sparse: bool = False
    frozen: str = ""
    """"weight", "hidden", or nothing."""

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("tail only", shared=0),
    Case("tail with control variate", shared=0, control=True),
    Case("all lists", bias=True, buckets=2, control=True),
    Case("soft cap", bias=True, post=CAP, buckets=3, control=True, width=64),
    Case("soft cap, no buckets", post=CAP, control=True, sparse=True),
    Case("sparse gradient and bias", bias=True, sparse=True, shared=20, tail=20),
    Case("scale, fp16", HALF, post=LogitTransform(0.3), bias=True, buckets=2, width=96),
    Case("weighted buckets", shared=0, tail=0, buckets=3, weighted=True, bias=True),
    Case("weighted buckets and tail", buckets=2, weighted=True, post=CAP),
    Case("no candidates", shared=0, tail=0),
    Case("one position", positions=1, buckets=1, control=True),
    Case("everything shared", positions=5, vocab=20, shared=20, tail=0, control=True),
    Case("frozen head", frozen="weight", buckets=2, control=True),
    Case("frozen backbone", HALF, frozen="hidden", bias=True),
]


class Drawn(NamedTuple):
    problem: Problem
    """In the case's dtype, with gradients."""
    double: Problem
    """The same numbers in fp64."""
    candidates: Candidates


def draw(case: Case, seed: int = 0) -> Drawn:
    """The case's tensors. Labels repeat; bucket lists, tail and labels overlap."""
    n, v = case.positions, case.vocab
    problem = make_problem(n, v, case.width, with_bias=case.bias, dtype=case.dtype, seed=seed)
    double = Problem(*[_double(t) for t in problem])
    generator = torch.Generator().manual_seed(seed + 1)

    def pick(ids: torch.Tensor, count: int) -> torch.Tensor:
        return ids[torch.randperm(len(ids), generator=generator)[:count]]

    order = torch.randperm(v, generator=generator)
    shared, rest = order[: case.shared], order[case.shared :]
    tail = pick(rest, case.tail)
    items = bucket_of = log_weights = None
    if case.buckets:
        items = torch.stack([pick(rest, case.bucket_size) for _ in range(case.buckets)])
        items = items.sort(dim=1).values
        bucket_of = torch.randint(0, case.buckets, (n,), generator=generator)
    if case.weighted and items is not None:
        log_weights = torch.rand(items.shape, generator=generator) - 0.5
        empty = torch.rand(items.shape, generator=generator) < 0.2
        empty[:, 0] = False
        log_weights = log_weights.masked_fill(empty, -torch.inf)
        items = items.masked_fill(empty, 0).cummax(dim=1).values
    candidates = Candidates(
        shared,
        tail,
        torch.rand(case.tail, generator=generator, dtype=torch.float64) * 2,
        items,
        bucket_of,
        bucket_log_weights=log_weights,
        control_variate=case.control,
        sparse_grad=case.sparse,
    )
    frozen = {"weight": (1,), "hidden": (0,), "": ()}[case.frozen]
    for index in frozen:
        problem[index].requires_grad_(False)
        double[index].requires_grad_(False)
    return Drawn(problem, double, candidates)


def _double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_()
