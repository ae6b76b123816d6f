"""The demo: what its plot shows, what it says of its recommender, and that it runs."""

import json
import re
import subprocess
import sys

import pytest
from support.launch import ONE_THREAD

from sce_lm.benchmarks import demo, report
from sce_lm.benchmarks.results import Results, changed_options
from sce_lm.commands.demo import verdict

LIKELIHOOD, LISTS = demo.PLOTS
GOOD = {"label": "good", "test": {"nll": [6.5]}, "curve": [[1.0, 9.0], [2.0, 7.0], [3.0, 6.5]]}
SLOW = {"label": "slow", "test": {"nll": [6.6]}, "curve": [[2.0, 9.5], [4.0, 6.6]]}
FAR = {"label": "far", "test": {"nll": [40.0]}, "curve": [[1.0, 60.0], [2.0, 40.0]]}


def test_what_never_gets_near_does_not_stretch_the_axis(tmp_path):
    lines = LIKELIHOOD.lines([GOOD, SLOW, FAR])
    assert list(lines) == ["good, test 6.500", "slow, test 6.600", "far, test 40.000"]
    low, high = LIKELIHOOD.limits(lines)
    assert 6.2 < low < 6.5
    assert 9.0 < high < 9.3
    assert LISTS.lines([GOOD]) == {}
    report.draw(tmp_path / "a.png", demo.PLOTS, [("a", [GOOD, SLOW, FAR])])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_method_without_training_is_a_line_across():
    chain = {"label": "chain", "test": {"ndcg@10": [0.3]}, "validation": 0.35}
    trained = {"label": "t", "test": {"ndcg@10": [0.2]}, "curve": [[1.0, 0.1], [2.0, 0.2]]}
    lines = LISTS.lines([trained, chain])
    assert lines["chain, test 0.3000"] == [(0.0, 0.35)]
    low, high = LISTS.limits(lines)
    assert low < 0.1 < 0.35 < high


@pytest.mark.parametrize(("ndcg", "said"), [(0.2, "is not better than"), (0.4, "is better than")])
def test_it_says_whether_training_pays(ndcg, said):
    rows = [
        {"label": "exact", "test": {"ndcg@10": [0.1]}, "curve": [[1.0, 0.1]]},
        {"label": "ours", "test": {"ndcg@10": [ndcg]}, "curve": [[1.0, 0.1]]},
        {"label": "chain", "test": {"ndcg@10": [0.3]}},
    ]
    assert f"(ours, NDCG@10 {ndcg:.4f}) {said}" in verdict(rows)


@pytest.mark.slow
def test_the_demo_says_what_it_does_in_under_80_lines(tmp_path):
    """Off a terminal, with a few steps on the standard library."""
    short = """
from sce_lm.commands import calm_bars, run
calm_bars()
from sce_lm.commands import demo
few = {"max_steps": 4, "warmup_steps": 1, "eval_every": 2, "cache_dir": "cache"}
few["model_config"] = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512}
data = {"packages": ["stdlib"]}
text = {"max_bytes": 300_000, "vocab_size": 2048, **data}
demo.LANGUAGE_MODEL = {**demo.LANGUAGE_MODEL, **few, "data_options": text}
demo.RECOMMENDER = {**demo.RECOMMENDER, **few, "data_options": data}
run("demo", "sce-lm demo", [])
"""
    done = subprocess.run(
        [sys.executable, "-c", short],
        cwd=tmp_path,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(re.split(r"[\r\n]+", done.stdout + done.stderr)) < 70
    assert "|" not in done.stderr.split("100%")[0]  # no bar before there is something to tell
    assert len(re.findall(r"^  SCE \(default\): ", done.stdout, re.MULTILINE)) == 2
    assert done.stdout.count("Markov chain   -> ") == done.stdout.count("SCE (default)  -> ") == 3
    found = Results.load(tmp_path / "runs" / "demo" / "results.json")
    assert [comparison.rows[0]["label"] for comparison in found.comparisons] == ["exact (ours)"] * 2
    for comparison in found.comparisons:
        for row in comparison.rows:
            assert changed_options(row, comparison.sizes) == []
    assert json.dumps(found.to_dict())
    assert (tmp_path / "runs" / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
