"""DDP, FSDP2, ZeRO-3 and tensor parallelism over several processes train as one process with all
their rows does."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from programs import processes
from programs.processes import CASES, build, stock_model, train
from support.launch import run
from support.versions import TRANSFORMERS_5

pytestmark = pytest.mark.distributed

FAST = ("ddp_sce", "fsdp_tied", "fsdp_head_sce", "tp_tied_sce")
BF16 = ("fsdp_bf16", "fsdp_bf16_stock")
ZERO3 = ("zero3", "zero3_tied", "zero3_sce")
RESUMED = tuple(name for name, case in CASES.items() if case.resumes)
IN_FP32 = tuple(name for name in CASES if name not in (*BF16, *ZERO3, *RESUMED))


def lacks(name):
    """What this version lacks for a case, or None."""
    engine = CASES[name].engine
    if engine == "tp" and not TRANSFORMERS_5:
        return "transformers 4 shards models over a mesh by other calls"
    if engine == "fsdp" and torch.__version__.startswith("2.8."):
        return "FSDP2 of torch 2.8 trains a stock model otherwise too, over gloo"
    return None


def here(names):
    return [name for name in names if lacks(name) is None]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run(processes.__file__, 2, folder, here(FAST))
    return folder


@pytest.fixture(scope="module")
def two_in_all_cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run(processes.__file__, 2, folder, here((*IN_FP32, *BF16)))
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    run(processes.__file__, 4, folder, here(IN_FP32))
    return folder


def assert_as_one_process(folder, name):
    if lacks(name):
        pytest.skip(lacks(name))
    losses, parameters = torch.load(folder / f"{name}.pt")
    model = build(CASES[name])
    assert losses == pytest.approx(train(model), rel=1e-5)
    expected = model.state_dict()
    stock = stock_model(CASES[name])
    assert parameters.keys() == expected.keys() == stock.state_dict().keys()
    torch.testing.assert_close(parameters, dict(expected), rtol=1e-4, atol=1e-6)
    assert losses == pytest.approx(train(stock), rel=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_two_processes_train_as_one(two, name):
    assert_as_one_process(two, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FP32)
def test_two_processes_train_as_one_in_all_cases(two_in_all_cases, name):
    assert_as_one_process(two_in_all_cases, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FP32)
def test_four_processes_train_as_one(four, name):
    assert_as_one_process(four, name)


@pytest.fixture(scope="module")
def two_with_zero3(tmp_path_factory):
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero3")
    run(processes.__file__, 2, folder, ZERO3)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO3)
def test_two_processes_with_zero3_train_as_one(two_with_zero3, name):
    assert_as_one_process(two_with_zero3, name)


@pytest.mark.slow
def test_mixed_precision_stays_within_stocks_own_error(two_in_all_cases):
    got, want = (torch.load(two_in_all_cases / f"{name}.pt")[0] for name in BF16)
    reference = train(stock_model(CASES[BF16[0]]))
    for loss, stock, exact in zip(got, want, reference):
        assert abs(loss - exact) <= abs(stock - exact) + 0.02


@pytest.mark.slow
def test_sharded_checkpoint_of_two_processes_goes_on_on_four(two):
    run(processes.__file__, 4, two, RESUMED)
    for name in RESUMED:
        losses, parameters = torch.load(two / f"{name}.pt")
        model = build(CASES[name])
        train(model)
        assert losses == pytest.approx(train(model), rel=1e-5)
        torch.testing.assert_close(parameters, dict(model.state_dict()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["fsdp_tied", "fsdp_head_sce"])
def test_sharded_checkpoint_loads_into_one_stock_model(two, name):
    if lacks(name):
        pytest.skip(lacks(name))
    _, parameters = torch.load(two / f"{name}.pt")
    model = stock_model(CASES[name], seed=5)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(two / name), no_dist=True)
    model.load_state_dict(state)
    torch.testing.assert_close(dict(model.state_dict()), parameters, rtol=0, atol=0)
