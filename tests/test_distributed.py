"""The vocabulary-parallel loss on 2 and 4 processes is the loss of one; each function of
programs/vocab_parallel.py says what it checks."""

import json

import pytest
from programs import vocab_parallel
from support.launch import run

pytestmark = pytest.mark.distributed

CHECKS = (
    "limits",
    "labels_first",
    "num_items_and_token_weights",
    "collectives",
    "masks",
    "scores",
    "dtensors",
    "refusals",
    "replays",
    "low_rank",
)
SAMPLED = ("row_sparse", "unbiased")
SLOW = ("statistics", "unbiased_in_all_cases", "all_planted_errors_are_found")


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_it_is_the_loss_of_one_process(tmp_path, world_size):
    run(vocab_parallel.__file__, world_size, tmp_path, CHECKS)


@pytest.mark.slow
def test_its_estimator_is_unbiased(tmp_path):
    run(vocab_parallel.__file__, 2, tmp_path, SAMPLED)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", SLOW)
def test_its_estimator_is_unbiased_in_all_cases(tmp_path, name, world_size):
    run(vocab_parallel.__file__, world_size, tmp_path, [name], seconds=3600)


@pytest.mark.slow
def test_memory_of_a_rank_falls_as_one_over_the_ranks(tmp_path):
    for world_size in (1, 2, 4):
        run(vocab_parallel.__file__, world_size, tmp_path, ["memory"])
    alone = json.loads((tmp_path / "memory-1-0.json").read_text())
    for world_size in (2, 4):
        for rank in range(world_size):
            found = json.loads((tmp_path / f"memory-{world_size}-{rank}.json").read_text())
            for name, of_one in alone.items():
                assert found[name] == pytest.approx(of_one / world_size, rel=0.2), name
