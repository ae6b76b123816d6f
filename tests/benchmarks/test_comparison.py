"""The comparison behind the demo, on a small model and real text."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.models import tiny_batch, tiny_model

from sce_lm import apply_sce, objectives
from sce_lm.benchmarks.comparison import TABLES, compare
from sce_lm.benchmarks.methods import methods
from sce_lm.benchmarks.real import problem_of_batch
from sce_lm.benchmarks.side_by_side import measure_method
from sce_lm.training import run_building
from sce_lm.training.command_line import parse_config
from sce_lm.training.learner import Learner
from sce_lm.training.loop import Run
from sce_lm.training.measure import in_process


def cost(folder, specification, positions):
    """Of one forward and backward pass, in a process of its own."""
    return in_process(
        measure_method,
        folder=str(folder),
        specification=specification,
        trainable=True,
        settings={"device": "cpu", "repeats": 1, "floors": False},
        positions=positions,
    )


def test_the_problem_of_a_batch_reproduces_the_models_loss(tmp_path):
    """What is measured is the head's real work: Gemma 2's soft cap, ignored labels left out."""
    batch = tiny_batch()
    batch["labels"][:, 3] = -100
    model = apply_sce(tiny_model("gemma2"), objectives.get("exact"))
    problem = problem_of_batch(model, batch, tmp_path, "a batch")
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    assert problem.positions == int((batch["labels"][:, 1:] != -100).sum())
    assert not (tmp_path / "state.safetensors").exists()
    settings = {"device": "cpu", "repeats": 1, "floors": False}
    for method in ({"name": "stock"}, {"name": "exact"}, {"name": "sce", "tail_candidates": 10**6}):
        found = measure_method(str(tmp_path), method, True, settings, problem.positions)
        assert found["loss"] == pytest.approx(expected, rel=1e-5)
        assert found["seconds"] > 0
        assert found["peak_mib"] >= 0


@pytest.mark.slow
def test_peak_memory_is_that_of_the_logits(tmp_path):
    """Stock keeps [N, V] logits, exact and SCE do not: the numbers must tell them apart."""
    n, v, d = 2048, 16_384, 16
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            "hidden_states": torch.randn(n, d, generator=generator),
            "weight": torch.randn(v, d, generator=generator) / 4,
            "labels": torch.randint(0, v, (n,), generator=generator),
        },
        tmp_path / "inputs.safetensors",
        metadata={"post": '{"scale": 1.0, "soft_cap": null}'},
    )
    logits = n * v * 4 / 2**20
    assert cost(tmp_path, {"name": "stock"}, n)["peak_mib"] > 1.5 * logits
    sce = {"name": "sce", "tail_candidates": 512, "shared_labels": False, "shared_frequent": 0}
    assert cost(tmp_path, sce, n)["peak_mib"] < logits
    with pytest.raises(RuntimeError, match="no option 'tails'"):
        cost(tmp_path, {"name": "sce", "tails": 3}, n)


@pytest.mark.slow
def test_compare_trains_each_and_writes_the_figures(tmp_path, capsys, monkeypatch):
    config = parse_config(
        [
            "examples/configs/lm_embedded.yaml",
            *("--cache_dir", str(tmp_path / "cache")),
            *(
                "--data_options",
                '{"packages": ["stdlib"], "max_bytes": 300000, "vocab_size": 2048}',
            ),
            *(
                "--model_config",
                '{"model_type": "llama", "hidden_size": 16, "intermediate_size": 32,'
                ' "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}',
            ),
            *("--sequence_length", "32", "--per_device_batch_size", "4", "--max_steps", "6"),
            *("--warmup_steps", "1", "--eval_every", "3", "--checkpoint_every", "0"),
        ]
    )
    exact, published, sce = (methods()[name] for name in ("exact", "sce-published", "sce"))
    covers = sce.having(tail_candidates=4096)
    labels_first = covers.having(labels_first=3)
    chosen = [exact, published, covers, labels_first]
    assert labels_first.label == "SCE (default), tail_candidates=4096, labels_first=3"
    models, alive, build = [], [], run_building.build_model

    def counted(*arguments):
        alive.append(sum(model() is not None for model in models))
        model = build(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run_building, "build_model", counted)
    comparison = compare(config, chosen, tmp_path / "out", seeds=(0, 1))
    assert alive == [0] * 8  # one model in memory at a time
    rows = {row["label"]: row for row in comparison.rows}
    assert list(rows) == ["stock", *(method.label for method in chosen)]
    loss = {label: row["trainable"]["loss"] for label, row in rows.items()}
    assert loss["stock"] == pytest.approx(loss[exact.label], rel=1e-5)
    # The form that most of a training has, here with all classes, not that of its first calls.
    assert loss[labels_first.label] == pytest.approx(loss[exact.label], rel=1e-5)
    assert rows[labels_first.label]["resolved"]["labels_first"] == 3
    nll = {method.label: rows[method.label]["test"]["nll"] for method in chosen}
    first, second = nll[exact.label]
    assert first != second
    assert nll[covers.label] == pytest.approx(nll[exact.label], rel=1e-4)  # its tail covers V
    assert nll[labels_first.label] != pytest.approx(nll[exact.label], rel=1e-4)
    assert nll[published.label] != pytest.approx(nll[exact.label], rel=1e-4)
    assert rows[exact.label]["sooner"] == [1.0, 1.0]
    assert rows[published.label]["sooner"] == [None, None]
    assert Path(comparison.sizes["curves"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(comparison.rows)) == comparison.rows
    TABLES[0].print(comparison.rows)
    mean, spread = (first + second) / 2, abs(first - second) / 2**0.5
    printed = capsys.readouterr().out
    assert f"{mean:.4f} ± {spread:.4f}" in printed
    assert "never" in printed
    train = Run.train

    def diverge(run):
        if run.config.objective_options == {"published": True}:
            raise FloatingPointError("The loss is nan")
        return train(run)

    monkeypatch.setattr(Learner, "step", None)  # nothing is trained twice
    monkeypatch.setattr(Run, "train", diverge)
    again = {row["label"]: row for row in compare(config, chosen, tmp_path / "out", (1, 0)).rows}
    assert again[exact.label]["test"]["nll"] == [second, first]
    assert again[published.label]["notes"] == ["failed; The loss is nan"]
    assert "test" not in again[published.label]
