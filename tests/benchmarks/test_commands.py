"""scripts/benchmark.py end to end, at tiny sizes."""

import argparse
import importlib
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from support.launch import ONE_THREAD
from support.models import tiny_model
from support.training import documentation, lm_fields, write_config, write_text
from transformers import AutoTokenizer

from sce_lm import objectives
from sce_lm.benchmarks import scale, side_by_side
from sce_lm.benchmarks.methods import LOGITS, Method, choose, methods
from sce_lm.benchmarks.peers import PEERS, Peer
from sce_lm.benchmarks.problem import random_problem
from sce_lm.benchmarks.quality import write_reference
from sce_lm.benchmarks.results import Results
from sce_lm.benchmarks.side_by_side import Settings, measure_method, measure_methods

QUICK = Settings("cpu", repeats=1, heads=("trainable",), floors=False)
ONCE = ("--repeats", "1", "--threads", "1")


def benchmark(*arguments: object, fails: bool = False) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/benchmark.py", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, check=False)
    assert bool(result.returncode) == fails, result.stderr
    return result


def rows_of(path):
    (comparison,) = Results.load(path).comparisons
    return comparison.rows


def test_loss(tmp_path):
    sizes = ("--tokens", 96, "--vocab", 700, "--dim", 16, "--logits", 64)
    result = benchmark(
        *("loss", *sizes, *ONCE, "--draws", 2, "--methods", "stock", "liger", "sce-tail"),
        *('sce:{"tail_candidates": 32}', "--json", tmp_path / "loss.json"),
        *("--plot", tmp_path / "loss.png"),
    )
    found = Results.load(tmp_path / "loss.json")
    stock, liger, tail, other = found.comparisons[0].rows
    assert found.comparisons[0].sizes["vocab_size"] == 700
    assert found.machine["threads"] == 1
    assert {"torch", "python"} <= set(found.versions)
    assert found.command.startswith("python scripts/benchmark.py loss --tokens 96")
    (note,) = liger["notes"]  # not installed, or no GPU
    assert f"Liger: {note}" in " ".join(result.stdout.split())
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
    assert tail["resolved"]["tail_candidates"] == 64
    assert other["label"] == "SCE (default), tail_candidates=32"
    assert other["resolved"]["tail_candidates"] == 32
    assert other["resolved"]["shared_frequent"] == 700  # "auto", and no more than there are
    assert "SCE (tail only)" in result.stdout
    assert "4/4" in result.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_of_a_shared_machine_no_seconds_are_kept(tmp_path):
    sizes = ("--tokens", 32, "--vocab", 200, "--dim", 8, *ONCE, "--draws", 1)
    path = tmp_path / "loss.json"
    shown = benchmark(
        *("loss", *sizes, "--shared", "--methods", "stock", "exact", "--json", path)
    ).stdout
    assert "seconds" not in path.read_text()
    assert "shared with other work" in shown
    assert "x stock" in shown
    assert "forward s" not in shown


@pytest.mark.slow
def test_estimators(tmp_path):
    write_text(tmp_path)
    model = tiny_model("llama", vocab_size=600)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "model")
    (tmp_path / "plain.txt").write_text(documentation()[0])
    benchmark(
        *("estimators", "--real", tmp_path / "model", "--text", tmp_path / "plain.txt"),
        *(*ONCE, "--tokens", 100, "--draws", 1, "--logits", 64, "--scales", 1, 3),
        *("--methods", "sce-published", 'kernel-sampling:{"shared": true}'),
        *("--json", tmp_path / "found.json", "--plot", tmp_path / "found.png"),
    )
    flat, peaked = (
        comparison.rows for comparison in Results.load(tmp_path / "found.json").comparisons
    )
    for row in (*flat, *peaked):
        assert row["quality"]["coverage"] <= 1
        assert row["quality"]["relative_error"] > 0
        assert "floor" not in row["trainable"]
    assert flat[0]["quality"]["top"] < peaked[0]["quality"]["top"]
    assert flat[0]["quality"]["classes"] > peaked[0]["quality"]["classes"]
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_step(tmp_path):
    write_text(tmp_path)
    tiny_model("llama", vocab_size=600).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "model")
    (tmp_path / "plain.txt").write_text(documentation()[0])
    options = ("--text", tmp_path / "plain.txt", "--tokens", 64, "--threads", 1, "--repeats", 2)
    for more in (("--methods", "stock", "sce"), ("--methods", "sce", "--lora", 4)):
        result = benchmark(
            *("step", "--model", tmp_path / "model", *options, *more),
            *("--json", tmp_path / "step.json", "--plot", tmp_path / "step.png"),
        )
        rows = {row["name"]: row for row in rows_of(tmp_path / "step.json")}
        sce = rows["sce"]
        assert sce["vocab_size"] == 600
        assert 0 < sce["loss_seconds"] < sce["seconds"]
        assert sce["loss_share"] == sce["loss_seconds"] / sce["seconds"]
        assert ("LoRA of rank 4" in result.stdout) == ("stock" not in rows)
        if "stock" in rows:
            assert rows["stock"]["positions"] == sce["positions"]
            assert rows["stock"]["loss_seconds"] == 0
            assert sce["speedup"] == pytest.approx(rows["stock"]["seconds"] / sce["seconds"])
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    nowhere = ("step", "--model", tmp_path / "nowhere", "--methods", "sce")
    assert "nothing could be measured; SCE (default): " in benchmark(*nowhere, fails=True).stderr


