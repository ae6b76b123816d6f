"""DDP, FSDP2 and ZeRO-3 over several processes train as one process with all their rows does."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.models import tiny_model
from support.processes import CASES, build, run, train

pytestmark = pytest.mark.distributed

FAST = ("ddp_sce", "fsdp_tied", "fsdp_head_sce")
BF16 = ("fsdp_bf16", "fsdp_bf16_stock")
ZERO3 = ("zero3", "zero3_tied", "zero3_sce")
IN_FP32 = tuple(name for name in CASES if name not in (*BF16, *ZERO3))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run(2, folder, FAST)
    return folder


@pytest.fixture(scope="module")
def two_in_all_cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    run(2, folder, (*IN_FP32, *BF16))
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    run(4, folder, IN_FP32)
    return folder


def assert_as_one_process(folder, name):
    losses, parameters = torch.load(folder / f"{name}.pt")
    model = build(CASES[name])
    assert losses == pytest.approx(train(model), rel=1e-5)
    expected = model.state_dict()
    assert parameters.keys() == expected.keys() == tiny_model(CASES[name].model).state_dict().keys()
    torch.testing.assert_close(parameters, dict(expected), rtol=1e-4, atol=1e-6)
    stock = tiny_model(CASES[name].model)
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
    run(2, folder, ZERO3)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ZERO3)
def test_two_processes_with_zero3_train_as_one(two_with_zero3, name):
    assert_as_one_process(two_with_zero3, name)


@pytest.mark.slow
def test_mixed_precision_stays_within_stocks_own_error(two_in_all_cases):
    got, want = (torch.load(two_in_all_cases / f"{name}.pt")[0] for name in BF16)
    reference = train(tiny_model("llama"))
    for loss, stock, exact in zip(got, want, reference):
        assert abs(loss - exact) <= abs(stock - exact) + 0.02


@pytest.mark.parametrize("name", ["fsdp_tied", "fsdp_head_sce"])
def test_sharded_checkpoint_loads_into_one_stock_model(two, name):
    _, parameters = torch.load(two / f"{name}.pt")
    model = tiny_model(CASES[name].model, seed=5)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=str(two / name), no_dist=True)
    model.load_state_dict(state)
    torch.testing.assert_close(dict(model.state_dict()), parameters, rtol=0, atol=0)
