"""When the gradients of a loss of a head are taken, how often they serve, and what is kept."""

import dataclasses

import pytest
import torch
from support.problems import make_problem

from sce_lm import LogitTransform
from sce_lm.ops.candidate_cross_entropy import CandidatePass
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.chunk_cross_entropy import ChunkPass, Chunks
from sce_lm.ops.exact_cross_entropy import ExactPass
from sce_lm.ops.head import NOTHING, Needs
from sce_lm.ops.head_loss import head_loss
from sce_lm.ops.position_cross_entropy import PositionCandidates, PositionPass, _Binary, _softmax

N, V, D, K = 300, 400, 5, 200
GENERATOR = torch.Generator().manual_seed(0)
OWN = PositionCandidates(torch.randint(V, (N, K), generator=GENERATOR), torch.zeros(1, K))
PASSES = {
    "exact": ExactPass(),
    "candidates": CandidatePass(
        Candidates(
            torch.arange(20),
            torch.arange(300, V),
            torch.full((100,), 0.5),
            (20 + torch.arange(2 * (K - 120))).view(2, -1),
            torch.arange(N) % 2,
            control_variate=True,
        )
    ),
    "softmax of positions": PositionPass(OWN, _softmax),
    "binary of positions": PositionPass(OWN, _Binary(0.5)),
    "chunks": ChunkPass(
        Chunks(torch.arange(N).view(1, N) % 2, torch.arange(V).view(1, V) % 2, 2, 0)
    ),
}
POSTS = [LogitTransform(0.7), LogitTransform(1.1, 3.0)]
each = pytest.mark.parametrize("run", PASSES.values(), ids=PASSES)


@dataclasses.dataclass(frozen=True)
class RecordedPass(CandidatePass):
    """Writes down what each of its runs was asked for."""

    asked: list[Needs] = dataclasses.field(default_factory=list)

    def forward(self, head, positions, needs):
        self.asked.append(needs)
        return super().forward(head, positions, needs)


def recorded():
    return RecordedPass(PASSES["candidates"].candidates)


def test_a_scalar_s_gradients_are_taken_in_the_forward_pass_and_used_once():
    problem, run = make_problem(N, V, D), recorded()
    everything = Needs(True, (True, False, True))
    positions = problem.positions(torch.tensor(0.1, dtype=torch.float64))
    loss, _ = head_loss(run, problem.head(), positions)
    assert run.asked == [everything]
    first = torch.autograd.grad(loss, problem.parameters, retain_graph=True)
    assert run.asked == [everything]
    assert loss.grad_fn.gradients is None
    second = torch.autograd.grad(3.0 * loss, problem.parameters)
    assert run.asked == [everything, everything]
    for mine, other in zip(first, second):
        torch.testing.assert_close(3.0 * mine, other)


def test_a_loss_per_position_has_its_gradients_in_the_backward_pass():
    problem, run = make_problem(N, V, D), recorded()
    loss, _ = head_loss(run, problem.head(), problem.positions())
    assert loss.shape == (N,)
    assert run.asked == [NOTHING]
    loss.sum().backward()
    assert run.asked == [NOTHING, Needs(True, (True, False, True))]


def test_nothing_is_taken_that_nobody_needs():
    problem, run = make_problem(N, V, D), recorded()
    positions = problem.positions(torch.tensor(0.1, dtype=torch.float64))
    with torch.no_grad():
        loss, _ = head_loss(run, problem.head(), positions)
    assert not loss.requires_grad
    frozen = problem._replace(weight=problem.weight.detach(), bias=problem.bias.detach())
    head_loss(run, frozen.head(), positions)
    assert run.asked == [NOTHING, Needs(hidden=True)]


@each
@pytest.mark.parametrize("post", POSTS, ids=["scaled", "capped"])
def test_all_ways_to_a_gradient_agree(run, post):
    """Of the forward pass, of a second backward pass, and of a loss per position, with weights that
    differ between positions and a factor on the loss."""
    problem = make_problem(N, V, D)
    weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    loss, _ = head_loss(run, problem.head(post), problem.positions(weights))
    losses, _ = head_loss(run, problem.head(post), problem.positions())
    torch.testing.assert_close(loss, (losses * weights).sum())
    expected = torch.autograd.grad((losses * weights).sum() * 2.0, problem.parameters)
    for _ in range(2):
        found = torch.autograd.grad(2.0 * loss, problem.parameters, retain_graph=True)
        for mine, want in zip(found, expected):
            torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-12)


@each
def test_there_is_no_second_derivative(run):
    problem = make_problem(N, V, D)
    loss, _ = head_loss(run, problem.head(), problem.positions())
    (grad,) = torch.autograd.grad(loss.square().sum(), problem.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def tensors_in(value, seen):
    """Every tensor that a value holds, at whatever depth."""
    if torch.is_tensor(value):
        return [value]
    if id(value) in seen:
        return []
    seen.add(id(value))
    if dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, (list, tuple)):
        parts = list(value)
    else:
        parts = (value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()
    return [tensor for part in parts for tensor in tensors_in(part, seen)]


@each
@pytest.mark.parametrize("scalar", [True, False])
def test_nothing_of_the_logits_size_is_kept(run, scalar):
    """What a loss holds until its backward pass, beside what it was given, and whatever its dtype,
    has fewer bytes than a fifth of an fp32 number for each position and candidate."""
    problem = make_problem(N, V, D, with_bias=False, dtype=torch.float32)
    positions = problem.positions(torch.tensor(0.1) if scalar else None)
    loss, _ = head_loss(run, problem.head(), positions)
    node = loss.grad_fn
    given = tensors_in([problem.parameters, problem.labels, run], set())
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in [*tensors_in(vars(node), set()), *tensors_in(node.saved_tensors, set())]
    }
    held = {place: size for place, size in held.items() if place not in known}
    assert sum(held.values()) < 4 * N * K / 5