@pytest.mark.slow
def test_train(tmp_path):
    write_text(tmp_path)
    fields = lm_fields(tmp_path, max_steps=4, eval_every=2, checkpoint_every=0)
    config = write_config(tmp_path / "tiny.yaml", fields)
    shown = benchmark(
        *("train", config, "--methods", "exact", "configured", "--logits", 64),
        *("--seeds", 0, 1, "--steps", 3, "--folder", tmp_path / "runs", "--threads", 1),
        *("--json", tmp_path / "train.json", "--plot", tmp_path / "train.png"),
    ).stdout
    stock, *trained = rows_of(tmp_path / "train.json")
    assert stock["label"] == "stock"
    assert [row["label"] for row in trained] == ["exact (ours)", "as configured"]
    for row in trained:
        assert len(row["test"]["nll"]) == len(row["seconds_per_step"]) == 2
        assert row["label"] in shown
    assert "±" in shown
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "runs" / "tiny" / "curves.png").exists()


@pytest.mark.slow
def test_scale(tmp_path):
    benchmark(
        *("scale", "--dim", 8, "--tokens", 32, "--vocab", 600, "--vocabs", 500, 1000),
        *("--token-counts", 16, "--logits", 20, "--budget", "1e-9", *ONCE),
        *("--json", tmp_path / "scale.json", "--plot", tmp_path / "scale.png"),
    )
    rows = rows_of(tmp_path / "scale.json")
    sizes = [(row["name"], row["positions"], row["vocab_size"]) for row in rows]
    assert sizes == [
        ("sce-tail", 32, 500),
        ("sce-tail", 32, 1000),
        ("exact", 32, 500),
        ("exact", 32, 1000),
        ("sce-tail", 16, 600),
        ("exact", 16, 600),
    ]
    assert rows[3]["left_out"].startswith("about")  # over the budget, by the row before
    for row in rows[:3] + rows[4:]:
        assert row["seconds"] > 0
        assert row["table_mib"] == row["vocab_size"] * 8 * 4 / 2**20
    assert rows[1]["time_ratio"] == rows[1]["seconds"] / rows[0]["seconds"]
    assert rows[0]["resolved"]["sparse_grad"]
    assert rows[0]["state_bytes_an_item"] >= 8  # counts
    assert rows[2]["state_bytes_an_item"] == 0
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


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
    peer = Peer("absent", lambda post, device: None, {}, "no-pkg", "no_pkg")
    monkeypatch.setitem(PEERS, "absent", peer)
    asked = [
        Method("absent", "absent", {"name": "absent"}),
        # Neither the plan nor the sizes know that there is no tail to correct for.
        Method("broken", "broken", {"name": "sce", "backend": "triton"}),
    ]
    absent, broken = measure_methods(problem, tmp_path, asked, QUICK)
    assert absent["notes"] == ["skipped; not installed: pip install no-pkg"]
    assert broken["notes"][0].startswith("failed; ")
    assert broken["quality"] == {}


