"""`labels_first`: an in-batch softmax for the first calls, the configured form after them."""

import pytest
import torch
from support.problems import gradients, make_problem

from sce_lm import SCEConfig, objectives

SIZES = {"num_buckets": 2, "bucket_candidates": 8, "shared_frequent": 5, "tail_candidates": 20}


def loss_and_gradients(objective, problem, call):
    generator = torch.Generator().manual_seed(call)
    loss = objective(*problem[:3], bias=problem.bias, generator=generator)
    return loss, gradients(loss, problem)


@pytest.mark.parametrize("bucket_sampling", ["top", "priority"])
def test_first_the_labels_and_then_the_configured_form(bucket_sampling):
    problem = make_problem(37, 90, 7)
    sizes = SIZES | {"bucket_sampling": bucket_sampling}
    if bucket_sampling == "priority":
        del sizes["tail_candidates"]
    both, plain = objectives.get("sce", labels_first=2, **sizes), objectives.get("sce", **sizes)

    seen = torch.unique(problem.labels)
    logits = problem.hidden @ problem.weight[seen].T + problem.bias[seen]
    wanted = torch.nn.functional.cross_entropy(logits, torch.searchsorted(seen, problem.labels))
    expected = wanted, gradients(wanted, problem)
    for call in range(2):
        torch.testing.assert_close(loss_and_gradients(both, problem, call), expected)

    for _ in range(2):  # as many labels counted
        plain.state.begin_call(problem.labels, 90, seed=-1 - plain.state.step)
    for call in range(2, 5):
        found = loss_and_gradients(both, problem, call)
        torch.testing.assert_close(found, loss_and_gradients(plain, problem, call))
        assert abs(float(found[0] - wanted)) > 0.1


def test_calls_without_gradients_do_not_count():
    problem = make_problem(37, 90, 7)
    objective = objectives.get("sce", labels_first=1, **SIZES)
    with torch.no_grad():
        first = [objective(*problem[:3]) for _ in range(3)]
    assert first[0] == first[1] == first[2]
    assert objective(*problem[:3]) == first[0]
    assert objective(*problem[:3]) != first[0]


def test_a_target_waits_for_the_tail():
    problem = make_problem(60, 4000, 7)
    objective = objectives.get(
        "sce", num_buckets=0, tail_candidates=100, target_relative_error=0.05, labels_first=9
    )
    for _ in range(9):
        objective(*problem[:3]).backward()
        assert objective.drawn == ("tail_candidates", 0)
        assert objective.advice() is None
    objective(*problem[:3]).backward()
    assert objective.drawn == ("tail_candidates", 100)


def test_what_means_nothing_is_refused():
    with pytest.raises(ValueError, match="labels_first"):
        objectives.get("sce", published=True, labels_first=3)
    with pytest.raises(ValueError, match="shared_labels=False leaves them out"):
        SCEConfig(labels_first=3, shared_labels=False)
    with pytest.raises(ValueError, match="labels_first is -1"):
        SCEConfig(labels_first=-1)
