"""The numeric core against its straight-line reference, on drawn shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import gradients, make_problem, relative_error

import sce_lm.ops.candidate_blocks as layout
from sce_lm import LogitTransform
from sce_lm.objectives.reference import candidate_reference
from sce_lm.ops.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions

POSTS = [LogitTransform(), LogitTransform(scale=0.3), LogitTransform(1.5, 2.0)]


@st.composite
def problems(draw):
    """A problem with ragged sizes, and candidates that satisfy the core's contract."""
    n, v, d = draw(st.integers(1, 40)), draw(st.integers(8, 90)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**31))
    problem = make_problem(n, v, d, with_bias=draw(st.booleans()), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(v, generator=generator)
    num_shared = draw(st.integers(0, v - 4))
    rest = order[num_shared:]
    num_tail = draw(st.integers(0, len(rest)))
    tail = rest[torch.randperm(len(rest), generator=generator)[:num_tail]]
    items = bucket_of = log_weights = None
    if draw(st.booleans()):
        num_buckets = draw(st.integers(1, 5))
        size = draw(st.integers(1, len(rest)))
        lists = [
            rest[torch.randperm(len(rest), generator=generator)[:size]] for _ in range(num_buckets)
        ]
        items = torch.stack(lists).sort(dim=1).values
        bucket_of = torch.randint(0, num_buckets, (n,), generator=generator)
        if draw(st.booleans()):  # weights, and empty slots that repeat the id before
            log_weights = torch.rand(items.shape, generator=generator, dtype=torch.float64) - 0.5
            empty = torch.rand(items.shape, generator=generator) < 0.3
            empty[:, 0] = False
            log_weights = log_weights.masked_fill(empty, -torch.inf)
            items = items.masked_fill(empty, -1).cummax(dim=1).values
    candidates = Candidates(
        order[:num_shared],
        tail,
        torch.rand(num_tail, generator=generator, dtype=torch.float64) * 3,
        items,
        bucket_of,
        bucket_log_weights=log_weights,
        control_variate=log_weights is None and draw(st.booleans()),
    )
    return problem, candidates, draw(st.sampled_from(POSTS))


@settings(max_examples=120, deadline=None)
@given(problems(), st.sampled_from([1, 64, 2**21]))
def test_equals_the_reference(case, block_elements):
    problem, candidates, post = case
    head = problem.head(post)
    expected = candidate_reference(head, problem.positions(), candidates)
    weights = torch.linspace(0.5, 1.5, len(expected), dtype=expected.dtype)
    wanted = gradients((expected * weights).sum(), problem)
    kept, layout.BLOCK_ELEMENTS = layout.BLOCK_ELEMENTS, block_elements
    try:
        for position_weight in (None, weights):
            result = candidate_cross_entropy(head, problem.positions(position_weight), candidates)
            loss = result.loss if position_weight is not None else (result.loss * weights).sum()
            torch.testing.assert_close(loss, (expected * weights).sum(), rtol=1e-9, atol=1e-9)
            for actual, want in zip(gradients(loss, problem), wanted):
                torch.testing.assert_close(actual, want, rtol=1e-7, atol=1e-8)
    finally:
        layout.BLOCK_ELEMENTS = kept


def test_weighted_buckets_have_no_control_variate():
    problem = make_problem(3, 9, 2, with_bias=False)
    candidates = Candidates(
        torch.arange(0),
        torch.arange(5, 9),
        torch.zeros(4),
        torch.arange(4)[None],
        torch.zeros(3, dtype=torch.int64),
        bucket_log_weights=torch.zeros(1, 4),
        control_variate=True,
    )
    with pytest.raises(ValueError, match="use control_variate=False"):
        candidate_cross_entropy(problem.head(), problem.positions(), candidates)


def test_groups_of_buckets_hold_little_padding():
    """Every position is in exactly one group, and padding stays within a tenth."""
    generator = torch.Generator().manual_seed(0)
    for spread in (0.0, 1.0, 3.0):
        sizes = (torch.randn(64, generator=generator) * spread).exp().mul(20).long()
        labels = torch.zeros(int(sizes.sum()), dtype=torch.int64)
        bucket_of = torch.repeat_interleave(torch.arange(64), sizes)
        bucket_of = bucket_of[torch.randperm(len(labels), generator=generator)]
        problem = make_problem(len(labels), 300, 4, with_bias=False)
        candidates = Candidates(
            torch.arange(0),
            torch.arange(0),
            torch.zeros(0),
            torch.arange(100).expand(64, -1),
            bucket_of,
        )
        lists = layout.Lists(problem.head(), Positions(problem.hidden, labels), candidates)
        spans = lists.spans()
        assert torch.equal(lists.order.sort().values, torch.arange(len(labels)))
        assert [s.start for s in spans[1:]] == [s.stop for s in spans[:-1]]
        for span in spans:
            assert span.groups[-1].rows.stop == span.stop - span.start
            for group in span.groups:
                buckets = span.buckets[group.buckets]
                count = group.rows.stop - group.rows.start
                assert len(buckets) * group.longest <= layout.PADDING * count
                at = lists.order[span.start :][group.rows]
                assert set(bucket_of[at].tolist()) == set(buckets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
def test_low_precision_is_as_good_as_stock(dtype, control):
    """Error against fp64 at most that of stock cross-entropy over the same candidates."""
    n, v, d = 300, 700, 130
    exact_inputs = make_problem(n, v, d, with_bias=False, spread=2.0)
    low = [t.detach().to(dtype) for t in exact_inputs[:2]]
    problem = exact_inputs._replace(
        hidden=low[0].double().requires_grad_(), weight=low[1].double().requires_grad_()
    )
    bucket_of = torch.arange(n) % 3
    items = torch.stack([torch.arange(v)[k::4][:100] for k in range(3)])
    shared = torch.arange(3, v, 4)[:120]
    tail = torch.cat([torch.arange(600, v)[torch.arange(600, v) % 4 == k] for k in range(3)])
    candidates = Candidates(
        shared, tail, torch.full((len(tail),), 0.7), items, bucket_of, control_variate=control
    )
    expected = candidate_reference(problem.head(), problem.positions(), candidates)
    wanted = gradients(expected.mean(), problem)
    cast = problem._replace(hidden=low[0].requires_grad_(), weight=low[1].requires_grad_())
    positions = cast.positions(torch.tensor(1.0 / n))
    ours = candidate_cross_entropy(cast.head(), positions, candidates).loss
    ours_gradients = gradients(ours, cast)
    stock = candidate_reference(cast.head(), positions, candidates).float().mean()
    stock_gradients = gradients(stock, cast)
    assert ours.dtype == torch.float32
    assert all(g.dtype == dtype for g in ours_gradients)
    slack = 2e-6
    assert relative_error(ours, expected.mean()) <= relative_error(stock, expected.mean()) + slack
    for mine, theirs, want in zip(ours_gradients, stock_gradients, wanted):
        rounding = torch.finfo(dtype).eps
        assert relative_error(mine, want) <= max(relative_error(theirs, want), rounding) + slack


def test_large_deltas_stay_finite_in_fp32():
    """exp(95) overflows fp32; the shifted sums do not, and equal fp64."""
    problem = make_problem(4, 50, 3, with_bias=False)
    weight = problem.weight.detach().clone()
    first = problem.hidden[0].detach()
    weight[7] = first * 95.0 / first.norm() ** 2
    shared = torch.arange(20, 50)
    candidates = Candidates(shared, torch.arange(20), torch.full((20,), 0.3), control_variate=True)
    labels = torch.tensor([8, 7, 30, 31])
    wide = problem._replace(weight=weight.requires_grad_(), labels=labels)
    expected = candidate_reference(wide.head(), wide.positions(), candidates)
    wanted = gradients(expected.sum(), wide)
    narrow = wide._replace(
        hidden=problem.hidden.detach().float().requires_grad_(),
        weight=weight.detach().float().requires_grad_(),
    )
    positions = narrow.positions(torch.tensor(1.0))
    loss = candidate_cross_entropy(narrow.head(), positions, candidates).loss
    assert relative_error(loss, expected.sum()) < 1e-6
    for actual, want in zip(gradients(loss, narrow), wanted):
        assert relative_error(actual, want) < 1e-5


def test_clamped_positions_use_only_what_was_seen():
    """A capped phi can be negative enough to swallow Zhat; it is then dropped and counted."""
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    x = torch.full((40,), -6.0, dtype=torch.float64)
    x[:20] = 6.0
    weight = x[:, None].clone().requires_grad_()
    head = Head(weight, post=LogitTransform(1.0, 1.0))
    candidates = Candidates(
        torch.arange(0),
        torch.tensor([0, 1]),
        torch.tensor([4.0, 4.0]),
        control_variate=True,
    )
    positions = Positions(hidden, torch.tensor([39]))
    result = candidate_cross_entropy(head, positions, candidates)
    assert result.num_clamped == 1
    expected = candidate_reference(head, positions, candidates)
    torch.testing.assert_close(result.loss, expected)
    for actual, want in zip(
        torch.autograd.grad(result.loss.sum(), (hidden, weight)),
        torch.autograd.grad(expected.sum(), (hidden, weight)),
    ):
        torch.testing.assert_close(actual, want)


@pytest.mark.parametrize("control", [False, True], ids=["plain", "control"])
def test_sparse_gradient_lacks_only_the_part_through_the_mean(control):
    problem = make_problem(20, 60, 4, with_bias=False)
    fields = (torch.arange(10), torch.arange(30, 45), torch.full((15,), 0.5))
    dense = Candidates(*fields, control_variate=control)
    sparse = Candidates(*fields, control_variate=control, sparse_grad=True)
    found = []
    for candidates in (dense, sparse):
        loss = candidate_cross_entropy(problem.head(), problem.positions(), candidates).loss.sum()
        found.append(torch.autograd.grad(loss, problem.weight)[0])
    assert found[1].is_sparse
    touched = torch.unique(torch.cat([*fields[:2], problem.labels]))
    assert torch.equal(found[1].coalesce().indices()[0], touched)
    missing = found[0] - found[1].to_dense()
    if control:  # the same vector in every row of the rest, none in the shared rows
        torch.testing.assert_close(missing[10:], missing[10:11].expand(50, -1))
    torch.testing.assert_close(missing[:10], torch.zeros_like(missing[:10]))
    assert control == bool(missing.abs().max() > 1e-6)


def test_no_logits_are_kept_for_the_backward_pass():
    """Saved tensors and gradients are far smaller than [N, K]."""
    n, v, d, k = 2000, 3000, 4, 1500
    problem = make_problem(n, v, d, with_bias=False, dtype=torch.float32)
    candidates = Candidates(torch.arange(k), torch.arange(0), torch.zeros(0))
    saved: list[torch.Tensor] = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    for position_weight in (None, torch.tensor(1.0)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            positions = problem.positions(position_weight)
            loss = candidate_cross_entropy(problem.head(), positions, candidates).loss
        held = [t.numel() for t in saved]
        if position_weight is not None:
            sums = vars(loss.grad_fn.gradients).values()
            held += [t.numel() for t in sums if torch.is_tensor(t)]
        assert sum(held) < n * k / 20


def test_empty_places_of_the_tail_are_not_there():
    """A place with ``c = -inf`` may hold any id, also one that is listed elsewhere."""
    problem = make_problem(20, 60, 5)
    shared, tail = torch.arange(10), torch.arange(20, 35)
    c = torch.linspace(0, 1, 15, dtype=torch.float64)
    padded = torch.cat([tail[:7], torch.zeros(3).long(), tail[7:]])
    padded_c = torch.cat([c[:7], torch.full((3,), -torch.inf).double(), c[7:]])
    head = problem.head(LogitTransform(1.0, 2.0))
    results = []
    for ids, log_weights in ((tail, c), (padded, padded_c)):
        candidates = Candidates(shared, ids, log_weights, control_variate=True)
        loss = candidate_cross_entropy(head, problem.positions(), candidates).loss
        results.append([loss, *torch.autograd.grad(loss.sum(), problem.parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