def test_logits_that_do_not_fit_are_not_tried():
    stock = PEERS["stock"]
    assert stock.unavailable(10**6, "cpu") is None
    reason = stock.unavailable(10**15, "cpu")
    assert reason is not None
    assert "GiB for its logits" in reason
    assert replace(stock, logit_buffers={}).unavailable(10**15, "cpu") is None
    assert replace(stock, devices=("cuda",)).unavailable(1, "cpu") == "runs on cuda only"


@pytest.mark.slow
def test_stock_that_does_not_fit_is_measured_on_part_of_the_positions(tmp_path, monkeypatch):
    problem = random_problem(tmp_path, 64, 200, 8, "float32")
    fits = 20 * 200
    unavailable = Peer.unavailable
    monkeypatch.setattr(
        Peer,
        "unavailable",
        lambda peer, logits, device: "no" if logits > fits else unavailable(peer, logits, device),
    )
    asked = [methods()[name] for name in ("stock", "compile", "exact")]
    stock, other, exact = measure_methods(problem, tmp_path, asked, QUICK)
    assert stock["positions"] == 16
    assert stock["quality"] == {}
    assert "peak_mib" not in stock["trainable"]
    assert exact["trainable"]["speedup"] == pytest.approx(
        stock["trainable"]["seconds"] / exact["trainable"]["seconds"]
    )
    assert other["notes"] == ["skipped; no"]
    (note,) = stock["notes"]
    assert "measured on 16 positions" in note
    assert "multiplied by 4" in note


def chosen(*names):
    return choose(argparse.Namespace(methods=names, logits=128), 1000)


def test_names():
    assert [method.name for method in chosen("sce-tail", "stock")] == ["sce-tail", "stock"]
    (changed,) = chosen('sce-tail:{"prior": "gradient"}')
    assert changed.specification["tail_candidates"] == 128
    assert changed.specification["prior"] == "gradient"
    assert changed.label == "SCE (tail only), prior=gradient"
    for asked, message in {
        "tial": "'tial'; choose from stock",
        "sce:3": "a JSON object behind the colon",
        "sce:{": "a JSON object behind the colon",
        'sce:{"tails": 3}': "no option 'tails'",
        'stock:{"a": 1}': "options to stock, which has none",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            chosen(asked)
    labels = [method.label for method in methods().values()]
    assert len(set(labels)) == len(labels)
    assert len(chosen(*methods(LOGITS, 1000))) == len(labels)  # each is an objective, or a peer


def test_help_lists_the_methods():
    for name in ("loss", "estimators", "step", "train", "scale"):
        parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
        importlib.import_module(f"sce_lm.benchmarks.{name}").add_arguments(parser)
        shown = parser.format_help()
        for method in methods().values():
            line = rf"^  {method.name} +{re.escape(method.label)}$"
            assert re.search(line, shown, re.MULTILINE), (name, method)


def test_errors_are_one_line(tmp_path):
    result = benchmark("loss", "--methods", "nothing", fails=True)
    assert result.stderr.startswith("benchmark.py: --methods has 'nothing'")
    assert len(result.stderr.splitlines()) == 1


def test_a_state_that_has_seen_text_is_taken_over(tmp_path, monkeypatch):
    """Objectives start with the counts of the problem's past, as in the course of training."""
    random_problem(tmp_path, 32, 200, 8, "float32")
    write_reference(str(tmp_path), "cpu")
    seen = []
    build = side_by_side.build

    def spy(*arguments):
        loss, objective = build(*arguments)
        seen.append(objective)
        return loss, objective

    monkeypatch.setattr(side_by_side, "build", spy)
    measure_method(str(tmp_path), {"name": "sce"}, True, asdict(QUICK), 32)
    assert seen[-1].state.counts.sum() >= 50 * 32


def test_index(tmp_path):
    pytest.importorskip("faiss")
    benchmark(
        *("index", "--items", 2000, 3000, "--dim", 8, "--users", 32, "--batch_size", 16),
        *("--json", tmp_path / "index.json"),
    )
    found = Results.load(tmp_path / "index.json").comparisons
    assert [c.title.split(",")[0] for c in found] == ["Clusters", "Independent"]
    for comparison in found:
        assert [row["label"] for row in comparison.rows] == ["exact", "faiss"] * 2
        assert all(row["recall"] > 0.9 for row in comparison.rows)
