"""Every objective trains as it did when the golden files were written (`programs/golden.py`).

Rounding moves these figures by 1e-15 in fp64 and 3e-7 in fp32, between instruction sets too; a
change of a draw, a weight or a gradient moves them by far more.
"""

import json

import pytest
import torch
from programs import golden
from programs.golden import OBJECTIVES, SURROUNDINGS, Records, case_name, train
from support.launch import run

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}
CASES = [(around, name) for around in SURROUNDINGS for name in OBJECTIVES]

pytestmark = pytest.mark.filterwarnings("ignore:target_relative_error")


def assert_equal(found: Records, expected: Records, dtype: torch.dtype) -> None:
    assert len(found) == len(expected) == golden.STEPS
    for step, (mine, theirs) in enumerate(zip(found, expected)):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=TOLERANCE[dtype], abs=1e-9), (step, name)


@pytest.fixture(scope="module")
def of_fp64():
    return golden.read("float64")


@pytest.fixture(scope="module")
def of_fp32():
    return golden.read("float32")


@pytest.mark.parametrize(("around", "name"), CASES)
def test_fp64(around, name, of_fp64):
    found = train(OBJECTIVES[name], SURROUNDINGS[around], torch.float64)
    assert_equal(found, of_fp64[case_name(around, name)], torch.float64)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fp32(name, of_fp32):
    found = train(OBJECTIVES[name], SURROUNDINGS["bias and cap"], torch.float32)
    assert_equal(found, of_fp32[case_name("bias and cap", name)], torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("around", "name"), [c for c in CASES if c[0] != "bias and cap"])
def test_fp32_in_other_surroundings(around, name, of_fp32):
    found = train(OBJECTIVES[name], SURROUNDINGS[around], torch.float32)
    assert_equal(found, of_fp32[case_name(around, name)], torch.float32)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_checkpointed(name, of_fp64):
    """A recomputed call draws what its first run drew."""
    found = train(OBJECTIVES[name], SURROUNDINGS["ignored"], torch.float64, checkpointed=True)
    assert_equal(found, of_fp64[case_name("ignored", name)], torch.float64)


@pytest.mark.distributed
def test_two_ranks(tmp_path):
    run(golden.__file__, 2, tmp_path, ["ranks"])
    expected = golden.read("ranks")
    found = json.loads((tmp_path / "ranks.json").read_text())
    for name, records in expected.items():
        mine = [dict(zip(found[name]["names"], step)) for step in found[name]["steps"]]
        assert_equal(mine, records, torch.float64)
