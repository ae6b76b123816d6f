"""`scripts/gpu.sh`: what it does, rehearsed on the CPU, and what becomes of a part that fails."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import parts as planted
from support.launch import ONE_THREAD
from support.missing import NOT_IN_THE_CORE, environment

from sce_lm.benchmarks import gpu
from sce_lm.benchmarks.parts import Part, start_server
from sce_lm.benchmarks.peers import PEERS
from sce_lm.benchmarks.results import Results


@pytest.mark.slow
def test_a_part_that_crashes_or_hangs_is_survived(tmp_path, capsys):
    start_server("support.parts")
    outlived = tmp_path / "outlived"
    found = gpu.run(
        [
            Part("first", planted.good, {"value": 1}),
            Part("crashes", planted.crashing),
            Part("raises", planted.raising),
            Part("silent", planted.silent),
            Part("hangs", planted.hanging, {"path": str(outlived)}, limit=3.0),
            Part("last", planted.good, {"value": 2}),
        ],
        tmp_path / "found",
    )
    assert [result.get("value") for result in found] == [1, None, None, None, None, 2]
    failed = [result.get("failed") for result in found]
    assert failed == [
        None,
        "the process was ended by SIGSEGV",
        "ValueError: this part raises",
        "the process ended with code 3 and no result",
        "took longer than 3 s",
        None,
    ]
    for result in found:
        name = result["part"]
        assert json.loads((tmp_path / f"found/{name}.json").read_text()) == result
    assert (tmp_path / "found/first.log").read_text() == "said by a part\n"
    assert "and says more" in (tmp_path / "found/raises.log").read_text()
    assert json.loads((tmp_path / "found/summary.json").read_text()) == {"parts": found}
    gpu.print_summary(found)
    assert "crashes: failed; the process was ended by SIGSEGV" in capsys.readouterr().out
    time.sleep(6)
    assert not outlived.exists()


def test_what_the_time_does_not_reach_is_named(tmp_path):
    todo = [Part("late", planted.good, {"value": 1})]
    (found,) = gpu.run(todo, tmp_path, budget=0.5)
    assert found == {"part": "late", "skipped": "the time was over"}
    assert json.loads((tmp_path / "late.json").read_text()) == found


@pytest.mark.parametrize("name", ["correctness-float32", "loss-64x900x8-exact", "profile-sce"])
def test_a_part_runs_on_the_cpu(tmp_path, name):
    (part,) = (p for p in gpu.parts(gpu.REHEARSAL, "cpu") if p.name == name)
    result = part.run(**part.arguments)
    assert "failed" not in result
    assert json.loads(json.dumps(result))
    if name.startswith("loss"):
        assert result["host_seconds"] > 0
        assert result["over_floor"] == result["seconds"] / result["floor"]["seconds"]


def test_the_card_is_asked_all_that_people_quote():
    names = [part.name for part in gpu.parts(gpu.CARD, "cuda")]
    assert len(set(names)) == len(names)
    for shape in gpu.CARD.shapes:
        for method in (*gpu.OURS, *PEERS):
            assert f"loss-{shape[0]}x{shape[1]}x{shape[2]}-{method}" in names
    assert {"environment", "tests", "step-gemma-3-270m-stock", "step-qwen3-0.6b-exact"} <= {*names}


def rehearse(tmp_path, missing=(), network=True):
    variables = environment(tmp_path / "first", missing, network=network)
    command = ["bash", "scripts/gpu.sh", "--rehearse", "--json", str(tmp_path / "found")]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_rehearsal_needs_no_network_and_little_else(tmp_path):
    result = rehearse(tmp_path, NOT_IN_THE_CORE, network=False)
    assert result.returncode == 0, result.stderr + result.stdout
    found = json.loads((tmp_path / "found/summary.json").read_text())["parts"]
    assert [part["part"] for part in found] == [
        part.name for part in gpu.parts(gpu.REHEARSAL, "cpu")
    ]
    for part in found:
        assert json.loads((tmp_path / f"found/{part['part']}.json").read_text()) == part
        assert "failed" not in part, part
    made = Results.load(tmp_path / "found/results.json")
    assert made.machine["cpu"]
    assert {row["label"] for row in made.comparisons[1].rows} >= {"stock", "SCE (default)"}
    for shown in ("Correctness", "Forward and", "A whole training step", "liger: skipped"):
        assert shown in result.stdout


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    command = ["bash", "scripts/gpu.sh", "--json", str(tmp_path / "found")]
    variables = ONE_THREAD | {"PATH": f"{Path(sys.executable).parent}:{ONE_THREAD['PATH']}"}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("gpu.sh: torch finds no GPU here")
    assert not (tmp_path / "found").exists()
