"""Which implementation runs."""

import pytest
import torch
from support.problems import make_problem

from sce_lm import SCEConfig, objectives
from sce_lm.ops import dispatch
from sce_lm.ops.chunk_cross_entropy import Chunks
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.row_reductions import Asked

ON_GPU, ON_CPU = torch.device("cuda"), torch.device("cpu")
HEAD, POSITIONS = Head(torch.zeros(2, 1)), Positions(torch.zeros(1, 1), torch.zeros(1).long())
CHUNKS = Chunks(torch.zeros(1, 1).long(), torch.zeros(1, 2).long(), 1, 0)


@pytest.mark.parametrize(
    ("backend", "device", "reason", "chosen"),
    [
        ("auto", ON_GPU, None, True),
        ("auto", ON_GPU, "of its dtype", False),
        ("auto", ON_CPU, None, False),
        ("torch", ON_GPU, None, False),
        ("triton", ON_GPU, None, True),
        ("triton", ON_CPU, None, True),
    ],
)
def test_the_choice(backend, device, reason, chosen, monkeypatch):
    run = object()
    monkeypatch.setattr(dispatch, "_find", lambda *inputs: (reason, run))
    found = dispatch.kernels("exact_cross_entropy", backend, device)
    assert found is (run if chosen else None)


def test_kernels_that_cannot_run_say_why(monkeypatch):
    with pytest.raises(ValueError, match='"triton": it has no kernels; use backend="auto"'):
        dispatch.kernels("position_cross_entropy", "triton", ON_CPU)
    with pytest.raises(ValueError, match="tensors on 'cpu' need a GPU"):
        dispatch.kernels("exact_cross_entropy", "triton", ON_CPU, HEAD, POSITIONS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        dispatch.kernels("exact_cross_entropy", "triton", ON_CPU, HEAD, POSITIONS)
    assert dispatch.kernels("exact_cross_entropy", "auto", ON_GPU) is None


def test_every_operation_in_the_table_is_there():
    for operation in dispatch.MODULES:
        inputs = {
            "priority_sample": [torch.zeros(2)],
            "catalogue_topk": [HEAD, POSITIONS.hidden],
            "chunk_cross_entropy": [HEAD, POSITIONS, CHUNKS],
            "row_reductions": [HEAD, POSITIONS.hidden, None, Asked(True, True, True, 1)],
        }
        reason, run = dispatch._find(operation, *inputs.get(operation, [HEAD, POSITIONS]))
        assert "TRITON_INTERPRET" in reason
        assert callable(run)


@pytest.mark.parametrize("name", objectives.names())
def test_every_objective_hands_its_backend_on(name):
    problem = make_problem(12, 40, 4, dtype=torch.float32)
    plain = objectives.get(name, backend="torch")
    assert plain(*problem[:3], bias=problem.bias).isfinite()
    assert plain.to_dict()["backend"] == "torch"
    asked = objectives.get(name, backend="triton")
    with pytest.raises(ValueError, match='backend="triton"'):
        asked(*problem[:3], bias=problem.bias)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"SCEConfig.backend is 'cuda'; choose one of 'auto'"):
        SCEConfig(backend="cuda")
