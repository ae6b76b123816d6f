"""Buckets of positions, the catalogue scan, and the lists they make."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import make_problem

import sce_lm.ops.catalogue_scan as scan
from sce_lm import SCEConfig
from sce_lm.candidates.buckets import kmeans_buckets
from sce_lm.objectives.call import Call
from sce_lm.objectives.sce import SCE
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions


def test_kmeans_finds_well_separated_groups():
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 4, (200,), generator=generator)
    hidden = 20 * torch.eye(4)[group] + torch.randn(200, 4, generator=generator)
    centers, bucket = kmeans_buckets(hidden, 8, generator)
    for k in range(8):
        members = group[bucket == k]
        assert len(members.unique()) <= 1
        if len(members):
            torch.testing.assert_close(centers[k], hidden[bucket == k].mean(0))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(5, 70), st.integers(1, 9), st.integers(1, 300), st.booleans())
def test_scan_is_a_dense_topk(num_queries, v, k, tile_elements, with_bias):
    problem = make_problem(num_queries, v, 4, seed=v)
    bias = problem.bias.detach().float() if with_bias else None
    excluded = torch.arange(v)[:: max(2, v // 5)]
    k = min(k, v - len(excluded))
    weight, queries = problem.weight.detach().float(), problem.hidden.detach().float()
    scores = queries @ weight.T + (0 if bias is None else bias)
    scores[:, excluded] = -torch.inf
    wanted = torch.topk(scores, k).indices.sort(dim=1).values
    kept, scan.TILE_ELEMENTS = scan.TILE_ELEMENTS, tile_elements
    try:
        found = scan.catalogue_topk(queries, Head(weight, bias=bias), k, excluded=excluded)
    finally:
        scan.TILE_ELEMENTS = kept
    assert torch.equal(found, wanted)


def test_strata_are_disjoint():
    problem = make_problem(90, 400, 6)
    config = SCEConfig(
        num_buckets=7,
        bucket_candidates=30,
        shared_frequent=25,
        tail_candidates=80,
    )
    hidden, weight, labels, bias = (t.detach() for t in problem)
    sce = SCE(config)
    generator = torch.Generator().manual_seed(5)
    call = Call().begin(sce.state, labels, 400, generator)
    chosen = sce.choose(Head(weight, bias=bias), Positions(hidden, labels), call).candidates
    shared = set(chosen.shared.tolist())
    assert set(labels.tolist()) <= shared
    assert set(torch.topk(call.counts, 25).indices.tolist()) <= shared
    assert len(chosen.shared) == len(shared)
    assert not shared & set(chosen.tail.tolist())
    assert chosen.bucket_items.shape == (7, 30)
    for row in chosen.bucket_items.tolist():
        assert len(set(row)) == 30
        assert not shared & set(row)
        assert row == sorted(row)
    assert len(chosen.tail) == 80
    assert ((chosen.bucket_of >= 0) & (chosen.bucket_of < 7)).all()
