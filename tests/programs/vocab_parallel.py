"""What tests of the vocabulary-parallel loss do on each rank: ``... FOLDER NAME ...`` calls the
functions of these names, and a failed assertion ends the process with an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.launch import start
from support.monte_carlo import CAP, LISTS, PLAIN, call_bias, exact_loss, peaked_problem
from support.planted import plant
from support.problems import Problem, gradients, make_problem, relative_error

from sce_lm import LogitTransform, SCEConfig, SCEState, objectives
from sce_lm.distributed import own_rows, vocab_parallel_loss, vocab_parallel_scores
from sce_lm.objectives.reference import exact_reference
from sce_lm.objectives.sce import SCE
from sce_lm.ops.candidate_blocks import Lists
from sce_lm.ops.control_variate import Rest
from sce_lm.ops.exact_cross_entropy import exact_scores
from sce_lm.ops.positions import Positions
from sce_lm.training.measure import start_peak

N, V, D = 61, 203, 12
NO_SHARED = {"shared_labels": False, "shared_frequent": 0}
EXACT = objectives.get("exact")
COVERING = {
    "exact": EXACT,
    "shared": SCEConfig(num_buckets=0, shared_frequent=V, tail_candidates=0),
    "bucket": SCEConfig(
        num_buckets=5, bucket_candidates=V, tail_candidates=V, control_variate=True, **NO_SHARED
    ),
    "tail": SCEConfig(num_buckets=0, tail_candidates=V, control_variate=True, **NO_SHARED),
    "all": SCEConfig(
        num_buckets=5,
        bucket_candidates=40,
        shared_frequent=20,
        tail_candidates=V,
    ),
}
"""Every class is a candidate, so that the loss is exact cross-entropy."""
SAMPLED = SCEConfig(num_buckets=4, bucket_candidates=20, shared_frequent=10, tail_candidates=30)


def shard(problem: Problem, vocab_size: int = V) -> Problem:
    """This rank's rows as leaves, and hidden states of its own."""
    rows = own_rows(vocab_size)
    hidden, weight, labels, bias = problem
    own = [
        None if t is None else t.detach().clone().requires_grad_()
        for t in (hidden, weight[rows], None if bias is None else bias[rows])
    ]
    return Problem(own[0], own[1], labels, own[2])


