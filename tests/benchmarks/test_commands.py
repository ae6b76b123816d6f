"""scripts/benchmark.py end to end, at tiny sizes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from support.launch import ONE_THREAD
from support.models import tiny_model
from support.training import documentation, lm_fields, write_config, write_text
from transformers import AutoTokenizer

from sce_lm import objectives
from sce_lm.benchmarks import loss, ranks, rows, scale
from sce_lm.benchmarks.estimators import estimators
from sce_lm.benchmarks.loss import methods
from sce_lm.benchmarks.methods import Method, choose
from sce_lm.benchmarks.peers import PEERS, Peer
from sce_lm.benchmarks.problem import random_problem
from sce_lm.benchmarks.rows import Settings, measure_rows

ONCE = ("--repeats", "1", "--threads", "1")


def benchmark(*arguments: object, fails: bool = False) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/benchmark.py", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, check=False)
    assert bool(result.returncode) == fails, result.stderr
    return result


def test_loss(tmp_path):
    sizes = ("--tokens", 96, "--vocab", 700, "--dim", 16, "--candidates", 64)
    result = benchmark(
        *("loss", *sizes, *ONCE, "--draws", 2, "--methods", "stock,liger,tail"),
        *("--json", tmp_path / "loss.json", "--plot", tmp_path / "loss.png"),
    )
    found = json.loads((tmp_path / "loss.json").read_text())
    stock, liger, tail = found["rows"]
    assert found["problem"]["vocab_size"] == 700
    assert found["machine"]["threads"] == 1
    assert liger["skipped"]  # not installed, or no GPU
    assert f"Liger: skipped; {liger['skipped']}" in " ".join(result.stdout.split())
    for head in ("trainable", "frozen"):
        assert stock[head]["speedup"] == 1
        speedup = stock[head]["seconds"] / tail[head]["seconds"]
        assert tail[head]["speedup"] == pytest.approx(speedup)
        floor = tail[head]["floor"]
        assert tail[head]["over_floor"] == pytest.approx(tail[head]["seconds"] / floor["seconds"])
        assert sum(floor["terms"].values()) == floor["seconds"]
    assert abs(stock["quality"]["bias"]) < 1e-5
    assert tail["quality"]["products"] == 64
    assert 0.5 < tail["quality"]["cos_weight"] < 1
    assert "SCE, tail of 64" in result.stdout
    assert "3/3" in result.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_estimators(tmp_path):
    write_text(tmp_path)
    model = tiny_model("llama", vocab_size=600)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "model")
    (tmp_path / "plain.txt").write_text(documentation()[0])
    result = benchmark(
        *("estimators", "--real", tmp_path / "model", "--text", tmp_path / "plain.txt"),
        *(*ONCE, "--tokens", 100, "--draws", 1, "--methods", "published,kernel-shared"),
        *("--logits", 64, "--scales", 1, 3),
        *("--json", tmp_path / "found.json", "--plot", tmp_path / "found.png"),
    )
    flat, peaked = json.loads((tmp_path / "found.json").read_text())["tables"]
    for table in (flat, peaked):
        for row in table["rows"]:
            assert row["quality"]["coverage"] <= 1
            assert row["quality"]["relative_error"] > 0
            assert "floor" not in row["trainable"]
    of_flat, of_peaked = (table["rows"][0]["quality"] for table in (flat, peaked))
    assert of_flat["top"] < of_peaked["top"]
    assert of_flat["classes"] > of_peaked["classes"]
    assert "Nearest to exact" in result.stdout
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_step(tmp_path):
    write_text(tmp_path)
    tiny_model("llama", vocab_size=600).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "model")
    (tmp_path / "plain.txt").write_text(documentation()[0])
    options = ("--text", tmp_path / "plain.txt", "--tokens", 64, "--threads", 1, "--repeats", 2)
    for more in (("--methods", "stock,corrected"), ("--methods", "corrected", "--lora", 4)):
        result = benchmark(
            *("step", "--model", tmp_path / "model", *options, *more),
            *("--json", tmp_path / "step.json", "--plot", tmp_path / "step.png"),
        )
        rows = {r["name"]: r for r in json.loads((tmp_path / "step.json").read_text())["rows"]}
        corrected = rows["corrected"]
        assert corrected["vocab_size"] == 600
        assert 0 < corrected["loss_seconds"] < corrected["seconds"]
        assert ("LoRA of rank 4" in result.stdout) == ("stock" not in rows)
        if "stock" in rows:
            assert rows["stock"]["positions"] == corrected["positions"]
            assert rows["stock"]["loss_seconds"] == 0
            speedup = rows["stock"]["seconds"] / corrected["seconds"]
            assert corrected["speedup"] == pytest.approx(speedup)
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    nowhere = ("step", "--model", tmp_path / "nowhere", "--methods", "corrected")
    assert "nothing could be measured; corrected SCE: " in benchmark(*nowhere, fails=True).stderr


@pytest.mark.slow
def test_train(tmp_path):
    write_text(tmp_path)
    fields = lm_fields(tmp_path, max_steps=4, eval_every=2, checkpoint_every=0)
    arguments = (
        *("train", write_config(tmp_path / "tiny.yaml", fields), "--methods", "exact,configured"),
        *("--logits", 64, "--seeds", 0, 1, "--steps", 3, "--folder", tmp_path / "runs"),
        *("--threads", 1, "--json", tmp_path / "train.json", "--plot", tmp_path / "train.png"),
    )
    shown = benchmark(*arguments).stdout
    (found,) = json.loads((tmp_path / "train.json").read_text())["results"]
    assert set(found["costs"]) == {"stock", "exact", "as configured"}
    for label in ("exact", "as configured"):
        assert [summary["steps"] for summary in found["summaries"][label]] == [3, 3]
        assert label in shown
    assert "±" in shown
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "runs" / "tiny" / "curves.png").exists()


def test_scale(tmp_path):
    benchmark(
        *("scale", "--dim", 8, "--tokens", 32, "--vocab", 600, "--vocabs", 500, 1000),
        *("--token-counts", 16, "--candidates", 20, "--budget", "1e-9", *ONCE),
        *("--json", tmp_path / "scale.json", "--plot", tmp_path / "scale.png"),
    )
    points = json.loads((tmp_path / "scale.json").read_text())["points"]
    sizes = [(p["method"], p["positions"], p["vocab_size"]) for p in points]
    assert sizes == [
        ("sce", 32, 500),
        ("sce", 32, 1000),
        ("exact", 32, 500),
        ("exact", 32, 1000),
        ("sce", 16, 600),
        ("exact", 16, 600),
    ]
    assert points[3]["error"].startswith("about")  # over the budget, by the point before
    for point in points[:3] + points[4:]:
        assert point["seconds"] > 0
        assert point["table_mib"] == point["vocab_size"] * 8 * 4 / 2**20
    assert points[0]["state_bytes_an_item"] >= 8  # counts
    assert points[2]["state_bytes_an_item"] == 0
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_ranks(tmp_path):
    benchmark(
        *("ranks", "--ranks", 3, "--vocabs", 400, "--token-counts", 20, "--dim", 8, *ONCE),
        *("--latency", 50, "--bandwidth", 1, "--json", tmp_path / "ranks.json"),
        *("--plot", tmp_path / "ranks.png"),
    )
    points = json.loads((tmp_path / "ranks.json").read_text())["points"]
    assert [(p["method"], p["ranks"]) for p in points] == [("exact", 3), ("sce", 3)]
    for point in points:
        assert point["weight_bytes"] == 134 * 8 * 4
        network = ranks.network_seconds(ranks.collective_bytes(20, 8), 3, 50e-6, 1e9)
        assert point["network_seconds"] == pytest.approx(network)
        assert point["seconds"] == point["own_seconds"] + point["network_seconds"]
    assert points[1]["kept_bytes"] >= 8 * 134  # counts of its rows
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_network_arithmetic():
    """Two ranks exchange all bytes once there and back, in two messages of each all-reduce."""
    sizes = ranks.collective_bytes(100, 8)
    assert sizes == [400, 1200, 3200]
    assert ranks.network_seconds(sizes, 1, 1e-3, 1e6) == 0
    assert ranks.network_seconds(sizes, 2, 0.0, 1e6) == pytest.approx(4800 / 1e6)
    assert ranks.network_seconds(sizes, 2, 1e-3, 1e6) == pytest.approx(4800 / 1e6 + 6e-3)
    assert ranks.network_seconds([4000], 4, 1e-3, 1e6) == pytest.approx(6e-3 + 1.5 * 4000 / 1e6)


def test_state_bytes_are_those_of_all_its_tensors():
    objective = objectives.get("sce", num_buckets=0)
    hidden, weight = torch.randn(5, 4), torch.randn(1000, 4, requires_grad=True)
    objective(hidden, weight, torch.arange(5))
    state = objective.state
    assert state is not None
    held = scale.tensor_bytes(state)
    assert 8 * 1000 <= held < 8 * 1000 * 4
    state.more = [{"a": torch.zeros(100)}, torch.zeros(50)[:10]]
    assert scale.tensor_bytes(state) == held + 4 * 150
    assert scale.tensor_bytes(None) == 0


def test_what_is_missing_or_fails_is_a_row(tmp_path, monkeypatch):
    problem = random_problem(tmp_path, 32, 200, 8, "float32")
    monkeypatch.setitem(PEERS, "absent", Peer(lambda post, device: None, {}, "no-pkg", "no_pkg"))
    asked = [
        Method("absent", "absent", {"name": "absent"}),
        Method("broken", "broken", {"name": "sce", "tails": 3}),
    ]
    settings = Settings(repeats=1, budget=1.0, draws=1, device="cpu")
    absent, broken = measure_rows(
        problem, tmp_path, asked, settings, heads=("trainable",), floors=False
    )
    assert absent["skipped"] == "not installed: pip install no-pkg"
    assert "no option 'tails'" in broken["trainable"]["error"]
    assert broken["quality"] == {}


def test_logits_that_do_not_fit_are_not_tried():
    stock = PEERS["stock"]
    assert stock.unavailable(10**6, "cpu") is None
    reason = stock.unavailable(10**15, "cpu")
    assert reason is not None
    assert "GiB for its logits" in reason
    assert replace(stock, logit_buffers={}).unavailable(10**15, "cpu") is None
    assert replace(stock, devices=("cuda",)).unavailable(1, "cpu") == "runs on cuda only"


def test_stock_that_does_not_fit_is_measured_on_part_of_the_positions(tmp_path, monkeypatch):
    problem = random_problem(tmp_path, 64, 200, 8, "float32")
    fits = 20 * 200
    unavailable = Peer.unavailable
    monkeypatch.setattr(
        Peer,
        "unavailable",
        lambda peer, logits, device: "no" if logits > fits else unavailable(peer, logits, device),
    )
    asked = [Method(name, name, {"name": name}) for name in ("stock", "compile", "exact")]
    settings = Settings(repeats=1, budget=1.0, draws=1, device="cpu")
    stock, other, exact = measure_rows(
        problem, tmp_path, asked, settings, heads=("trainable",), floors=False
    )
    assert stock["positions"] == 16
    assert stock["quality"] == {}
    assert "peak_mib" not in stock["trainable"]
    assert exact["trainable"]["speedup"] == pytest.approx(
        stock["trainable"]["seconds"] / exact["trainable"]["seconds"]
    )
    assert other["skipped"] == "no"
    (note,) = loss._notes(stock, 64)
    assert "measured on 16 positions" in note
    assert "multiplied by 4" in note


def test_names():
    known = methods(128)
    assert [m.name for m in choose(known, "tail,stock")] == ["tail", "stock"]
    assert choose(known, None) == known
    with pytest.raises(ValueError, match="'tial'; choose from stock"):
        choose(known, "tial")
    for method in known:
        if method.specification["name"] not in PEERS:
            objectives.get(**method.specification)
    for method in estimators(128, 1000):
        objectives.get(**method.specification)


def test_errors_are_one_line(tmp_path):
    result = benchmark("loss", "--methods", "nothing", fails=True)
    assert result.stderr.startswith("benchmark.py: --methods has 'nothing'")
    assert len(result.stderr.splitlines()) == 1


def test_a_state_that_has_seen_text_is_taken_over(tmp_path, monkeypatch):
    """Objectives start with the counts of the problem's past, as in the course of training."""
    random_problem(tmp_path, 32, 200, 8, "float32")
    rows.write_reference(str(tmp_path), "cpu")
    seen = []
    build = rows._build

    def spy(*arguments):
        loss, objective = build(*arguments)
        seen.append(objective)
        return loss, objective

    monkeypatch.setattr(rows, "_build", spy)
    settings = {"repeats": 1, "budget": 1.0, "draws": 1, "device": "cpu"}
    rows.measure_method(str(tmp_path), {"name": "sce"}, True, settings, 32, floor=False)
    assert seen[-1].state.counts.sum() >= 50 * 32
