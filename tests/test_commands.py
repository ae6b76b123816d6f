"""The installed command: its dispatcher, the configurations that it writes, and the wheel."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from support.launch import ONE_THREAD
from support.missing import NOT_IN_THE_CORE, environment

from sce_lm import commands
from sce_lm.commands.presets import PRESETS
from sce_lm.training.command_line import parse_config
from sce_lm.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


def test_help_names_every_command_and_needs_nothing(tmp_path):
    missing = (*NOT_IN_THE_CORE, "torch", "transformers", "yaml", "numpy")
    command = [sys.executable, "-m", "sce_lm", "--help"]
    done = subprocess.run(
        command, env=environment(tmp_path, missing), capture_output=True, text=True, check=True
    )
    assert re.findall(r"^  (\w+)  ", done.stdout, re.MULTILINE) == [*commands.COMMANDS]
    assert done.stderr == ""


def test_every_command_has_a_module_and_every_module_is_a_command():
    modules = {path.stem for path in Path(commands.__path__[0]).glob("*.py")}
    assert modules - {"__init__", "presets"} == set(commands.COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys):
    assert commands.main(["evalute", "runs/a"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "sce-lm: there is no command 'evalute'; did you mean 'evaluate'? See sce-lm --help.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "sce-lm train: There is no configuration file 'none.yaml'"),
        (["evaluate", "none"], "sce-lm evaluate: none has no config.json"),
        (["recommend", "none", "--history", "a"], "sce-lm recommend: none holds no model"),
        (["export", "none", "--output", "a"], "sce-lm export: none holds no model"),
        (["benchmark", "loss", "--real", "none"], "sce-lm benchmark: none has no config.json"),
        (["init", "lm", "none/a.yaml"], "sce-lm init: [Errno 2] No such file or directory"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_ends_in_a_sentence_that_begins_with_its_name(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments)
    assert str(ended.value.code).startswith(message)
    assert "\n" not in str(ended.value.code)


@pytest.mark.parametrize(
    "command", ["train", "teach", "evaluate", "recommend", "export", "benchmark", "demo", "init"]
)
def test_help_of_a_command_calls_it_by_its_name(command, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: sce-lm {command} ")


@pytest.mark.parametrize("task", ["lm", "items"])
def test_init_writes_a_configuration_that_train_reads(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands.main(["init", task])
    file = tmp_path / f"{task}.yaml"
    assert capsys.readouterr().out.endswith(f"train with: sce-lm train {task}.yaml\n")
    wanted = TrainConfig(**PRESETS[task])
    assert parse_config([str(file)]) == wanted

    text = file.read_text()
    with_all = tmp_path / "all.yaml"
    with_all.write_text(re.sub(r"^#(?! |$)", "", text, flags=re.MULTILINE))
    assert parse_config([str(with_all)]) == wanted
    named = set(re.findall(r"^(\w+):", with_all.read_text(), re.MULTILINE))
    missing = set(TrainConfig.defaults()) - named
    assert missing == set() if task == "items" else "split_quantile" in missing

    with pytest.raises(SystemExit, match=rf"{task}\.yaml is there already"):
        commands.main(["init", task, str(file)])
    assert file.read_text() == text


@pytest.mark.parametrize("task", ["lm", "items"])
def test_presets_are_the_examples_on_embedded_data(task):
    config = parse_config([str(ROOT / "examples" / "configs" / f"{task}_embedded.yaml")])
    of_example = config.to_dict() | {"output_dir": f"runs/{task}"}
    assert TrainConfig(**PRESETS[task]).to_dict() == of_example


@pytest.mark.slow
@pytest.mark.parametrize("launched", [False, True], ids=["alone", "two processes"])
def test_the_wheel_trains_evaluates_and_recommends(wheel, launched, tmp_path):
    """In an empty folder, with nothing of the clone."""
    rows = [
        {"user_id": f"u{user}", "item_id": f"item-{(user + t) % 12}", "time": t}
        for user in range(40)
        for t in range(6)
    ]
    pl.DataFrame(rows).write_csv(tmp_path / "log.csv")
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]

    def sce_lm(*arguments, start=()):
        done = subprocess.run(
            [sys.executable, "-m", *start, "sce_lm", *arguments],
            cwd=tmp_path,
            env={**ONE_THREAD, "PYTHONPATH": str(wheel)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    sce_lm("init", "items", "log.yaml")
    fields = {"data": "log.csv", "time_column": "time", "output_dir": "run", "cache_dir": "cache"}
    fields |= {"max_steps": "4", "warmup_steps": "1", "per_device_batch_size": "4"}
    options = [text for name, value in fields.items() for text in (f"--{name}", value)]
    printed = sce_lm("train", "log.yaml", *options, start=launch if launched else ())
    assert "The run is in run; all figures in run/summary.json" in printed
    assert len(printed[printed.index("Steps: 4, the last loss ") :].splitlines()) <= 10
    assert re.search(r"^Test: ndcg@10 \d\.\d{4}, ", printed, re.MULTILINE)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["processes"] == 1 + launched
    assert "ndcg@10" in sce_lm("evaluate", "run")
    lists = sce_lm("recommend", "run", "--history", "item-1", "item-2", "--k", "3")
    assert len(re.findall(r"^ +\d+ .* item-\d+$", lists, re.MULTILINE)) == 3


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder into which a wheel of this checkout is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source, built, installed = folder / "source", folder / "built", folder / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "sce_lm", source / "sce_lm")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built), str(source)]
    subprocess.run([*pip, *build], check=True)
    (file,) = built.glob("*.whl")
    install = ["install", "--no-deps", "--target", str(installed), str(file)]
    subprocess.run([*pip, *install], check=True)
    assert (installed / "bin" / "sce-lm").is_file()
    return installed


def test_export_writes_an_index_that_recommend_takes(tmp_path, capsys):
    pytest.importorskip("faiss")
    recsys = pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)
    from sce_lm.recsys import build_item_tokenizer

    tokenizer = build_item_tokenizer(f"i{n}" for n in range(300))
    config = recsys.SASRecConfig(
        vocab_size=len(tokenizer), hidden_size=8, max_position_embeddings=9, initializer_range=1.0
    )
    for part in (recsys.SASRecForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "model")
    model, index = str(tmp_path / "model"), str(tmp_path / "index")
    capsys.readouterr()
    assert commands.main(["export", model, "--output", index, "--format", "faiss"]) is None
    card = json.loads(capsys.readouterr().out)
    assert card["recall"] >= 0.98
    assert card["recall_of"] == "exact lists of 10 for 256 histories of one item"
    listed = []
    for options in ([], ["--index", index]):
        assert commands.main(["recommend", model, "--k", "5", *options, "--history", "i3"]) == 0
        listed.append(capsys.readouterr().out)
    assert listed[0] == listed[1]
    with pytest.raises(SystemExit, match="exists already"):
        commands.main(["export", model, "--output", index])