def assert_covering_candidates_are_exact(name: str, with_bias: bool, post, dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    problem = make_problem(N, V, D, with_bias=with_bias, spread=2.0)
    problem.labels[::7] = -100
    valid = problem.labels != -100
    positions = Positions(problem.hidden[valid], problem.labels[valid])
    exact = exact_reference(problem.head(post), positions)
    own = shard(
        problem._replace(
            **{
                k: None if t is None else t.detach().to(dtype)
                for k, t in problem._asdict().items()
                if k != "labels"
            }
        )
    )
    rows, places = own_rows(V), torch.arange(N, dtype=torch.float64)
    options = {"vocab_size": V, "bias": own.bias, "post": post, "config": COVERING[name]}
    for reduction, expected in (
        ("mean", exact.mean()),
        ("sum", exact.sum()),
        ("none", (exact * places[valid]).sum()),
    ):
        loss = vocab_parallel_loss(*own[:3], reduction=reduction, **options)
        if reduction == "none":
            assert (loss[~valid] == 0).all()
            loss = (loss * places).sum()
        assert relative_error(loss, expected) < tolerance
        wanted = torch.autograd.grad(expected, problem.parameters, retain_graph=True)
        wanted = [wanted[0], *(g[rows] for g in wanted[1:])]
        for actual, want in zip(gradients(loss, own), wanted):
            assert relative_error(actual, want) < tolerance


def limits() -> None:
    """V is no multiple of the ranks."""
    for name in COVERING:
        for post in (LogitTransform(), LogitTransform(1.7, 3.0)):
            for with_bias, dtype in ((False, torch.float32), (True, torch.float64)):
                assert_covering_candidates_are_exact(name, with_bias, post, dtype)


def labels_first() -> None:
    """The first call is a softmax over all ranks' labels; a rank may have none of them."""
    problem = make_problem(N, V, D)
    for labels in (problem.labels, problem.labels % (V // dist.get_world_size() // 2)):
        seen, target = torch.unique(labels, return_inverse=True)
        logits = problem.hidden @ problem.weight[seen].T + problem.bias[seen]
        expected = torch.nn.functional.cross_entropy(logits, target)
        own, config = shard(problem), SCEConfig(labels_first=1)
        loss = vocab_parallel_loss(
            *own[:2], labels, vocab_size=V, bias=own.bias, config=config, state=SCEState()
        )
        assert relative_error(loss, expected) < 1e-10
        wanted = torch.autograd.grad(expected, problem.parameters)
        rows = own_rows(V)
        for actual, want in zip(gradients(loss, own), [wanted[0], *(g[rows] for g in wanted[1:])]):
            assert relative_error(actual, want) < 1e-10 if want.any() else not actual.any()


def num_items_and_token_weights() -> None:
    problem, weights = make_problem(N, V, D), torch.linspace(0, 2, N, dtype=torch.float64)
    total = exact_reference(problem.head(), problem.positions()) @ weights
    own = shard(problem)
    loss = vocab_parallel_loss(
        *own[:3],
        vocab_size=V,
        bias=own.bias,
        config=EXACT,
        num_items_in_batch=torch.tensor(500),
        token_weights=weights,
    )
    assert relative_error(loss, total / 500) < 1e-10
    wanted = torch.autograd.grad(total / 500, problem.parameters)
    assert relative_error(gradients(loss, own)[0], wanted[0]) < 1e-10


@contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """Bytes of the all-reduces inside."""
    called: list[int] = []
    reduce = dist.all_reduce

    def counting(x, *args, **options):
        called.append(x.nbytes)
        return reduce(x, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counting)
        yield called


def collectives() -> None:
    """As many whatever the labels are; where all are ignored the loss is a connected zero."""
    problem = make_problem(N, V, D, dtype=torch.float32)
    first = -(-V // dist.get_world_size())
    some = {
        "spread": problem.labels,
        "on the first rank": problem.labels % first,
        "one": torch.full_like(problem.labels, -100).index_fill(0, torch.tensor([3]), 5),
        "none": torch.full_like(problem.labels, -100),
    }
    for config in (EXACT, SAMPLED):
        for return_stats in (False, True):
            found = set()
            for name, labels in some.items():
                own = shard(problem)
                with counted_collectives() as called:
                    loss = vocab_parallel_loss(
                        *own[:2],
                        labels,
                        vocab_size=V,
                        bias=own.bias,
                        config=config,
                        return_stats=return_stats,
                    )
                    loss = loss[0] if return_stats else loss
                    loss.backward()
                found.add(len(called))
                # A sampler asks for the largest bias, by which it knows masked classes.
                asked = [] if config is EXACT else [own.bias.element_size()]
                if name == "spread" and not return_stats:
                    assert called == [*asked, 4 * N, 12 * N, 4 * N * D]  # bytes, in fp32
                assert loss.isfinite()
                assert own.hidden.grad is not None
                assert own.weight.grad is not None
                if name == "none":
                    assert loss == 0
                    assert not own.hidden.grad.any()
                    assert not own.weight.grad.any()
            assert len(found) == 1, found
            extra = return_stats * (2 if config is EXACT else 1)
            assert found.pop() == 3 + extra + len(asked)


def masks() -> None:
    """Classes that a bias masks, in between or all that a rank has, are left out on every rank."""
    last = V - V // dist.get_world_size() - 1
    control = {"tail_candidates": 40, "control_variate": True, "uniform_floor": 0.5}
    sampled = SCEConfig(num_buckets=2, bucket_candidates=10, shared_frequent=10, **control)
    for value in (-1e9, torch.finfo(torch.float32).min, -torch.inf):
        for gone in (torch.arange(0, V, 7), torch.arange(last, V)):
            problem = make_problem(N, V, D)
            kept = torch.ones(V, dtype=torch.bool).index_fill(0, gone, False)
            labels = kept.nonzero().squeeze(1)[problem.labels % int(kept.sum())]
            bias = problem.bias.detach().index_fill(0, gone, value).requires_grad_()
            problem = Problem(problem.hidden, problem.weight, labels, bias)
            logits = problem.hidden @ problem.weight.T + bias
            exact = torch.nn.functional.cross_entropy(logits, labels)
            wanted = torch.autograd.grad(exact, problem.parameters)
            own, rows = shard(problem), own_rows(V)
            for config in [*COVERING.values(), sampled]:
                options = {"vocab_size": V, "bias": own.bias, "config": config}
                loss = vocab_parallel_loss(*own[:3], **options)
                tolerance = 0.1 if config is sampled else 1e-10
                assert relative_error(loss, exact) < tolerance, (config, value, loss, exact)
                found = gradients(loss, own)
                for actual, want in zip(found, [wanted[0], *(g[rows] for g in wanted[1:])]):
                    assert actual.isfinite().all()
                    if config is not sampled:
                        assert (actual - want).norm() <= 1e-10 * wanted[1].norm()
                for actual in found[1:]:
                    assert (actual[~kept[rows]] == 0).all()


def scores() -> None:
    """Exact top-k and accuracy, with ties between ranks, k beyond a rank's rows and beyond V."""
    problem = make_problem(N, V, D, dtype=torch.float64)
    with torch.no_grad():
        problem.weight[0], problem.bias[0] = 0.0, 1.0
        problem.weight[0, 0] = 8.0
        problem.weight[-1], problem.bias[-1] = problem.weight[0], problem.bias[0]
    problem.labels[:3] = torch.tensor([0, V - 1, 0])
    hidden = problem.hidden.detach().clone()
    hidden[:3] = torch.eye(D)[0] * 4.0  # the first row and the last win, equal to the last bit
    problem = problem._replace(hidden=hidden)
    own = shard(problem)
    for post in (LogitTransform(), LogitTransform(1.7, 3.0)):
        for k in (1, 7, V - 1, V + 9):
            want = exact_scores(problem.head(post), problem.positions(), top_k=k)
            got = vocab_parallel_scores(*own[:3], top_k=k, vocab_size=V, bias=own.bias, post=post)
            torch.testing.assert_close(got.log_probability, want.log_probability)
            assert got.top.shape == want.top.shape
            logits = post(problem.hidden @ problem.weight.T + problem.bias)
            torch.testing.assert_close(logits.gather(1, got.top), logits.gather(1, want.top))
            assert torch.equal(got.correct, want.correct)
        loss, stats = vocab_parallel_loss(
            *own[:3],
            vocab_size=V,
            bias=own.bias,
            post=post,
            config=EXACT,
            reduction="none",
            return_stats=True,
        )
        torch.testing.assert_close(loss, -want.log_probability)
        assert torch.equal(stats.correct, want.correct)
        torch.testing.assert_close(stats.confidence, logits.softmax(dim=1).amax(dim=1))
        assert stats.correct[:3].tolist() == [True, False, True]


def dtensors() -> None:
    """A head that is one DTensor has a gradient that is one."""
    problem = make_problem(N, V, D, dtype=torch.float64)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    weight, bias = (
        torch.nn.Parameter(dist.tensor.distribute_tensor(t.detach(), mesh, [Shard(0)]))
        for t in (problem.weight, problem.bias)
    )
    hidden = problem.hidden.detach().clone().requires_grad_()
    for config in (EXACT, COVERING["all"]):
        loss = vocab_parallel_loss(hidden, weight, problem.labels, bias=bias, config=config)
        exact = exact_reference(problem.head(), problem.positions()).mean()
        assert relative_error(loss, exact) < 1e-10
        got = torch.autograd.grad(loss, [hidden, weight, bias])
        assert isinstance(got[1], DTensor)
        assert got[1].placements == (Shard(0),)
        got = [g.full_tensor() if isinstance(g, DTensor) else g for g in got]
        for actual, wanted in zip(got, torch.autograd.grad(exact, problem.parameters)):
            assert relative_error(actual, wanted) < 1e-10
    replicated = dist.tensor.distribute_tensor(problem.weight.detach(), mesh, [Replicate()])
    with pytest.raises(ValueError, match="a head that is shared by rows has"):
        vocab_parallel_loss(hidden, replicated, problem.labels)


def refusals() -> None:
    """Every rank refuses alike, so that none waits for another."""
    problem = make_problem(N, V, D)
    own = shard(problem)
    options = {"vocab_size": V, "bias": own.bias}
    shifted = (own.labels + 100 * dist.get_rank()) % V
    with pytest.raises(ValueError, match="got different labels"):
        vocab_parallel_loss(*own[:2], shifted, **options)
    with pytest.raises(ValueError, match="this rank holds rows"):
        vocab_parallel_loss(*problem[:3], vocab_size=V)
    with pytest.raises(ValueError, match="give vocab_size"):
        vocab_parallel_loss(*own[:3])
    with pytest.raises(ValueError, match="leave nothing for the last of"):
        own_rows(dist.get_world_size() - 1)
    with pytest.raises(ValueError, match=r"outside \[0, 203\)"):
        vocab_parallel_loss(*own[:2], own.labels + V, **options)
    for config in (
        SCEConfig.published(),
        SCEConfig(prior={"labels": 1.0, "gradient": 0.5}),
        SCEConfig(bucket_sampling="priority", num_buckets=2),
        SCEConfig(row_control_variate=True),
        SCEConfig(z_loss=0.1),
        objectives.get("exact", label_smoothing=0.1),
        objectives.get("rece"),
    ):
        with pytest.raises(ValueError, match="no vocabulary-parallel form"):
            vocab_parallel_loss(*own[:3], **options, config=config)
    with pytest.raises(ValueError, match="state of its own"):
        vocab_parallel_loss(*own[:3], **options, config=EXACT, state=SCEState())


def replays() -> None:
    """Gradient checkpointing meets the candidates of its first run, rank by rank."""
    problem = make_problem(N, V, D)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(dist.get_rank())
        own, state = shard(problem), SCEState()

        def loss(hidden, own=own, state=state):
            return vocab_parallel_loss(
                hidden, *own[1:3], vocab_size=V, bias=own.bias, config=SAMPLED, state=state
            )

        for _ in range(3):
            if checkpointed:
                total = torch.utils.checkpoint.checkpoint(loss, own.hidden, use_reentrant=False)
            else:
                total = loss(own.hidden)
            total.backward()
        found.append([own.hidden.grad, own.weight.grad, state.counts])
    for once, again in zip(*found):
        assert torch.equal(once, again)


def low_rank() -> None:
    """A low-rank operand is cut by rows as the weight is, and may be all that is trained."""
    problem = make_problem(N, V, D)
    generator = torch.Generator().manual_seed(7)
    b, u = (
        torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_() for n in (V, N)
    )
    wide = torch.cat([problem.hidden, u], dim=1)
    full = problem._replace(hidden=wide, weight=torch.cat([problem.weight, b], dim=1))
    exact = exact_reference(full.head(), full.positions()).mean()
    wanted = torch.autograd.grad(exact, [problem.hidden, u, b])
    rows, own = own_rows(V), shard(problem)
    own_b = b.detach()[rows].clone().requires_grad_()
    for config in (EXACT, COVERING["all"]):
        loss = vocab_parallel_loss(
            wide,
            own.weight.detach(),
            own.labels,
            vocab_size=V,
            bias=own.bias.detach(),
            low_rank=own_b,
            config=config,
        )
        assert relative_error(loss, exact) < 1e-10
        got = torch.autograd.grad(loss, [problem.hidden, u, own_b], retain_graph=True)
        for actual, want in zip(got, (*wanted[:2], wanted[2][rows])):
            assert relative_error(actual, want) < 1e-10


def row_sparse() -> None:
    """The dense gradient's rows; those that no list and no label names are left out."""
    problem = make_problem(N, V, D)
    options = {"num_buckets": 0, "control_variate": False, "tail_candidates": 40}
    found = []
    for sparse_grad in (False, True):
        own = shard(problem)
        config = SCEConfig(**options, **NO_SHARED, sparse_grad=sparse_grad)
        seed = torch.Generator().manual_seed(dist.get_rank())
        vocab_parallel_loss(
            *own[:3], vocab_size=V, bias=own.bias, config=config, generator=seed
        ).backward()
        found.append(own.weight.grad)
    dense, sparse = found
    assert sparse.is_sparse
    assert len(sparse._indices()[0]) < len(dense)
    torch.testing.assert_close(sparse.to_dense(), dense)


def statistics() -> None:
    """The relative error that is reported is the standard deviation of Zhat over Z, and the
    candidates are ids of the whole head, each rank's among its own rows."""
    problem = peaked_problem()
    rows = own_rows(len(problem.weight))
    objective = SCE(SCEConfig(tail_candidates=60, control_variate=False, **LISTS["all"]))
    own = shard(problem, len(problem.weight))
    exact = exact_loss(problem)
    errors, logs = [], []
    for seed in range(300):
        with torch.no_grad():
            loss, stats = vocab_parallel_loss(
                *own[:3],
                vocab_size=len(problem.weight),
                bias=own.bias,
                config=objective,
                generator=torch.Generator().manual_seed(seed),
                reduction="none",
                return_stats=True,
            )
        errors.append(stats.relative_error)
        logs.append(loss - exact)
        assert torch.isin(stats.candidates, torch.arange(rows.start, rows.stop)).all()
    spread = torch.stack(logs).exp().std(dim=0)
    reported = torch.stack(errors).square().mean(dim=0).sqrt()
    torch.testing.assert_close(reported, spread, rtol=0.15, atol=0)


def bias_of(lists: str, post, draws: int, *, control: bool, m: int = 80, spread: float = 0.5):
    """The Monte-Carlo test of one process, whose rows are now spread over ranks."""
    problem = peaked_problem(post, spread=spread)
    vocab_size = len(problem.weight)
    own, rows = shard(problem, vocab_size), own_rows(vocab_size)
    config = SCEConfig(
        tail_candidates=m, control_variate=control, uniform_floor=0.3, **LISTS[lists]
    )
    objective = SCE(config)
    # A past in which some classes were seen five times as often as others.
    past = 20 + torch.arange(vocab_size) * 37 % 81
    objective.state.counts, objective.state.step = past[rows], 1

    def call(hidden, weight, labels, **options):
        return vocab_parallel_loss(
            hidden, weight, labels, vocab_size=vocab_size, config=objective, **options
        )

    return call_bias(call, own, draws, post=post, exact=exact_loss(problem, post))


def unbiased() -> None:
    check_unbiased("all", CAP, control=True)


def unbiased_in_all_cases() -> None:
    for lists in LISTS:
        for post in (PLAIN, CAP):
            for control in (False, True):
                check_unbiased(lists, post, control=control)


def check_unbiased(lists: str, post, *, control: bool) -> None:
    draws = 600 + 300 * dist.get_world_size()  # each rank's noise adds to it
    bias = bias_of(lists, post, draws, control=control)
    assert (bias.standard_error <= 0.003).all(), bias
    assert bias.is_zero, bias


def rest_of_all_ranks(patch: pytest.MonkeyPatch) -> None:
    """|R| counts the rows of other ranks too."""
    init = Rest.__init__

    def wrong(rest, lists, row_sum):
        init(rest, lists, row_sum)
        rest.size += lists.head.vocab_size

    patch.setattr(Rest, "__init__", wrong)


def label_of_another_rank(patch: pytest.MonkeyPatch) -> None:
    """Labels of other ranks count as if they lay in R."""
    block = Lists.block

    def wrong(*args):
        found = block(*args)
        return found._replace(outside=torch.ones_like(found.outside))

    patch.setattr(Lists, "block", wrong)


def in_the_library(error: str) -> Callable[[pytest.MonkeyPatch], None]:
    def put(patch: pytest.MonkeyPatch) -> None:
        replace, choose = plant(error, patch), SCE.choose

        def wrong(*args):
            chosen = choose(*args)
            return chosen._replace(candidates=replace(chosen.candidates))

        patch.setattr(SCE, "choose", wrong)

    return put


ERRORS = {
    "c omitted": in_the_library("c omitted"),
    "label twice": in_the_library("label twice"),
    "bucket item twice": in_the_library("bucket item twice"),
    "mean of b": in_the_library("mean of b"),
    "rest of all ranks": rest_of_all_ranks,
    "label of another rank": label_of_another_rank,
}
ONLY_CONTROL = {"mean of b", "rest of all ranks", "label of another rank"}


def all_planted_errors_are_found() -> None:
    for error in ERRORS:
        for control in (True,) if error in ONLY_CONTROL else (False, True):
            check_found(error, control=control)
    with pytest.MonkeyPatch.context() as patch:
        in_the_library("tau the m-th")(patch)
        for control in (False, True):
            bias = bias_of("tail", PLAIN, 8000, control=control, m=6, spread=1.0)
            assert not bias.is_zero, ("tau", control, bias)


def check_found(error: str, *, control: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        ERRORS[error](patch)
        bias = bias_of("buckets", CAP if error == "mean of b" else PLAIN, 1000, control=control)
        assert not bias.is_zero, (error, control, bias)


def memory() -> None:
    """Peak of a step over what it starts with, and what the rank holds, in bytes."""
    vocab_size, width = 240_000, 64  # one way of sampling for every number of ranks
    rows = own_rows(vocab_size)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, width, generator=generator, requires_grad=True)
    labels = torch.randint(vocab_size, (64,), generator=generator)
    weight = torch.randn(rows.stop - rows.start, width).mul_(0.1).requires_grad_()
    found = {}
    for name, config in (("exact", EXACT), ("sce", SCE(SCEConfig(num_buckets=0)))):
        small = torch.zeros(dist.get_world_size(), width, requires_grad=True)[:1]
        vocab_parallel_loss(
            hidden, small, labels * 0, vocab_size=dist.get_world_size(), config=type(config)()
        ).backward()  # sets up libraries
        read_peak = start_peak("cpu")
        vocab_parallel_loss(hidden, weight, labels, vocab_size=vocab_size, config=config).backward()
        found[name] = read_peak() + weight.nbytes
        weight.grad = hidden.grad = None
    world_size, folder = dist.get_world_size(), Path(sys.argv[3])
    (folder / f"memory-{world_size}-{dist.get_rank()}.json").write_text(json.dumps(found))


def main() -> None:
    start()
    torch.set_num_threads(1)
    for name in sys.argv[4:]:
        globals()[name]()
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
