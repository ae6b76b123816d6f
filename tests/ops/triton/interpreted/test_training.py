"""A small model trained with the kernels follows the one trained without them."""

import pytest
import torch
from support.triton_cases import CASES, draw
from torch import nn

import sce_lm.objectives.exact as exact_objective
import sce_lm.objectives.sce as sce_objective
from sce_lm import objectives
from sce_lm.ops.triton.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.triton.catalogue_scan import catalogue_topk
from sce_lm.ops.triton.exact_cross_entropy import exact_cross_entropy

VOCAB, WIDTH, STEPS = 90, 20, 5


def losses(objective) -> torch.Tensor:
    """Losses of a few steps of a model that predicts the next token from the last two."""
    torch.manual_seed(0)
    embedding, mixer = nn.Embedding(VOCAB, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
    head = nn.Linear(WIDTH, VOCAB)
    parameters = [*embedding.parameters(), *mixer.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    tokens = torch.randint(0, VOCAB, (4, 11), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(STEPS):
        e = embedding(tokens[:, :-1])
        hidden = torch.tanh(mixer(torch.cat([e[:, 1:], e[:, :-1]], dim=-1)))
        labels = tokens[:, 2:].clone()
        labels[0, 0] = -100
        loss = objective(hidden, head.weight, labels, bias=head.bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def sce():
    return objectives.get(
        "sce",
        num_buckets=3,
        bucket_candidates=10,
        shared_frequent=4,
        tail_candidates=12,
        control_variate=True,
    )


@pytest.mark.parametrize("make", [sce, lambda: objectives.get("exact")], ids=["sce", "exact"])
def test_five_steps_equal_those_of_torch(make, monkeypatch):
    expected = losses(make())
    monkeypatch.setattr(sce_objective, "candidate_cross_entropy", candidate_cross_entropy)
    monkeypatch.setattr(sce_objective, "catalogue_topk", catalogue_topk)
    monkeypatch.setattr(exact_objective, "exact_cross_entropy", exact_cross_entropy)
    found = losses(make())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found[-1] < found[0]


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("tail only", "all lists")], ids=str
)
def test_operations_are_registered_for_the_compiler(case):
    """Schema, fake tensors and gradients, as ``torch.compile`` uses them."""
    problem, _, c = draw(case)
    arguments = (
        problem.hidden,
        problem.weight,
        problem.bias,
        problem.labels,
        c.shared,
        c.tail,
        c.tail_log_weights,
        c.bucket_items,
        c.bucket_of,
        None,
        None,
        1.0,
        None,
        c.control_variate,
        False,
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sce_lm.candidate_forward, arguments, test_utils=checks)
    head = (*problem[:2], problem.bias, problem.labels, 1.0, None)
    torch.library.opcheck(torch.ops.sce_lm.exact_forward, head, test_utils=checks)


def test_a_compiled_call_is_one_graph():
    problem, _, candidates = draw(CASES[0])

    def loss(hidden, weight):
        result = candidate_cross_entropy(hidden * 2.0, weight, problem.labels, candidates)
        exact = exact_cross_entropy(hidden * 2.0, weight, problem.labels)
        return result.loss.mean() + exact.loss.mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = problem.parameters
    want, found = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, want)
    for actual, expected in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(want, inputs)
    ):
        torch.testing.assert_close(actual, expected)
