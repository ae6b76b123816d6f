"""Objectives inside torch.compile: one operator, equal to eager code, and no memory left behind."""

import gc
import weakref

import pytest
import torch
from support.versions import one_graph
from torch import nn
from torch.utils.checkpoint import checkpoint

from sce_lm import LogitTransform, SCEConfig, SCEState, objectives, sce_loss
from sce_lm.objectives import compile_operator

VOCAB_SIZE, WIDTH = 61, 16
POST = LogitTransform(scale=2.0, soft_cap=3.0)


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()


def problem(num_positions, ignored=True):
    generator = torch.Generator().manual_seed(num_positions)
    hidden = torch.randn(num_positions, WIDTH, generator=generator)
    weight = torch.randn(VOCAB_SIZE, WIDTH, generator=generator)
    bias = torch.randn(VOCAB_SIZE, generator=generator)
    labels = torch.randint(0, VOCAB_SIZE, (num_positions,), generator=generator)
    if ignored:
        labels[::3] = -100
    return [x.requires_grad_() for x in (hidden, weight, bias)], labels


def step(loss_of, hidden, weight, bias, labels, options):
    """A part of a training step; the hidden states are made, and forgotten, inside the graph."""
    hidden = torch.tanh(hidden * 1.5)
    return loss_of(hidden, weight, labels, bias=bias, post=POST, **options)


def loss_and_gradients(step, loss_of, num_positions, **options):
    tensors, labels = problem(num_positions)
    torch.manual_seed(num_positions)
    loss = step(loss_of, *tensors, labels, options)
    (loss * torch.linspace(1, 2, loss.numel()).view_as(loss)).sum().backward()
    return [loss.detach(), *[x.grad for x in tensors]]


def compile_step(**options):
    return torch.compile(
        step, **{"backend": "aot_eager", "fullgraph": compile_operator.ONE_GRAPH, **options}
    )


@pytest.mark.parametrize("name", objectives.names())
def test_equals_eager_for_all_lengths(name):
    inside, outside = objectives.get(name), objectives.get(name)
    compiled_step = compile_step()
    for num_positions in (12, 31, 20):
        got = loss_and_gradients(compiled_step, inside, num_positions, num_items_in_batch=9)
        want = loss_and_gradients(step, outside, num_positions, num_items_in_batch=9)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if outside.state is not None:
        assert inside.state.step == outside.state.step == 3
        assert torch.equal(inside.state.counts, outside.state.counts)


