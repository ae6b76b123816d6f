"""What is read back from a run cannot run code: each file of it is replaced by a pickle that would,
with the right hash where there are hashes, and is refused in one sentence."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from support.launch import ONE_THREAD
from support.training import SMALL_SCE, lm_fields, write_config

from sce_lm import SCEState
from sce_lm.hf.saving import load_objective, save_objective
from sce_lm.training.models import load_model, load_tokenizer
from sce_lm.training.run_building import build_run
from sce_lm.training.run_evaluation import evaluate_run
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


class Harm:
    """What it is read from makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def plain_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Harm(mark)))


def torch_file(path: Path, mark: Path) -> None:
    torch.save({"harm": Harm(mark)}, path)


@pytest.fixture(scope="module")
def run_folder(corpus, tmp_path_factory):
    """A finished run with keep_best, checkpoints and an objective with a state."""
    folder = tmp_path_factory.mktemp("safety") / "run"
    fields = lm_fields(
        corpus,
        output_dir=str(folder),
        objective="sce",
        objective_options=SMALL_SCE,
        max_steps=4,
        eval_every=2,
        keep_best=True,
    )
    build_run(TrainConfig(**fields)).train()
    return folder


@pytest.fixture
def copied(run_folder, tmp_path):
    """A copy, and the configuration by which it goes on."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    fields = json.loads((folder / "config.json").read_text())
    return folder, {**fields, "output_dir": str(folder), "max_steps": 6}


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


def rehash(checkpoint: Path) -> None:
    """Write the hashes of the files that are there into checkpoint.json."""
    path = checkpoint / "checkpoint.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in checkpoint.iterdir()
        if file != path
    }
    path.write_text(json.dumps(manifest))


def is_one_sentence(message: str) -> bool:
    return "\n" not in message.strip() and message.strip().endswith(".")


def test_a_checkpoint_holds_numbers_and_text_alone(run_folder):
    names = {path.name for path in newest(run_folder).iterdir()}
    assert names == {
        "checkpoint.json",
        "model.safetensors",
        "optimizer.safetensors",
        "random_rank0.safetensors",
        "sce_state_rank0.safetensors",
    }
    kinds = {path.suffix for path in run_folder.rglob("*") if path.is_file()}
    assert kinds == {".arrow", ".json", ".jsonl", ".md", ".parquet", ".png", ".safetensors"}


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("checkpoint.json", plain_pickle),
        ("model.safetensors", torch_file),
        ("optimizer.safetensors", plain_pickle),
        ("random_rank0.safetensors", torch_file),
        ("sce_state_rank0.safetensors", torch_file),
        # as earlier versions and accelerate have them
        ("custom_checkpoint_0.pkl", plain_pickle),
        ("random_states_0.pkl", torch_file),
        ("pytorch_model.bin", torch_file),
    ],
)
def test_a_harmful_file_of_a_checkpoint_is_refused(copied, tmp_path, name, plant):
    folder, fields = copied
    mark = tmp_path / "mark"
    plant(newest(folder) / name, mark)
    if name != "checkpoint.json":
        rehash(newest(folder))
    with pytest.raises(ValueError, match="checkpoint") as caught:
        build_run(TrainConfig(**fields))
    assert is_one_sentence(str(caught.value))
    assert name in str(caught.value)
    assert not mark.exists()


def test_a_file_in_place_of_the_safe_one_is_not_read_instead(copied, tmp_path):
    """accelerate reads pytorch_model.bin where there is no model.safetensors."""
    folder, fields = copied
    checkpoint, mark = newest(folder), tmp_path / "mark"
    for safe, other in (("model", "pytorch_model.bin"), ("random_rank0", "random_states_0.pkl")):
        (checkpoint / f"{safe}.safetensors").unlink()
        torch_file(checkpoint / other, mark)
    rehash(checkpoint)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, which is none of its files"):
        build_run(TrainConfig(**fields))
    assert not mark.exists()


def test_a_path_out_of_the_checkpoint_is_refused(copied):
    folder, fields = copied
    manifest = newest(folder) / "checkpoint.json"
    content = json.loads(manifest.read_text())
    content["files"]["../../config.json"] = "0" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"holds \.\./\.\./config\.json, which is none"):
        build_run(TrainConfig(**fields))


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl"])
def test_a_harmful_file_of_a_run_is_refused(copied, tmp_path, name):
    folder, fields = copied
    mark = tmp_path / "mark"
    plain_pickle(folder / name, mark)
    if name == "metrics.jsonl":  # whose last line counts only with its end
        with (folder / name).open("ab") as file:
            file.write(b"\n")
    with pytest.raises(ValueError, match=name) as caught:
        build_run(TrainConfig(**fields))
    assert is_one_sentence(str(caught.value))
    assert not mark.exists()


def test_harmful_weights_of_the_best_evaluation_are_refused(copied, tmp_path):
    folder, fields = copied
    mark = tmp_path / "mark"
    run = build_run(TrainConfig(**fields))
    for weights in (folder / "best").rglob("model.safetensors"):
        torch_file(weights, mark)
    with pytest.raises(ValueError, match="does not hold the weights of the best") as caught:
        run.best.load(run.learner.plain_model)
    assert is_one_sentence(str(caught.value))
    assert not mark.exists()


CODE = {
    "AutoConfig": "harm.HarmConfig",
    "AutoModelForCausalLM": "harm.HarmModel",
    "AutoTokenizer": ["harm.HarmTokenizer", "harm.HarmTokenizer"],
}


def add_code(model: Path, mark: Path) -> None:
    """Code beside a model, and what tells transformers to run it."""
    (model / "harm.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**content, "auto_map": CODE}))


def test_code_beside_a_stock_model_is_not_run(copied, tmp_path):
    folder, mark = copied[0], tmp_path / "mark"
    add_code(folder / "model", mark)
    torch_file(folder / "model" / "pytorch_model.bin", mark)
    assert type(load_model(folder / "model")).__name__ == "GPT2LMHeadModel"
    assert len(load_tokenizer(folder / "model")) == 600
    assert evaluate_run(RunFolder(folder), Accelerator())["model"]["nll"] > 0
    assert not mark.exists()


def test_a_model_that_needs_its_code_is_refused(copied, tmp_path):
    folder, fields = copied
    model, mark = folder / "model", tmp_path / "mark"
    add_code(model, mark)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((model / name).read_text())
        changes = {"model_type": "harm", "tokenizer_class": "HarmTokenizer"}
        (model / name).write_text(json.dumps(content | changes))
    fields |= {"model": str(model), "model_config": {}, "output_dir": str(tmp_path / "new")}
    for load in (
        lambda: load_model(model),
        lambda: load_tokenizer(model),
        lambda: evaluate_run(RunFolder(folder), Accelerator()),
        lambda: build_run(TrainConfig(**fields)),
        lambda: build_run(TrainConfig(**{**fields, "tokenizer": str(model)})),
    ):
        with pytest.raises(ValueError, match=r"cannot be loaded.*custom code") as caught:
            load()
        assert is_one_sentence(str(caught.value))
    assert not mark.exists()


@pytest.mark.parametrize("plant", [plain_pickle, torch_file])
def test_weights_that_are_no_safetensors_are_refused(copied, tmp_path, plant):
    model, mark = copied[0] / "model", tmp_path / "mark"
    plant(model / "model.safetensors", mark)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(model)
    (model / "model.safetensors").unlink()
    plant(model / "pytorch_model.bin", mark)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_model(model)
    assert is_one_sentence(str(caught.value))
    assert not mark.exists()


def test_a_base_model_of_an_older_kind_is_read_as_numbers(copied, tmp_path):
    folder, fields = copied
    model, mark = folder / "model", tmp_path / "mark"
    (model / "model.safetensors").unlink()
    torch_file(model / "pytorch_model.bin", mark)
    fields |= {"model": str(model), "model_config": {}, "output_dir": str(tmp_path / "new")}
    with pytest.raises(ValueError, match="cannot be loaded"):
        build_run(TrainConfig(**fields))
    assert not mark.exists()


@pytest.mark.parametrize("plant", [plain_pickle, torch_file])
def test_a_harmful_objective_or_state_is_refused(copied, tmp_path, plant):
    folder, mark = tmp_path / "saved", tmp_path / "mark"
    folder.mkdir()
    save_objective(load_objective(copied[0]), folder)
    plant(folder / "objective.json", mark)
    with pytest.raises(ValueError, match=r"objective\.json") as caught:
        load_objective(folder)
    assert is_one_sentence(str(caught.value))
    (folder / "objective.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="expected the name and options of an objective"):
        load_objective(folder)

    save_objective(load_objective(copied[0]), folder)
    state = folder / "sce_state_rank0.safetensors"
    plant(state, mark)
    for load in (lambda: load_objective(folder), lambda: SCEState().load(state)):
        with pytest.raises(ValueError, match="is not a complete SCEState file") as caught:
            load()
        assert is_one_sentence(str(caught.value))
    assert not mark.exists()


def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)


def test_the_scripts_refuse_in_one_sentence(copied, tmp_path):
    folder, fields = copied
    mark = tmp_path / "mark"
    torch_file(newest(folder) / "random_rank0.safetensors", mark)
    rehash(newest(folder))
    torch_file(folder / "model" / "model.safetensors", mark)
    config = write_config(tmp_path / "config.json", fields)
    for done in (
        script("train.py", config),
        script("evaluate.py", folder),
        script("recommend.py", folder, "--history", "a"),
    ):
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert is_one_sentence(done.stderr.strip().split("\n")[-1])
    assert not mark.exists()
