"""Distances from the exact loss, against the same found written out in full."""

import pytest
import torch
from safetensors.torch import load_file
from support.problems import make_problem, relative_error

from sce_lm import LogitTransform, objectives
from sce_lm.benchmarks.loss_cost import loss_of, save_inputs, stock
from sce_lm.benchmarks.quality import quality_of, write_reference

POST = LogitTransform(scale=0.7, soft_cap=5.0)


@pytest.fixture
def problem(tmp_path, monkeypatch):
    """Inputs, full logits, and the reference, taken in several blocks."""
    hidden, weight, labels, bias = make_problem(40, 90, 8, dtype=torch.float32)
    inputs = {"hidden_states": hidden, "weight": weight, "labels": labels, "bias": bias}
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    monkeypatch.setattr("sce_lm.benchmarks.quality.BLOCK_ELEMENTS", 7 * 90)
    save_inputs(tmp_path / "inputs.safetensors", inputs, POST)
    write_reference(str(tmp_path), "cpu")
    return inputs, tmp_path / "reference.safetensors"


def test_reference_is_stock_cross_entropy(problem):
    inputs, path = problem
    leaves = {k: v.requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    logits = POST(leaves["hidden_states"] @ leaves["weight"].T + leaves["bias"])
    losses = torch.logsumexp(logits, 1) - logits.gather(1, inputs["labels"][:, None])[:, 0]
    losses.mean().backward()
    reference = load_file(path)
    assert relative_error(reference["losses"], losses) < 1e-6
    for name in ("hidden_states", "weight", "bias"):
        assert relative_error(reference[f"grad_{name}"], leaves[name].grad) < 1e-6


def test_exact_losses_have_no_error(problem):
    inputs, path = problem
    exact = objectives.get("exact")
    for loss, objective in ((stock(POST), None), (loss_of(exact, POST), exact)):
        found = quality_of(loss, objective, inputs, POST, path, draws=1)
        assert found["bias"] == pytest.approx(0, abs=1e-6)
        for name in ("cos_hidden", "cos_weight", "norm_hidden", "norm_weight"):
            assert found[name] == pytest.approx(1, abs=1e-6)
        assert found.get("sd", 0.0) == pytest.approx(0, abs=1e-6)


def test_a_factor_is_seen_in_norms_and_bias(problem):
    inputs, path = problem
    found = quality_of(lambda **x: 2 * stock(POST)(**x), None, inputs, POST, path, draws=1)
    assert found["norm_hidden"] == pytest.approx(2, abs=1e-5)
    assert found["norm_weight"] == pytest.approx(2, abs=1e-5)
    assert found["cos_weight"] == pytest.approx(1, abs=1e-6)
    assert found["bias"] == pytest.approx(found["loss"] / 2, rel=1e-5)


def test_errors_of_a_sample(problem):
    """One draw, made again by hand with the same random numbers."""
    inputs, path = problem
    options = {"num_buckets": 0, "shared_labels": False, "shared_frequent": 0}
    objective = objectives.get("sce", tail_candidates=30, **options)
    torch.manual_seed(3)
    found = quality_of(loss_of(objective, POST), objective, inputs, POST, path, draws=1)

    again = objectives.get("sce", tail_candidates=30, **options)
    h, w, y = inputs["hidden_states"], inputs["weight"].clone().requires_grad_(), inputs["labels"]
    torch.manual_seed(3)
    again(h, w, y, bias=inputs["bias"], post=POST).backward()
    with torch.no_grad():
        losses, stats = again(
            h, w, y, bias=inputs["bias"], post=POST, reduction="none", return_stats=True
        )
    reference = load_file(path)
    delta = losses - reference["losses"]
    assert found["bias"] == pytest.approx(delta.mean().item(), abs=1e-6)
    assert found["sd"] == pytest.approx(delta.std(correction=0).item(), rel=1e-4)
    true = (delta.exp() - 1).square().mean().sqrt().item()
    assert found["relative_error"] == pytest.approx(true, rel=1e-4)
    reported = stats.relative_error.square().mean().sqrt().item()
    assert found["reported_error"] == pytest.approx(reported, rel=1e-4)
    cosine = torch.cosine_similarity(w.grad.flatten(), reference["grad_weight"].flatten(), 0)
    assert found["cos_weight"] == pytest.approx(cosine.item(), abs=1e-5)
    assert found["cos_weight"] < 0.999
    assert found["products"] == 30


def test_uncovered_positions_are_left_out(problem):
    inputs, path = problem
    objective = objectives.get(
        "sce", published=True, num_buckets=1, bucket_positions=10, bucket_candidates=90
    )
    found = quality_of(loss_of(objective, POST), objective, inputs, POST, path, draws=2)
    assert found["coverage"] == pytest.approx(10 / 40)
    assert found["bias"] == pytest.approx(0, abs=1e-5)  # its bucket holds the whole catalogue
    assert found["sd"] == pytest.approx(0, abs=1e-5)
