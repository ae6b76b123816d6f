"""A head of several tensors: every loss sees one matrix, and frozen columns are left."""

import itertools

import pytest
import torch
from support.problems import make_problem

from sce_lm import LogitTransform
from sce_lm.ops.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.catalogue_scan import catalogue_topk
from sce_lm.ops.chunk_cross_entropy import Chunks, chunk_cross_entropy
from sce_lm.ops.exact_cross_entropy import exact_cross_entropy, exact_scores
from sce_lm.ops.head import Head
from sce_lm.ops.position_cross_entropy import PositionCandidates, position_cross_entropy
from sce_lm.ops.positions import Positions

N, V, D, R = 21, 60, 5, 3
POST = LogitTransform(scale=0.7)


def candidates(**options):
    drawn = torch.randperm(V, generator=torch.Generator().manual_seed(1))
    items = drawn[8:20].view(2, 6).sort(dim=1).values
    log_weights = torch.linspace(0.1, 1.0, 15)
    bucket_of = torch.arange(N) % 2
    return Candidates(drawn[:8], drawn[15:30], log_weights, items, bucket_of, **options)


def of_positions(rows):
    ids = torch.randint(V, (rows, 7), generator=torch.Generator().manual_seed(2))
    return PositionCandidates(ids, torch.linspace(-1.0, 0.5, 7)[None])


def chunks():
    generator = torch.Generator().manual_seed(3)
    return Chunks(
        torch.randint(4, (2, N), generator=generator),
        torch.randint(4, (2, V), generator=generator),
        4,
        1,
    )


def exact_with_soft_cap(head, positions):
    return exact_cross_entropy(head._replace(post=LogitTransform(1.1, 3.0)), positions).loss


LOSSES = {
    "exact": lambda head, positions: exact_cross_entropy(head, positions).loss,
    "exact, soft cap": exact_with_soft_cap,
    "candidates": lambda head, positions: (
        candidate_cross_entropy(head, positions, candidates(control_variate=True)).loss
    ),
    "positions": lambda head, positions: (
        position_cross_entropy(head, positions, of_positions(N)).loss
    ),
    "positions, shared": lambda head, positions: (
        position_cross_entropy(head, positions, of_positions(1)).loss
    ),
    "chunks": lambda head, positions: chunk_cross_entropy(head, positions, chunks()),
}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_columns_of_two_tensors_are_those_of_one(name, with_bias):
    problem = make_problem(N, V, D + R, with_bias=with_bias)
    hidden, joined, labels, bias = (t if t is None else t.detach() for t in problem)
    weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    needs = list(itertools.product([True, False], repeat=4 if with_bias else 3))[:-1]
    for trained in needs:
        of_hidden, of_weight, of_low_rank, *of_bias = trained
        h = hidden.clone().requires_grad_(of_hidden)
        whole = joined.clone().requires_grad_(of_weight or of_low_rank)
        w, low_rank = joined[:, :D].clone(), joined[:, D:].clone()
        w.requires_grad_(of_weight)
        low_rank.requires_grad_(of_low_rank)
        b = None if bias is None else bias.clone().requires_grad_(of_bias[0])
        for position_weight in (None, torch.tensor(0.3, dtype=torch.float64)):
            positions = Positions(h, labels, position_weight)
            heads = Head(whole, bias=b, post=POST), Head(w, low_rank, b, POST)
            losses = [LOSSES[name](head, positions) for head in heads]
            torch.testing.assert_close(*losses)
            scalars = [x if x.dim() == 0 else (x * weights).sum() for x in losses]
            inputs = [t for t in (whole, h, b) if t is not None and t.requires_grad]
            wanted = dict(zip(map(id, inputs), torch.autograd.grad(scalars[0], inputs)))
            inputs = [t for t in (h, w, low_rank, b) if t is not None and t.requires_grad]
            for t, found in zip(inputs, torch.autograd.grad(scalars[1], inputs)):
                if t is w:
                    expected = wanted[id(whole)][:, :D]
                elif t is low_rank:
                    expected = wanted[id(whole)][:, D:]
                else:
                    expected = wanted[id(t)]
                torch.testing.assert_close(found, expected)


def test_scans_see_all_columns():
    problem = make_problem(N, V, D + R)
    hidden, joined, labels, bias = (t.detach() for t in problem)
    whole, cut = Head(joined, bias=bias), Head(joined[:, :D], joined[:, D:], bias)
    excluded = torch.tensor([3, 50])
    want = catalogue_topk(hidden, whole, 9, excluded=excluded)
    assert torch.equal(catalogue_topk(hidden, cut, 9, excluded=excluded), want)
    positions = Positions(hidden, labels)
    want = exact_scores(whole, positions, top_k=4)
    found = exact_scores(cut, positions, top_k=4)
    torch.testing.assert_close(found.log_probability, want.log_probability)
    assert torch.equal(found.top, want.top)


def test_gradients_lie_in_their_own_columns():
    head = Head(torch.zeros(9, 4, dtype=torch.bfloat16), torch.zeros(9, 2), torch.zeros(9))
    ids, rows = torch.tensor([2, 5]), torch.arange(14.0).view(2, 7)
    everywhere = -torch.ones(1, 7)
    weight, low_rank, bias = head.gradients((True, True, True), ids, rows, everywhere)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight[ids].float(), rows[:, :4])
    assert torch.equal(low_rank[ids], rows[:, 4:6])
    assert torch.equal(bias[ids], rows[:, 6])
    assert all((g[0] == -1).all() for g in (weight, low_rank, bias))
    masked = head._replace(masked=torch.tensor([1, 8]))
    for g in masked.gradients((True, True, True), ids, rows, everywhere):
        assert [float(g[i].flatten()[0]) for i in (0, 1, 8)] == [-1.0, 0.0, 0.0]
    needs = (False, True, True)
    assert head.num_frozen(needs) == 4
    found = head.gradients(needs, ids, rows[:, 4:], sparse=True)
    assert found[0] is None
    assert torch.equal(found[1][ids], rows[:, 4:6])
    assert float(found[2].sum()) == float(rows[:, 6].sum())
    assert head.gradients((True, False, False), ids, rows, sparse=True)[0].is_sparse
    assert head.num_frozen((False, False, False)) == 7
