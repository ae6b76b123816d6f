"""The comparison behind the demo, on a small model and real text."""

import json
import weakref

import pytest
import torch
from safetensors.torch import save_file
from support.models import tiny_batch, tiny_model

from sce_lm import apply_sce, objectives
from sce_lm.training import loss_cost, run_building
from sce_lm.training.command_line import parse_config
from sce_lm.training.comparison import Method, compare, save_loss_inputs
from sce_lm.training.learner import Learner
from sce_lm.training.loop import Run


def test_loss_inputs_reproduce_the_models_loss(tmp_path):
    """What is measured is the head's real work: Gemma 2's soft cap, ignored labels left out."""
    batch = tiny_batch()
    batch["labels"][:, 3] = -100
    model = apply_sce(tiny_model("gemma2"), objectives.get("exact"))
    path = tmp_path / "inputs.safetensors"
    sizes = save_loss_inputs(model, batch, path)
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    assert sizes["positions"] == int((batch["labels"][:, 1:] != -100).sum())
    for method in ({"name": "stock"}, {"name": "exact"}, {"name": "sce", "tail_candidates": 10**6}):
        cost = loss_cost.LossCost(**loss_cost._measure_here(str(path), method, repeats=1))
        assert cost.loss == pytest.approx(expected, rel=1e-5)
        assert cost.seconds > 0
        assert cost.peak_mib >= 0


def test_peak_memory_is_that_of_the_logits(tmp_path):
    """Stock keeps [N, V] logits, exact and SCE do not: the figures must tell them apart."""
    n, v, d = 2048, 16_384, 16
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "inputs.safetensors"
    save_file(
        {
            "hidden_states": torch.randn(n, d, generator=generator),
            "weight": torch.randn(v, d, generator=generator) / 4,
            "labels": torch.randint(0, v, (n,), generator=generator),
        },
        path,
        metadata={"post": '{"scale": 1.0, "soft_cap": null}'},
    )
    logits = n * v * 4 / 2**20
    assert loss_cost.measure(path, {"name": "stock"}).peak_mib > 1.5 * logits
    sce = {"name": "sce", "tail_candidates": 512, "shared_labels": False, "shared_frequent": 0}
    assert loss_cost.measure(path, sce).peak_mib < logits
    with pytest.raises(RuntimeError, match="no option 'tails'"):
        loss_cost.measure(path, {"name": "sce", "tails": 3})


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
    methods = {
        "exact": Method("exact"),
        "published SCE": Method("sce", {"published": True}),
        "corrected SCE": Method("sce", {"tail_candidates": 4096}),
        "labels first": Method("sce", {"tail_candidates": 4096, "labels_first": 3}),
    }
    models, alive, build = [], [], run_building.build_model

    def counted(*arguments):
        alive.append(sum(model() is not None for model in models))
        model = build(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run_building, "build_model", counted)
    result = compare(config, methods, tmp_path / "out", seeds=(0, 1))
    assert alive == [0] * 8  # one model in memory at a time
    assert set(result.costs) == {"stock", *methods}
    assert result.costs["stock"].loss == pytest.approx(result.costs["exact"].loss, rel=1e-5)
    # The form that most of a training has, here with all classes, not that of its first calls.
    exact_loss = result.costs["exact"].loss
    assert result.costs["labels first"].loss == pytest.approx(exact_loss, rel=1e-5)
    nll = {label: result.test(label, "nll")[0] for label in methods}
    first, second = result.test("exact", "nll")
    assert first != second
    assert nll["corrected SCE"] == pytest.approx(nll["exact"], rel=1e-4)  # its tail covers V
    assert nll["labels first"] != pytest.approx(nll["exact"], rel=1e-4)
    assert nll["published SCE"] != pytest.approx(nll["exact"], rel=1e-4)
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["summaries"]["exact"][0]["test"]["nll"] == nll["exact"]
    assert result.sooner["exact"] == [1.0, 1.0]
    assert written["sooner"]["published SCE"] == [None, None]
    assert result.curves.read_bytes().startswith(b"\x89PNG")
    result.print("title", {"nll": "test NLL"})
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
    again = compare(config, methods, tmp_path / "out", seeds=(1, 0))
    assert again.test("exact", "nll") == [second, first]
    assert again.failures == {"published SCE": "The loss is nan"}
    assert "published SCE" not in again.summaries
