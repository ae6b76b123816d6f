"""What is read off logits, against the logits themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.allocations import Sizes
from support.problems import make_problem, relative_error

import sce_lm.ops.logit_stream as core
from sce_lm import LogitTransform
from sce_lm.ops.head import Head
from sce_lm.ops.row_reductions import RowReductions, row_reductions

EVERYTHING = {"entropy": True, "expected_logit": True, "logit_sum": True}
POSTS = [LogitTransform(), LogitTransform(0.3), LogitTransform(1.5, 2.0)]


def logits(head: Head, hidden):
    width = head.weight.shape[1]
    x = hidden[:, :width] @ head.weight.T
    if head.low_rank is not None:
        x = x + hidden[:, width:] @ head.low_rank.T
    return head.post(x if head.bias is None else x + head.bias)


def reference(s, ids=None, top_k=0) -> list:
    """The results as tensors, from logits ``[N, V]``."""
    p, log_p = s.softmax(dim=1), s.log_softmax(dim=1)
    is_zero = p == 0  # 0 · -inf = 0
    top = s.sort(dim=1, descending=True, stable=True)
    return [
        s.logsumexp(dim=1),
        None if ids is None else s.gather(1, ids.view(len(s), ids[:1].numel())).view(ids.shape),
        -(p * log_p.masked_fill(is_zero, 0.0)).sum(dim=1),
        (p * s.masked_fill(is_zero, 0.0)).sum(dim=1),
        s.sum(dim=1),
        top.values[:, :top_k] if top_k else None,
        top.indices[:, :top_k] if top_k else None,
    ]


def flat(found: RowReductions) -> list:
    return [*found[:5], *(found.top or (None, None))]


def backward(results, inputs, seed=0) -> list:
    """Gradients of the results' random combination."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [r for r in results if r is not None and r.is_floating_point()]
    factors = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in outputs]
    factors = [f.to(r.dtype) for f, r in zip(factors, outputs)]
    return list(torch.autograd.grad(outputs, inputs, factors))


@settings(max_examples=120)
@given(
    n=st.integers(0, 12),
    v=st.integers(1, 90),
    d=st.integers(1, 6),
    rank=st.integers(0, 2),
    bias=st.sampled_from(["none", "some", "masked"]),
    post=st.sampled_from(POSTS),
    num_ids=st.sampled_from([None, (), (1,), (7,)]),
    top_k=st.sampled_from([0, 1, 3, 90]),
    asked=st.sets(st.sampled_from(sorted(EVERYTHING))),
    frozen=st.sets(st.sampled_from(["hidden", "weight", "low_rank", "bias"]), max_size=3),
    tiles=st.sampled_from([(2048, 1024), (7, 5)]),
    seed=st.integers(0, 10**6),
)
def test_equals_what_torch_reads_off_the_logits(
    n, v, d, rank, bias, post, num_ids, top_k, asked, frozen, tiles, seed
):
    problem = make_problem(n, v, d + rank, with_bias=bias != "none", seed=seed)
    weight, low_rank = problem.weight.detach().split([d, rank], dim=1)
    bias = None if problem.bias is None else problem.bias.detach().clone()
    if bias is not None and seed % 3 == 0:
        bias[torch.arange(v) % 4 != seed % min(v, 4)] = -torch.inf
    parts = {
        "hidden": problem.hidden.detach(),
        "weight": weight.clone(),
        "low_rank": low_rank.clone() if rank else None,
        "bias": bias,
    }
    inputs = [t.requires_grad_() for k, t in parts.items() if t is not None and k not in frozen]
    hidden, *tensors = parts.values()
    head = Head(*tensors, post)
    ids = None if num_ids is None else torch.randint(v, (n, *num_ids))
    top_k = min(top_k, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "TILE_CLASSES", tiles[0])
        patch.setattr(core, "TILE_POSITIONS", tiles[1])
        options = {name: name in asked for name in EVERYTHING}
        found = flat(row_reductions(head, hidden, ids=ids, top_k=top_k, **options))
        wanted = reference(logits(head, hidden), ids, top_k)
        for place, name in enumerate(EVERYTHING, start=2):
            wanted[place] = wanted[place] if name in asked else None
        for mine, want in zip(found, wanted):
            assert (mine is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-10)
        if not inputs:
            return
        for mine, want in zip(backward(found, inputs), backward(wanted, inputs)):
            torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("post", POSTS[::2], ids=str)
def test_low_precision_is_as_good_as_stock(dtype, post, monkeypatch):
    """Error against fp64 at most that of the same from stock logits, with many tiles and blocks."""
    monkeypatch.setattr(core, "TILE_CLASSES", 101)
    monkeypatch.setattr(core, "TILE_POSITIONS", 90)
    drawn = make_problem(300, 700, 130, with_bias=False, spread=2.0)
    low = [t.detach().to(dtype) for t in drawn[:2]]
    hidden, weight = (t.double().requires_grad_() for t in low)
    wanted = reference(logits(Head(weight, post=post), hidden), drawn.labels)[:5]
    of_wanted = backward(wanted, [hidden, weight])
    hidden, weight = (t.requires_grad_() for t in low)
    head = Head(weight, post=post)
    ours = row_reductions(head, hidden, ids=drawn.labels, **EVERYTHING)[:5]
    stock = reference(logits(head, hidden).float(), drawn.labels)[:5]
    for mine, theirs, want in zip(ours, stock, wanted):
        assert mine.dtype == torch.float32
        assert relative_error(mine, want) <= relative_error(theirs, want) + 2e-6
    for mine, theirs, want in zip(
        backward(ours, [hidden, weight]), backward(stock, [hidden, weight]), of_wanted
    ):
        assert mine.dtype == dtype
        limit = max(relative_error(theirs, want), torch.finfo(dtype).eps)
        assert relative_error(mine, want) <= limit + 2e-6


