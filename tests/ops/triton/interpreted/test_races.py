"""Races cannot show where programs run one after another, so who writes what is watched."""

import numpy as np
import pytest
import torch
from support.triton_cases import Case, draw
from support.triton_interpreter import planted, program_order, watched

import sce_lm.ops.triton.row_gradient as row_gradient
from sce_lm.ops.head import Head
from sce_lm.ops.row_reductions import Asked
from sce_lm.ops.triton.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.triton.catalogue_scan import catalogue_topk
from sce_lm.ops.triton.exact_cross_entropy import exact_cross_entropy
from sce_lm.ops.triton.priority_sample import priority_sample
from sce_lm.ops.triton.row_reductions import row_reductions

CASE = Case("races", bias=True, buckets=2, control=True, vocab=80, shared=20, tail=20, width=35)


def candidate_results():
    problem, _, candidates = draw(CASE)
    loss = candidate_cross_entropy(problem.head(), problem.positions(), candidates).loss
    return [loss, *torch.autograd.grad(loss.sum(), problem.parameters)]


def exact_results():
    problem = draw(CASE).problem
    result = exact_cross_entropy(problem.head(), problem.positions())
    return [*result, *torch.autograd.grad(result.loss.sum(), problem.parameters)]


def reduction_results():
    problem = draw(CASE).problem
    ids = torch.stack([problem.labels, problem.labels, problem.labels.flip(0)], dim=1)
    found = row_reductions(problem.head(), problem.hidden, ids, Asked(True, True, True, 1))
    total = sum(part.sum() for part in (*found[:5], found.top.values))
    return [*found[:5], *found.top, *torch.autograd.grad(total, problem.parameters)]


def scan_results():
    problem = draw(CASE).problem
    hidden, head = problem.hidden.detach()[:20], Head(problem.weight.detach())
    drawn = priority_sample(torch.zeros(200), 50, torch.Generator().manual_seed(3))
    return [catalogue_topk(hidden, head, 5), *drawn]


RESULTS = [candidate_results, exact_results, reduction_results, scan_results]


@pytest.mark.parametrize("results", RESULTS, ids=lambda f: f.__name__)
def test_each_element_is_written_by_one_program(results):
    with watched() as launches:
        results()
    assert launches
    for launch in launches:
        assert launch.writers, f"{launch.kernel} wrote nothing"
        assert not launch.conflicts, f"{launch.kernel}: {launch.conflicts[0]}"


@pytest.mark.parametrize("results", RESULTS, ids=lambda f: f.__name__)
def test_the_order_of_programs_does_not_matter(results):
    expected = results()
    shuffle = np.random.default_rng(0).permutation
    for rearrange in (lambda every: every[::-1], shuffle):
        with program_order(rearrange):
            found = results()
        assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize(
    ("old", "new", "conflict"),
    [
        (
            "tile % num_column_tiles * BLOCK_COLUMNS",
            "tile % num_column_tiles * (BLOCK_COLUMNS // 2)",
            "two",
        ),
        (
            "slot = segment * num_columns + column",
            "slot = segment * num_columns + 0 * column",
            "twice",
        ),
        ("local = tile % num_column_tiles * BLOCK_COLUMNS + ", "local = 0 * tile + ", "two"),
    ],
    ids=["overlapping tiles", "one slot for a tile", "one tile for all"],
)
def test_a_row_written_twice_is_found(old, new, conflict, tmp_path):
    with planted(row_gradient, old, new, tmp_path), watched() as launches:
        candidate_results()
    found = [c for launch in launches for c in launch.conflicts]
    assert any(conflict in c for c in found)
