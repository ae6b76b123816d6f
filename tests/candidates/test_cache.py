"""The cache of several processes, one of which has no labels."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sce_lm import SCEState
from sce_lm.candidates.cache import OCCURRENCES, draw_cache, merge_occurrences, record_draws

CPU = torch.device("cpu")

PROCESS = """
import sys, torch
from sce_lm import objectives

rank, port = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3
)
xir = objectives.get("xir", num_negatives=10)
generator = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(8, 3, generator=generator), torch.randn(20, 3, generator=generator)
for step in range(2):
    labels = torch.arange(8) + rank if rank < 2 else torch.full((8,), -100)  # rank 2 has none
    xir(hidden.requires_grad_(), weight, labels).backward()
    xir.end_step(torch.device("cpu"))
torch.save(xir.state.memory["occurrences"], sys.argv[3])
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def unused_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.distributed
def test_processes_share_what_they_drew(tmp_path, unused_port):
    files = [tmp_path / f"{rank}.pt" for rank in range(3)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(unused_port), str(file)],
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        for rank, file in enumerate(files)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    first, *others = [torch.load(file) for file in files]
    assert all(torch.equal(first, other) for other in others)
    # Two of three processes made 80 draws in each of two steps; the rest is the 1 of each class.
    torch.testing.assert_close(first.sum().item(), 20 + 2 * 2 * 80 / 3)


def test_one_process_has_nothing_to_merge():
    state = SCEState()
    merge_occurrences(state, CPU)
    assert not state.memory
    record_draws(state, torch.tensor([1, 4]), torch.tensor([2.0, 0.0]), 6, decay=1.0)
    merge_occurrences(state, CPU)
    assert state.memory[OCCURRENCES].tolist() == [1, 3, 1, 1, 1, 1]


def test_a_cache_knows_its_distribution():
    state = SCEState()
    record_draws(state, torch.tensor([1, 4]), torch.tensor([9.0, 4.0]), 6, decay=1.0)
    generator = torch.Generator().manual_seed(0)
    cache = draw_cache(state, 20_000, torch.arange(6), generator, 6, among_drawn=False)
    assert cache.ids.tolist() == list(range(6))
    assert cache.counts.sum() == 20_000
    torch.testing.assert_close(cache.q, torch.tensor([1, 10, 1, 1, 5, 1]).double() / 19)
    torch.testing.assert_close(cache.counts / 20_000, cache.q.float(), atol=0.015, rtol=0)
    drawn = draw_cache(state, 100, torch.tensor([0, 4]), generator, 6, among_drawn=True)
    assert set(drawn.ids[drawn.counts > 0].tolist()) == {1, 4}
    torch.testing.assert_close(drawn.q, torch.tensor([0, 10, 5]).double() / 15)
