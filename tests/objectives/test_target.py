"""`target_relative_error`: the tail's size follows the error that past draws had."""

import pytest
import torch
from support.problems import make_problem

from sce_lm import SCEConfig, objectives

TAIL_ONLY = {"num_buckets": 0, "shared_labels": False, "shared_frequent": 0}


def call(objective, problem, step):
    loss, stats = objective(
        *problem[:3],
        bias=problem.bias,
        generator=torch.Generator().manual_seed(step),
        return_stats=True,
    )
    return loss, float(stats.relative_error.square().mean().sqrt())


def steps(objective, problem, count, first=0):
    return [call(objective, problem, first + i)[1] for i in range(count)]


def make(target, **options):
    return objectives.from_config(
        SCEConfig(target_relative_error=target, **{**TAIL_ONLY, **options})
    )


@pytest.mark.parametrize("target", [0.05, 0.1])
@pytest.mark.parametrize("start", [64, 2048])
def test_error_is_held_from_above_and_below(target, start):
    objective = make(target, tail_candidates=start)
    problem = make_problem(64, 20_000, 32, dtype=torch.float32)
    errors = steps(objective, problem, 160)
    assert sum(errors[-50:]) / 50 == pytest.approx(target, rel=0.2)
    assert errors[0] != pytest.approx(target, rel=0.2)  # it had to move


def test_without_a_target_the_size_stays():
    objective = make(None, tail_candidates=64)
    steps(objective, make_problem(16, 5000, 16, dtype=torch.float32), 20)
    assert objective.state.tail_candidates == 0


def test_a_tail_that_is_capped_says_so_once(recwarn):
    objective = make(0.001, tail_candidates=100)
    steps(objective, make_problem(16, 2000, 16, dtype=torch.float32), 80)
    assert objective.state.tail_candidates == 500
    assert [str(w.message) for w in recwarn if "capped" in str(w.message)] == [
        str(recwarn[0].message)
    ]


def test_saved_state_goes_on_with_its_tail(tmp_path):
    problem = make_problem(32, 5000, 16, dtype=torch.float32)
    objective, again = make(0.05), make(0.05)
    steps(objective, problem, 30)
    objective.state.save(tmp_path / "state.safetensors")
    again.state.load(tmp_path / "state.safetensors")
    assert again.state.tail_candidates == objective.state.tail_candidates != 0
    losses = [call(one, problem, 99)[0] for one in (objective, again)]
    assert torch.equal(*losses)


def test_an_objective_without_a_target_leaves_another_ones_tail(tmp_path):
    problem = make_problem(32, 5000, 16, dtype=torch.float32)
    objective, without = make(0.05, tail_candidates=64), make(None, tail_candidates=64)
    steps(objective, problem, 30)
    objective.state.save(tmp_path / "state.safetensors")
    without.state.load(tmp_path / "state.safetensors")
    call(without, problem, 99)
    assert objective.drawn[1] > without.drawn[1] == 64
