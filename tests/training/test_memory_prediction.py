"""Estimates against measurements."""

from types import SimpleNamespace

import pytest
import torch
from support.models import tiny_model

from sce_lm import objectives
from sce_lm.benchmarks.loss_cost import save_inputs
from sce_lm.benchmarks.side_by_side import measure_method
from sce_lm.hf import apply_sce
from sce_lm.ops.logits import LogitTransform
from sce_lm.training import memory_prediction
from sce_lm.training.measure import in_process
from sce_lm.training.memory_prediction import MIB, estimate_memory, loss_bytes

POSITIONS, VOCAB_SIZE, WIDTH = 4096, 60_000, 64


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {"name": "exact"},
        {"name": "sce"},
        {"name": "sce", "row_control_variate": True},
        {"name": "sce", "published": True},
        {"name": "sampled_softmax"},
        {"name": "gbce"},
        {"name": "xir"},
    ],
    ids=str,
)
def test_a_loss_takes_what_was_said_within_a_factor_of_two(tmp_path, method):
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(POSITIONS, WIDTH),
        "weight": torch.randn(VOCAB_SIZE, WIDTH) / 8,
        "labels": torch.randint(VOCAB_SIZE, (POSITIONS,)),
    }
    save_inputs(tmp_path / "inputs.safetensors", inputs, LogitTransform())
    objective = objectives.get(**method)
    measured = in_process(
        measure_method,
        folder=str(tmp_path),
        specification=method,
        trainable=True,
        settings={"device": "cpu", "floors": False},
        positions=POSITIONS,
    )["peak_mib"]
    said = loss_bytes(objective, POSITIONS, VOCAB_SIZE, WIDTH) / MIB
    assert measured / 2 < said < 2 * measured


def estimate(rows, optimizer="adamw", by_rows=False):
    objective = objectives.get("sce")
    model = apply_sce(tiny_model("llama"), objective)
    tokens = torch.randint(2, 40, (rows, 16))
    chosen = [model.get_output_embeddings().weight] if by_rows else []
    batch = {"input_ids": tokens, "labels": tokens}
    return model, estimate_memory(model, objective, batch, optimizer, chosen)


def test_sizes_follow_from_parameters_and_rows():
    model, small = estimate(8)
    numbers = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight
    assert small.parameters == 4 * numbers
    assert small.optimizer == 8 * numbers
    assert small.gradients == 4 * (numbers - head.numel())  # the head's is part of the loss
    large = estimate(32)[1]
    assert large.backbone == pytest.approx(4 * small.backbone, rel=0.05)
    assert large.stock_loss - small.stock_loss == 12 * (32 - 8) * 15 * len(head)
    by_rows = estimate(8, "rowwise_adagrad", by_rows=True)[1]
    assert by_rows.optimizer == 8 * (numbers - head.numel()) + 4 * len(head)


def test_the_backbone_is_what_autograd_keeps():
    """A forward pass of the whole batch keeps as many bytes as the part of it promised."""
    model, said = estimate(32)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.randint(2, 40, (32, 16))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = model.model(tokens, use_cache=False).last_hidden_state
    for parameter in model.parameters():
        kept.pop(parameter.data_ptr(), None)
    assert hidden.requires_grad
    assert said.backbone == pytest.approx(sum(kept.values()), rel=0.1)


def test_too_little_memory_is_said(monkeypatch):
    assert estimate(8)[1].fits
    monkeypatch.setattr(
        memory_prediction.psutil, "virtual_memory", lambda: SimpleNamespace(available=10 * MIB)
    )
    found = estimate(8)[1]
    assert not found.fits
    assert f"of {found.to_mib()['available']} free" in str(found)
