"""Objective and weights in one folder; what is saved or pushed is a stock model."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from support.models import tiny_batch, tiny_model
from support.training import lm_fields, write_text
from support.versions import TRANSFORMERS_5
from transformers import AutoModelForCausalLM
from transformers.utils import hub

from sce_lm import SCEConfig, objectives
from sce_lm.hf import apply_sce, load_objective, objective_of, save_objective
from sce_lm.training.run_building import build_run
from sce_lm.training.train_config import TrainConfig

CONFIG = SCEConfig(num_buckets=4, bucket_candidates=8, shared_frequent=8, tail_candidates=16)


def trained(steps=3):
    model = apply_sce(tiny_model("llama"), CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(steps):
        torch.manual_seed(seed)
        model(**tiny_batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_weights_and_objective_come_back_together(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    save_objective(objective_of(model), tmp_path)

    again = apply_sce(AutoModelForCausalLM.from_pretrained(tmp_path), load_objective(tmp_path))
    objective = objective_of(again)
    assert objective.config == CONFIG
    assert objective.state.step == 3
    assert torch.equal(objective.state.counts, objective_of(model).state.counts)
    losses = []
    for m in (model, again.train()):
        torch.manual_seed(9)
        losses.append(m(**tiny_batch(9)).loss)
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize(
    "options",
    [*({"name": name} for name in objectives.names()), {"name": "sce", "published": True}],
    ids=str,
)
def test_every_objective_comes_back(options, tmp_path):
    objective = objectives.get(**options)
    save_objective(objective, tmp_path)
    again = load_objective(tmp_path)
    assert type(again) is type(objective)
    assert again.config == objective.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["objective.json"]  # no state of no calls


def test_an_objective_of_an_earlier_version_comes_back_with_one_warning(tmp_path):
    saved = {"name": "sce", "correction": "none", "num_buckets": 4, "tail_strata": 1}
    (tmp_path / "objective.json").write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match="correction 'none', tail_strata 1") as warned:
        objective = load_objective(tmp_path)
    assert len(warned) == 1
    config = SCEConfig(
        num_buckets=4, bucket_candidates=1024, tail_candidates=0, control_variate=False
    )
    assert objective.config == config


def test_ranks_keep_their_own_states(tmp_path):
    for rank in range(2):
        save_objective(objective_of(trained(rank + 1)), tmp_path, rank)
    assert [load_objective(tmp_path, rank).state.step for rank in range(2)] == [1, 2]
    assert load_objective(tmp_path, rank=2).state.is_new


def test_folder_without_an_objective(tmp_path):
    with pytest.raises(FileNotFoundError, match="build the objective"):
        load_objective(tmp_path)
    (tmp_path / "objective.json").write_text(json.dumps({"name": "another"}))
    with pytest.raises(ValueError, match="unknown objective"):
        load_objective(tmp_path)


def test_run_folder_of_the_training_script(tmp_path):
    write_text(tmp_path)
    options = {"num_buckets": 4, "bucket_candidates": 16, "tail_candidates": 32}
    fields = lm_fields(tmp_path, objective="sce", objective_options=options, max_steps=2)
    build_run(TrainConfig(**fields)).train()
    folder = tmp_path / "run"
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    apply_sce(model, load_objective(folder))
    assert objective_of(model).config == SCEConfig(**options)
    ids = torch.arange(20).view(2, 10)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert objective_of(model).state.step == 1


# ------------------------------------------------------------------------- nothing of ours is saved


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 reaches the hub another way")
def test_pushed_files_are_those_of_a_stock_model(tmp_path, monkeypatch):
    """Everything but the network."""
    pushed = []

    class Repository:
        repo_id = "somebody/model"

    class Hub:
        def create_repo(self, *args, **kwargs):
            return Repository

    def upload(self, folder, *args, **kwargs):
        copy = tmp_path / str(len(pushed))
        shutil.copytree(folder, copy)
        pushed.append(copy)

    def no_card(*args, **kwargs):
        raise hub.EntryNotFoundError("a new repository has no model card")

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model = trained()
    for patched in (model, tiny_model("llama")):
        patched.push_to_hub("somebody/model")
    names = [sorted(path.name for path in folder.iterdir()) for folder in pushed]
    assert names[0] == names[1]
    configs = [(folder / "config.json").read_text() for folder in pushed]
    assert configs[0] == configs[1]
    assert not any("sce" in text for text in (*configs[0].splitlines(), *names[0]))
    stock = AutoModelForCausalLM.from_pretrained(pushed[0]).eval()
    ids = tiny_batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_pickled_model_is_whole_in_another_process(tmp_path):
    """torch.save of the model itself, read where nothing was patched."""
    model = trained()
    torch.save(model, tmp_path / "model.pt")
    torch.save(tiny_batch(5), tmp_path / "batch.pt")
    program = (
        "import torch; from sce_lm.hf import objective_of\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "torch.manual_seed(77)\n"
        f"loss = model(**torch.load({str(tmp_path / 'batch.pt')!r})).loss\n"
        "loss.backward()\n"
        "print(objective_of(model).state.step, repr(float(loss.detach())))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    torch.manual_seed(77)
    assert out.split() == ["4", repr(float(model(**tiny_batch(5)).loss.detach()))]


def test_state_dict_loads_into_stock_and_back():
    model, stock = trained(), tiny_model("llama", seed=3)
    stock.load_state_dict(model.state_dict())
    patched = apply_sce(tiny_model("llama", seed=4), objectives.get("exact"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched.load_state_dict(stock.state_dict())
        loss = patched(**tiny_batch()).loss
    torch.testing.assert_close(loss, stock(**tiny_batch()).loss)
