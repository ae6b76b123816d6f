"""The arithmetic of the prediction."""

import argparse

import pytest

from sce_lm.benchmarks import kernels
from sce_lm.benchmarks.roofline import DEVICES, Device, Shape, Step, steps
from sce_lm.ops.triton.configurations import Configuration

TILE = Configuration(128, 128, 64, 8, 3)


def counted(shape):
    return {(s.kernel, s.list): s for s in steps(shape, lambda kernel: TILE)}


def test_time_is_the_larger_of_both_at_a_share_of_the_rates():
    device = Device("drawn", "sm_90", matrix_rate=1000.0, memory_rate=10.0)
    assert Step("", "", "", 500.0, 1.0, 0.0).seconds(device, 0.5) == 1.0
    assert Step("", "", "", 500.0, 20.0, 0.0).seconds(device, 0.5) == 4.0


def test_one_list_by_hand():
    n, v, d, k = 256, 1000, 128, 384
    found = counted(Shape(n, v, d, tail=k))
    product = 2.0 * n * k * d
    forward = found["forward", "tail"]
    assert forward.operations == product
    assert forward.memory_bytes == (n + k) * d * 2 + 2 * n * 3 * 4 + k * 4
    assert forward.tile_bytes == 2 * 3 * 256 * d * 2 + 2 * n * 3 * 4 + n * k * 4
    rows = found["row_gradient", "tail"]
    assert rows.memory_bytes == n * k * 2 + n * d * 2 + k * d * 4
    assert rows.tile_bytes == n * k * 2 * 2 + n * d * 2 * 3 + k * d * 4
    assert found["zeros of dW", ""].memory_bytes == v * d * 2
    assert sum(s.operations for s in found.values()) == 4 * product
    assert ("mean of W", "") not in found


def test_buckets_are_scanned_and_their_rows_are_their_own():
    shape = Shape(256, 1000, 128, buckets=4, bucket_size=64, control=True)
    found = counted(shape)
    assert found["forward", "bucket"].operations == 2.0 * 256 * 64 * 128
    assert found["hidden_gradient", "bucket"].memory_bytes == (
        256 * 64 * 2 + 4 * 64 * 128 * 2 + 256 * 128 * 2 + 256 * 128 * 2
    )
    for step in ("group maxima", "group scores"):
        assert found[step, ""].memory_bytes == (1000 + 4) * 128 * 2
    assert found["mean of W", ""].memory_bytes == 1000 * 128 * 2
    assert found["row_sum", "bucket"].memory_bytes == 4 * 64 * 128 * 2 + 4 * 128 * 4
    assert found["row_sum", "positions"].memory_bytes == 256 * 128 * 2 + 4 * 128 * 4
    assert ("row_sum", "shared") not in found


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_predictions_show_every_term_and_add_up(device, capsys):
    arguments = argparse.Namespace(
        positions=16_384, vocab=248_320, dim=2048, labels=4096, share=0.5
    )
    found = [p for p in kernels.predict(arguments) if p["device"]["name"] == device.name]
    assert [p["problem"] for p in found] == list(kernels.shapes(arguments))
    for prediction in found:
        seconds = sum(step["seconds"] for step in prediction["steps"])
        assert prediction["milliseconds"] == pytest.approx(1e3 * seconds)
        operations = sum(step["operations"] for step in prediction["steps"])
        assert prediction["milliseconds"] > 1e3 * operations / (0.5 * device.matrix_rate)
    text = capsys.readouterr().out
    assert "Prediction, not measured" in text
    assert "92.6 ms, measured by its" in text
