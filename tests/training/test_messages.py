"""Bad configurations and commands: each ends in one sentence, and nothing was written or lost.

A row is a command, what its message says (a regular expression), and the text of `a.yaml`, behind a
model. It runs in a folder that holds another run in the default `output_dir`.
"""

import re
import runpy
import shlex
import signal
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODEL = "model_config: {model_type: llama, hidden_size: 64}\n"
TRAIN = "train.py a.yaml "

MESSAGES = [
    # Values of a file.
    (TRAIN, r"a\.yaml: max_steps is 'ten'; expected int", "max_steps: ten"),
    (TRAIN, r"a\.yaml: max_steps is 1\.5; expected int", "max_steps: 1.5e0"),
    (TRAIN, r"a\.yaml: max_steps is True; expected int", "max_steps: true"),
    (TRAIN, r"a\.yaml: max_steps is empty; expected int; give it a value", "max_steps:"),
    (TRAIN, r"a\.yaml: learning_rate is nan; expected a finite number", "learning_rate: .nan"),
    (TRAIN, r"a\.yaml: objective_options is empty; expected a mapping", "objective_options:"),
    (TRAIN, r"a\.yaml: data_options is \[\]; expected a mapping", "data_options: []"),
    (TRAIN, r"a\.yaml: objective_options\.uniform_floor is '5e-2'; expected float or 'auto'",
     "objective_options: {uniform_floor: '5e-2'}"),
    (TRAIN, r"a\.yaml: objective_options\.uniform_flor is no option.*mean 'uniform_floor'",
     "objective_options: {uniform_flor: 5e-2}"),
    (TRAIN, r"a\.yaml: objective_options\.published is 'no'; expected true or false",
     "objective_options: {published: no}"),
    (TRAIN, r"a\.yaml: objective is 'scee'; expected one of", "objective: scee"),
    (TRAIN, r"a\.yaml: patience is 3 and eval_every 0", "patience: 3\neval_every: 0"),
    # Keys and the file itself.
    (TRAIN, r"a\.yaml, line 3: max_steps is given twice, the first time in line 2",
     "max_steps: 1\nmax_steps: 2"),
    (TRAIN, r"a\.yaml, line 2: objective_options\.alpha is given twice",
     "objective_options: {alpha: 1, alpha: 2}"),
    (TRAIN, r"a\.yaml sets '1', which is no field", "1: 2"),
    (TRAIN, r"a\.yaml, line 2 cannot be read as YAML .*found character '\\t'", "\tmax_steps: 1"),
    (TRAIN, r"a\.yaml, line 2: data has the tag !!python/.*, which is not read",
     "data: !!python/object/apply:os.system [touch planted]"),
    ("train.py none.yaml", "There is no configuration file 'none.yaml'", ""),
    ("train.py runs", "runs is a folder; give the path of a YAML file", ""),
    ("train.py list.yaml", r"list\.yaml holds a list; expected a mapping of fields", ""),
    ("train.py latin.yaml", r"latin\.yaml cannot be read as YAML", ""),
    ("train.py", "the command line: Neither model nor model_config is given", ""),
    # The command line.
    (TRAIN + "--max_steps ten", "the command line: max_steps is 'ten'; expected int", ""),
    (TRAIN + "--patience 3", r"the command line and a\.yaml: patience is 3", "eval_every: 0"),
    (TRAIN + "--max_step 3", "the command line sets 'max_step'.*did you mean 'max_steps'", ""),
    (TRAIN + "--max_steps", "max_steps.*expected one argument; see --help", ""),
    (TRAIN + "b.yaml", "'b.yaml' where a --field was expected; the configuration file comes", ""),
    (TRAIN + "--objective_options '{\"alpha\": 1, \"alpha\": 2}'",
     r"the command line: objective_options\.alpha is given twice; keep one", ""),
    (TRAIN + "--objective_options {oops", "objective_options is '{oops' and cannot be read", ""),
    # Other commands.
    ("benchmark.py loss --text a.yaml", "--text goes with a model and none is named", ""),
    ("benchmark.py loss --real none", r"none has no config\.json; expected the folder of a", ""),
    ("benchmark.py loss --json none/a.json", "--json is 'none/a.json'; give a file", ""),
    ("benchmark.py loss --threads 0", "--threads is 0; give a number from 1 up", ""),
    ("benchmark.py train a.yaml --fields '{\"max_step\": 3}'", "'max_step', which is no field", ""),
    ("benchmark.py train a.yaml --fields 3", "--fields is '3'; expected a mapping of fields", ""),
    ("evaluate.py none", "none has no config.json; expected the folder of a finished run", ""),
    ("recommend.py none --history a", "none holds no model; give the folder of a finished run", ""),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a run whose figures must not be lost."""
    run = tmp_path / "runs" / "default"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "list.yaml").write_text("- max_steps: 3\n")
    (tmp_path / "latin.yaml").write_bytes("data: café\n".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def contents(folder):
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}


@pytest.mark.parametrize(("command", "sentence", "text"), MESSAGES)
def test_message(command, sentence, text, folder, monkeypatch, capsys):
    (folder / "a.yaml").write_text(f"{MODEL}{text}\n")
    before = contents(folder)
    script, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    message = ended.value.code
    if not isinstance(message, str):  # of argparse, behind the usage
        assert message == 2
        message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"{script}: ")
    assert "\n" not in message
    assert message[-1] in ".?"
    assert re.search(sentence, message), message
    assert contents(folder) == before
