"""The order of the data: complete epochs, independent of the number of processes."""

import pytest

from sce_lm.training.task import DataOrder


def rows(order, steps, processes):
    """Rows of all processes, step by step and batch by batch, in global order."""
    taken = []
    for step in range(steps):
        parts = [list(order.step_batches(step, rank, processes)) for rank in range(processes)]
        for together in zip(*parts):
            taken += [row for batch in together for row in batch]
    return taken


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    order = DataOrder(num_rows=30, batch_size=3, accumulation=2, seed=1)
    taken = rows(order, steps=10, processes=1)
    assert sorted(taken[:30]) == sorted(taken[30:]) == list(range(30))
    assert taken[:30] != taken[30:]


def test_a_step_may_reach_over_the_end_of_an_epoch():
    order = DataOrder(num_rows=7, batch_size=5, accumulation=1, seed=1)
    assert sorted(rows(order, steps=7, processes=1)) == sorted(list(range(7)) * 5)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_see_together_what_one_would(processes):
    several = DataOrder(num_rows=41, batch_size=2, accumulation=2, seed=3)
    one = DataOrder(num_rows=41, batch_size=2 * processes, accumulation=2, seed=3)
    assert rows(several, 20, processes) == rows(one, 20, 1)


def test_the_order_depends_on_the_seed_and_not_on_where_one_starts():
    order = DataOrder(num_rows=11, batch_size=4, accumulation=1, seed=5)
    whole = [list(order.step_batches(step, 0, 1)) for step in range(9)]
    resumed = DataOrder(num_rows=11, batch_size=4, accumulation=1, seed=5)
    assert [list(resumed.step_batches(step, 0, 1)) for step in range(6, 9)] == whole[6:]
    other = DataOrder(num_rows=11, batch_size=4, accumulation=1, seed=6)
    assert [list(other.step_batches(step, 0, 1)) for step in range(9)] != whole
