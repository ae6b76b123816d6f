"""The way of a call that waits for no device gives what the ordinary way gives, for the same draws:
compared on a CPU, where both can run."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import gradients, make_problem

from sce_lm import LogitTransform, objectives, sce_loss
from sce_lm.candidates.distinct import distinct
from sce_lm.objectives import labels as labels_module
from sce_lm.ops.static_shapes import static_shapes

TAIL = {"num_buckets": 0, "tail_candidates": 20, "shared_frequent": 0}
OBJECTIVES = {
    "exact": lambda: objectives.get("exact"),
    "exact, terms": lambda: objectives.get("exact", z_loss=0.1, label_smoothing=0.1),
    "in batch": lambda: objectives.get("in_batch"),
    "in batch, streaming": lambda: objectives.get("in_batch", frequency="streaming"),
    "sampled softmax": lambda: objectives.get("sampled_softmax", num_negatives=30),
    "distinct": lambda: objectives.get("sampled_softmax", num_negatives=30, sampling="distinct"),
    "priority": lambda: objectives.get("sampled_softmax", num_negatives=30, sampling="priority"),
    "sce": lambda: objectives.get("sce", **TAIL),
    "sce, no control": lambda: objectives.get("sce", **TAIL, control_variate=False),
    "sce, no labels": lambda: objectives.get("sce", **TAIL, shared_labels=False, z_loss=0.1),
    "sce, all classes": lambda: objectives.get("sce", num_buckets=0, tail_candidates=500),
}
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


@st.composite
def cases(draw):
    """A problem some of whose positions have no label, and the call's options."""
    num_positions = draw(st.integers(1, 40))
    problem = make_problem(
        num_positions, draw(st.integers(2, 130)), draw(st.integers(1, 7)), with_bias=False
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        bias = torch.randn(len(problem.weight), generator=generator, dtype=torch.float64)
        problem = problem._replace(bias=bias.requires_grad_())
    ignored = torch.rand(num_positions, generator=generator) < draw(st.sampled_from([0, 0.3, 1]))
    hidden = problem.hidden.detach().masked_fill(ignored[:, None], torch.nan)
    labels = problem.labels.masked_fill(ignored, -100)
    problem = problem._replace(hidden=hidden.requires_grad_(), labels=labels)
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "post": draw(st.sampled_from([LogitTransform(0.7), LogitTransform(2.0, 3.0)])),
    }
    if draw(st.booleans()):
        options["token_weights"] = torch.rand(num_positions, generator=generator)
    if options["reduction"] != "none" and draw(st.booleans()):
        options["num_items_in_batch"] = 7
    return problem, options


def train(objective, problem, options):
    """Losses and gradients of two calls, and the state."""
    generator, found = torch.Generator().manual_seed(5), []
    for _ in range(2):
        loss = objective(
            *problem[:3], bias=problem.bias, generator=generator, **options
        )
        factor = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
        found += [loss.detach(), *gradients((loss * factor).sum(), problem)]
    return found, objective.state


@each_objective
@settings(max_examples=15)
@given(case=cases())
def test_same_loss_gradients_and_counts(name, case):
    problem, options = case
    if "terms" not in name or options["post"].soft_cap is None:
        expected, state = train(OBJECTIVES[name](), problem, options)
    else:
        return
    with static_shapes():
        found, mine = train(OBJECTIVES[name](), problem, options)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    if state is not None and state.counts is not None:
        assert torch.equal(mine.counts, state.counts)
        assert (mine.step, int(mine.num_labels)) == (state.step, state.num_labels)