@pytest.mark.parametrize("k", [1, 2, 5, 60])
def test_of_equal_logits_the_first_classes_count(k, monkeypatch):
    monkeypatch.setattr(core, "TILE_CLASSES", 13)
    hidden = torch.randint(-1, 2, (40, 3), generator=torch.Generator().manual_seed(0)).float()
    weight = torch.randint(-1, 2, (60, 3), generator=torch.Generator().manual_seed(1)).float()
    top = row_reductions(Head(weight), hidden, top_k=k).top
    s = hidden @ weight.T
    assert torch.equal(top.indices, s.sort(dim=1, descending=True, stable=True).indices[:, :k])
    assert torch.equal(top.indices[:, 0], s.argmax(dim=1))


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_a_whole_tile_of_masked_classes(mask, monkeypatch):
    """The first tile has no class that counts; classes masked anywhere add 0 to an entropy."""
    monkeypatch.setattr(core, "TILE_CLASSES", 16)
    problem = make_problem(9, 64, 4, dtype=torch.float32)
    bias = problem.bias.detach().clone()
    bias[:20] = bias[40] = mask
    head = Head(problem.weight, bias=bias)
    found = row_reductions(head, problem.hidden, entropy=True, expected_logit=True, top_k=50)
    kept = bias > -1e8
    wanted = reference(logits(head, problem.hidden)[:, kept])
    inputs = [problem.hidden, problem.weight]
    for mine, want in zip(found[:4], wanted[:4]):
        if mine is not None:
            torch.testing.assert_close(mine, want)
    mine, want = (backward([r[0], *r[2:4]], inputs) for r in (found, wanted))
    for actual, expected in zip(mine, want):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_no_logits_of_all_positions_and_classes(monkeypatch):
    """Values and gradients of everything: N numbers, and a tile."""
    monkeypatch.setattr(core, "TILE_CLASSES", 64)
    monkeypatch.setattr(core, "TILE_POSITIONS", 64)
    problem = make_problem(400, 500, 8, dtype=torch.float32)
    with Sizes(problem.hidden) as seen:
        found = row_reductions(
            problem.head(), problem.hidden, ids=problem.labels, top_k=4, **EVERYTHING
        )
        backward(flat(found), problem.parameters)
    assert seen.largest < 400 * 500 / 10


def test_a_frozen_head_is_streamed_once(monkeypatch):
    """Unless more is asked for than log Z and a few logits."""
    problem = make_problem(20, 300, 8)
    head = problem.head()._replace(weight=problem.weight.detach(), bias=problem.bias.detach())
    found = row_reductions(head, problem.hidden, ids=problem.labels, top_k=2)
    both = row_reductions(head, problem.hidden, entropy=True)
    monkeypatch.setattr(core.LogitStream, "tiles", lambda self: pytest.fail("streamed again"))
    (of_hidden,) = backward(flat(found), [problem.hidden])
    wanted = reference(logits(head, problem.hidden), problem.labels, 2)
    wanted[2:5] = [None] * 3
    torch.testing.assert_close(of_hidden, backward(wanted, [problem.hidden])[0])
    with pytest.raises(pytest.fail.Exception):
        backward(flat(both), [problem.hidden])


def test_nothing_is_kept_without_gradient():
    problem = make_problem(5, 9, 4)
    with torch.no_grad():
        found = row_reductions(problem.head(), problem.hidden, top_k=2, **EVERYTHING)
    assert all(t is None or t.grad_fn is None for t in flat(found))


def test_no_second_derivative():
    problem = make_problem(5, 9, 4)
    log_z = row_reductions(problem.head(), problem.hidden).log_partition
    factors = torch.ones_like(log_z).requires_grad_()
    (first,) = torch.autograd.grad(log_z, problem.hidden, factors, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


class CutByRows(torch.Tensor):
    placements = ()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden": torch.zeros(5, 3)}, r"hidden of shape \(5, 3\); this head needs \[N, 4\]"),
        ({"top_k": 10}, "top_k=10; 0 to 9, the number of classes"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, r"ids of shape \(4,\)"),
        ({"ids": torch.zeros(5)}, r"and torch.float32; int64 \[5\] or \[5, K\] is needed"),
        ({"ids": torch.tensor([0, 1, -100, 2, 3])}, r"ids from -100 to 3; they must lie in"),
        ({"ids": torch.tensor([0, 1, 9, 2, 3])}, r"ids from 0 to 9"),
        ({"head": Head(torch.zeros(9, 4).as_subclass(CutByRows))}, "spread over processes"),
    ],
)
def test_bad_inputs_are_named(change, sentence):
    arguments = {"head": Head(torch.zeros(9, 4)), "hidden": torch.zeros(5, 4), **change}
    with pytest.raises(ValueError, match=sentence):
        row_reductions(**arguments)
