"""Seconds and memory as the benchmarks count them."""

import json
import os
import statistics

import pytest
import torch

from sce_lm.benchmarks.loss_cost import cost_of
from sce_lm.training.measure import in_process, start_peak, time_calls

BUFFER = 64 * 2**20


def test_a_freed_buffer_is_in_the_peak():
    held = torch.ones(BUFFER // 4)
    read_peak = start_peak("cpu")
    buffer = torch.ones(BUFFER // 4)
    del buffer
    assert read_peak() == pytest.approx(BUFFER, rel=0.1)
    read_peak = start_peak("cpu")
    assert read_peak() < BUFFER / 10
    assert held.sum() == BUFFER // 4


def test_peak_of_a_loss_is_its_buffer_and_its_gradients():
    """The weight's gradient counts with a trainable head and is not made with a frozen one."""

    def loss(hidden_states, weight, labels):
        with torch.no_grad():
            torch.ones(BUFFER // 8)  # half a gradient, and freed before that is made
        return (hidden_states @ weight.T).sum()

    inputs = {
        "hidden_states": torch.randn(1, 16),
        "weight": torch.randn(2**20, 16),
        "labels": torch.zeros(1, dtype=torch.int64),
    }
    gradient = inputs["weight"].nbytes
    assert gradient == BUFFER
    trainable = cost_of(loss, inputs, repeats=1)
    frozen = cost_of(loss, inputs, repeats=1, trainable=False)
    logits = 2**20 * 4
    assert frozen.peak_mib * 2**20 == pytest.approx(BUFFER / 2 + logits, rel=0.3)
    # The allocator may still hold the freed half.
    assert 0.9 * gradient <= trainable.peak_mib * 2**20 <= 1.75 * gradient
    assert inputs["weight"].grad is None


def test_calls_are_counted_and_bounded():
    calls, updates = [], []
    seconds = time_calls(lambda: calls.append(1), "cpu", 3, between=lambda: updates.append(1))
    assert len(seconds) == len(calls) == len(updates) == 3
    assert len(time_calls(lambda: None, "cpu", 9, budget=0.0)) == 1


@pytest.mark.slow
def test_a_process_has_as_many_threads_as_its_caller():
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert in_process(count_threads) == count
    finally:
        torch.set_num_threads(threads)


def count_threads():
    return torch.get_num_threads()


def test_a_process_returns_its_result_or_says_what_happened():
    assert in_process(statistics.mean, data=[1, 2]) == 1.5
    with pytest.raises(RuntimeError, match="JSONDecodeError"):
        in_process(json.loads, s="{")
    with pytest.raises(RuntimeError, match="ended by SIGABRT"):
        in_process(os.abort)
