"""Problems: drawn ones, and those of a model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.models import tiny_model
from support.training import lm_fields, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from sce_lm.benchmarks import real
from sce_lm.benchmarks.loss_cost import load_inputs, stock
from sce_lm.benchmarks.problem import random_problem, zipf_labels
from sce_lm.benchmarks.real import real_problem, text_sequences
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.stored_data import store
from sce_lm.training.task_sources import build_task
from sce_lm.training.train_config import TrainConfig


def test_drawn_problem(tmp_path):
    problem = random_problem(tmp_path, 200, 3000, 32, "bfloat16")
    assert (problem.positions, problem.vocab_size, problem.width) == (200, 3000, 32)
    assert problem.gradient_mib == 3000 * 32 * 2 / 2**20
    inputs, _ = load_inputs(tmp_path / "inputs.safetensors", "cpu")
    assert inputs["weight"].dtype == torch.bfloat16
    logits = inputs["hidden_states"].float() @ inputs["weight"].float().T
    assert 1 < logits.std() < 2
    counts = load_file(tmp_path / "state.safetensors")["counts"]
    assert counts.sum() == 50 * 200  # other labels than the 200 that are measured


def test_zipf_labels():
    labels = zipf_labels(200_000, 1000, torch.Generator().manual_seed(0))
    share = torch.bincount(labels, minlength=1000) / 200_000
    j = torch.arange(1000)
    expected = torch.log((j + 2) / (j + 1)) / torch.log(torch.tensor(1001.0))
    assert (share - expected).abs().max() < 0.005


def test_exactly_the_positions_asked_for():
    """Ignored labels and the first column do not count; the other rows' labels are the past."""
    labels = torch.arange(60).view(6, 10)
    labels[:, 4] = -100
    batch, past = real._take(lambda rows: {"labels": labels[rows]}, 6, 11)
    used = batch["labels"]
    assert (used[:, 1:] != -100).sum() == 11
    assert len(used) == 2
    assert len(past) == 4 * 8
    assert not set(past.tolist()) & set(used.flatten().tolist())
    with pytest.raises(ValueError, match=r"48 labels .* 49 positions"):
        real._take(lambda rows: {"labels": labels[rows]}, 6, 49)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with text, a tokenizer, and a tied and capped model of its vocabulary."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    model = tiny_model("gemma2", vocab_size=600)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "model")
    return folder


def test_problem_of_a_model_is_its_loss_on_the_text(text, tmp_path):
    plain = tmp_path / "plain.txt"
    lines = (text / "text.jsonl").read_text().splitlines()
    plain.write_text("\n".join(json.loads(line)["text"] for line in lines[:2]))
    problem = real_problem(tmp_path, text / "model", 150, "float32", text=plain)
    assert (problem.positions, problem.vocab_size) == (150, 600)
    inputs, post = load_inputs(tmp_path / "inputs.safetensors", "cpu")
    assert post.soft_cap == 0.5

    model = AutoModelForCausalLM.from_pretrained(text / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(text / "model")
    rows = text_sequences(model, tokenizer, plain)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:2]]
    labels = rows.clone()
    labels[1, 1 + 150 - 127 :] = -100
    with torch.no_grad():
        expected = model(input_ids=rows, labels=labels).loss
    assert stock(post)(**inputs).item() == pytest.approx(expected.item(), rel=1e-5)

    fresh = tmp_path / "fresh"
    fresh.mkdir()
    initial = real_problem(fresh, text / "model", 150, "float32", text=plain, initial=True)
    assert initial.title == "model at initialisation"
    other, _ = load_inputs(fresh / "inputs.safetensors", "cpu")
    assert torch.equal(other["labels"], inputs["labels"])
    assert not torch.allclose(other["weight"], inputs["weight"])


def test_problem_of_a_run_takes_its_data(text, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(text / "model")
    config = TrainConfig(**lm_fields(text, sequence_length=64))
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    store(build_task(config), RunFolder(run))
    problem = real_problem(tmp_path, run, 100, "float32")
    assert problem.title == "run"
    assert load_file(tmp_path / "state.safetensors")["counts"].sum() > 0