WEIGHTS = torch.linspace(0, 2, 15)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"reduction": "sum"},
        {},
        {"token_weights": WEIGHTS},
        {"token_weights": WEIGHTS, "reduction": "none"},
    ],
)
@pytest.mark.parametrize(
    "specification",
    [
        {"name": "exact"},
        {"name": "sce"},
        {"name": "sce", "tail_candidates": 9, "row_control_variate": True},
    ],
    ids=str,
)
def test_reductions(specification, options):
    got = loss_and_gradients(compile_step(), objectives.get(**specification), 15, **options)
    want = loss_and_gradients(step, objectives.get(**specification), 15, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@one_graph
def test_one_operator_and_no_graph_break():
    for loss_of in (objectives.get("sce"), sce_loss):
        tensors, labels = problem(15)
        found = torch._dynamo.explain(step)(loss_of, *tensors, labels, {})
        assert (found.graph_count, found.graph_break_count) == (1, 0)
        nodes = [n for n in found.graphs[0].graph.nodes if "sce_lm" in str(n.target)]
        assert len(nodes) == 1


@one_graph
def test_new_lengths_are_compiled_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled_step, objective = compile_step(backend=counter), objectives.get("sce")
    for num_positions in (12, 31, 20, 43):
        loss_and_gradients(compiled_step, objective, num_positions)
    assert counter.frame_count == 2  # one length, then any


def test_every_label_ignored():
    (hidden, weight, bias), labels = problem(6)
    labels[:] = -100
    loss = compile_step()(objectives.get("sce"), hidden, weight, bias, labels, {})
    loss.backward()
    assert float(loss) == 0.0
    assert all(not x.grad.any() for x in (hidden, weight, bias))


def test_frozen_head_gets_no_gradient():
    (hidden, weight, bias), labels = problem(9)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    compile_step()(objectives.get("exact"), hidden, weight, bias, labels, {}).backward()
    want = problem(9)[0][0]
    step(objectives.get("exact"), want, weight, bias, labels, {}).backward()
    torch.testing.assert_close(hidden.grad, want.grad)
    assert weight.grad is None


def test_no_gradient_asked_for():
    objective = objectives.get("sce")
    tensors, labels = problem(9)
    with torch.no_grad():
        loss = compile_step()(objective, *tensors, labels, {})
    assert not loss.requires_grad
    assert objective.state.step == 0


def test_function_with_a_state_and_a_configuration():
    def one_call(hidden, weight, labels, config, state):
        return sce_loss(hidden * 1.0, weight, labels, config=config, state=state)

    (hidden, weight, _), labels = problem(30)
    run = torch.compile(one_call, backend="aot_eager", fullgraph=compile_operator.ONE_GRAPH)
    for config in (SCEConfig(tail_candidates=7), SCEConfig.published()):
        states = SCEState(), SCEState()
        for seed in (3, 4):
            torch.manual_seed(seed)
            got = run(hidden, weight, labels, config, states[0])
            torch.manual_seed(seed)
            want = one_call(hidden, weight, labels, config, states[1])
            torch.testing.assert_close(got, want)
        assert states[0].step == states[1].step == 2


def test_configuration_made_inside_the_step():
    def one_call(hidden, weight, labels):
        return sce_loss(hidden, weight, labels, config=SCEConfig(tail_candidates=7))

    (hidden, weight, _), labels = problem(30)
    torch.manual_seed(3)
    got = torch.compile(one_call, backend="aot_eager")(hidden, weight, labels)
    torch.manual_seed(3)
    torch.testing.assert_close(got, one_call(hidden, weight, labels))


@pytest.mark.parametrize("name", objectives.names())
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_pass_does_not_need_the_memory_of_the_forward_pass(name, reduction):
    """The compiler may use that memory again and compute the hidden states anew."""
    tensors, labels = problem(14, ignored=False)
    inputs = [x.detach().clone() for x in tensors]
    objective = objectives.get(name)
    number = compile_operator.register(weakref.ref(objective))
    needs = [True] * 3

    def gradients(is_overwritten):
        used = [x.clone() for x in inputs]
        used_labels = labels.clone()
        torch.manual_seed(7)
        loss, ticket = torch.ops.sce_lm.head_loss(
            *used, used_labels, None, None, needs, number, 1.0, None, reduction, -100
        )
        if is_overwritten:
            used_labels.fill_(0)
            for x in used:
                x.fill_(torch.nan)
        grad = torch.ones_like(loss)
        return torch.ops.sce_lm.head_loss_backward(grad, ticket, *inputs, needs)

    want = gradients(False)
    objective = objectives.get(name)
    number = compile_operator.register(weakref.ref(objective))
    torch.testing.assert_close(gradients(True), want)
    assert all(g.any() for g in want)


@one_graph
def test_what_awaits_a_backward_pass_is_freed_with_the_loss():
    gc.collect()
    before = len(compile_operator._calls)
    compiled_step, objective = compile_step(), objectives.get("sce")
    tensors, labels = problem(15)
    loss = compiled_step(objective, *tensors, labels, {})
    assert len(compile_operator._calls) == before + 1
    del loss
    assert len(compile_operator._calls) == before
    loss = compiled_step(objective, *tensors, labels, {})
    loss.backward()
    assert len(compile_operator._calls) == before


@pytest.mark.parametrize("loss_of", [objectives.get("sce", tail_candidates=9), sce_loss])
def test_what_no_operator_can_do_is_done_outside_the_graph(loss_of):
    run = torch.compile(step, backend="aot_eager")
    tensors, labels = problem(15)
    generator = torch.Generator().manual_seed(3)
    got, statistics = run(loss_of, *tensors, labels, {"generator": generator, "return_stats": True})
    generator.manual_seed(3)
    torch.testing.assert_close(got, step(loss_of, *tensors, labels, {"generator": generator}))
    assert statistics.num_valid == 10


def test_sparse_gradient():
    objective = objectives.get("sce", sparse_grad=True)
    (hidden, weight, _), labels = problem(15)
    run = torch.compile(lambda h: objective(h * 1.0, weight, labels), backend="aot_eager")
    run(hidden).backward()
    assert weight.grad.is_sparse


def test_recomputed_forward_pass_draws_the_same():
    def whole(objective, hidden, weight, labels):
        def part(hidden):
            return objective(torch.tanh(hidden), weight, labels)

        return checkpoint(part, hidden, use_reentrant=False)

    found = []
    for run in (
        whole,
        torch.compile(whole, backend="aot_eager", fullgraph=compile_operator.ONE_GRAPH),
    ):
        objective = objectives.get("sce", tail_candidates=9)
        (hidden, weight, _), labels = problem(15)
        torch.manual_seed(7)
        loss = run(objective, hidden, weight, labels)
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
        assert objective.state.step == 1
    torch.testing.assert_close(found[1], found[0])


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCAB_SIZE)
        self.objective = objectives.get("sce")

    def forward(self, hidden, labels):
        return self.objective(hidden, self.head.weight, labels)


@one_graph
@pytest.mark.parametrize("strict", [True, False])
def test_export_refuses(strict):
    (hidden, _, _), labels = problem(9)
    with pytest.raises(Exception, match="without labels"):
        torch.export.export(WithLoss(), (hidden.detach(), labels), strict=strict)


@pytest.mark.slow
@pytest.mark.parametrize("name", objectives.names())
def test_inductor_equals_eager(name):
    inside, outside = objectives.get(name), objectives.get(name)
    compiled_step = compile_step(backend="inductor")
    for num_positions in (12, 31):
        got = loss_and_gradients(compiled_step, inside, num_positions)
        want = loss_and_gradients(step, outside, num_positions)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
