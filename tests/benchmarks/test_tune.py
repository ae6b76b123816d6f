"""The search beside a table's row, without a GPU."""

import argparse

import pytest
import torch

from sce_lm.benchmarks import tune
from sce_lm.ops.triton.configurations import ARCHITECTURES, Configuration, choose, configuration

ROW = Configuration(64, 16, 1, 4, 1)


def test_neighbours_differ_by_one_step():
    found = set(map(str, tune.neighbours(ROW)))
    assert found == {
        "32x16x1 w4 s1",
        "128x16x1 w4 s1",
        "64x32x1 w4 s1",
        "64x16x1 w2 s1",
        "64x16x1 w8 s1",
        "64x16x1 w4 s2",
    }


def test_each_configuration_is_in_force_while_it_is_timed():
    like, seen = torch.zeros(4, 64), []

    def milliseconds():
        now = configuration("forward", like)
        seen.append(str(now))
        if now.num_stages == 2:
            raise RuntimeError("out of shared memory\nRequired: 1")
        return float(now.block_columns)

    row = configuration("forward", like)
    found = tune.tune("forward", like, milliseconds)
    assert seen == [str(row), *map(str, tune.neighbours(row))]
    assert found["table"] == str(row)
    assert found["milliseconds"][str(row)] == row.block_columns
    assert list(found["failed"].values()) == ["RuntimeError: out of shared memory"]
    assert configuration("forward", like) == row


def test_every_kernel_of_the_table_is_tuned():
    known = {*tune.LOSS_KERNELS, "catalogue_scan", "priority_sample"}
    for kernel in known:
        choose(kernel, ARCHITECTURES["sm_90"], torch.bfloat16)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="on a GPU, and torch finds none here"):
        tune.measure(argparse.Namespace())
