"""sce-lm benchmark papers, at tiny grids."""

import argparse
import importlib
import statistics

import numpy as np
import polars as pl
import pytest
import torch

from sce_lm import objectives
from sce_lm.benchmarks import papers
from sce_lm.benchmarks.papers import kernel
from sce_lm.benchmarks.papers.claims import agrees, judged
from sce_lm.training.models import build_model
from sce_lm.training.pairs import PairsTask
from sce_lm.training.task_sources import build_task


def options(*arguments):
    parser = argparse.ArgumentParser()
    papers.add_arguments(parser)
    return parser.parse_args([*map(str, arguments)])


def ask(*arguments):
    return papers.measure(options(*arguments))


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    pairs = {"user_id": np.repeat(np.arange(60), 20), "item_id": random.integers(0, 90, 1200)}
    pl.DataFrame(pairs).write_parquet(tmp_path / "movielens-100k-pairs.parquet")
    return tmp_path


def test_xir(data):
    comparison, claims = ask(
        *("xir", "--data", data, "--datasets", "movielens-100k", "--steps", 3, "--seeds", 0, 1),
        *("--fields", '{"per_device_batch_size": 64}', "--methods", "in-batch", "bir"),
        *("--folder", data / "runs"),
    )
    rows = {row["label"]: row for row in comparison.rows if "test" in row}
    assert set(rows) == {"in-batch, logQ", "BIR (published)", "popularity"}
    for label in ("in-batch, logQ", "BIR (published)"):
        test = rows[label]["test"]
        assert len(test["ndcg@10"]) == len(test["recall@50"]) == len(test["code_ndcg@10"]) == 2
        assert "code_ndcg@10" not in rows[label]  # theirs is of 20 epochs
    (claim,) = claims.rows
    assert "BIR (published) over in-batch, logQ" in claim["label"]
    pairs = zip(*(rows[n]["test"]["ndcg@10"] for n in ("BIR (published)", "in-batch, logQ")))
    mean = statistics.mean(a - b for a, b in pairs)
    assert claim["measured"].startswith(f"{mean:+.4f}, standard error")


def test_kernel(data):
    comparison, claims = ask(
        *("kernel", "--data", data, "--steps", 3, "--folder", data / "runs"),
        *("--fields", '{"per_device_batch_size": 64}'),
        *("--methods", "exact", "uniform-4", "uniform-64", "quadratic-4"),
    )
    rows = {(row["label"], row.get("draws")): row for row in comparison.rows if "test" in row}
    assert {("uniform", 4), ("uniform", 64), ("quadratic kernel", 4)} < set(rows)
    few, many = rows["uniform", 4], rows["uniform", 64]
    assert few["gradient_noise"] > 2 * many["gradient_noise"] > 0
    # After three steps all classes are alike, and the bias drowns in the noise.
    assert min(few["gradient_bias"], many["gradient_bias"]) >= 0
    assert 4 < rows["exact (ours)", None]["test"]["nll"][0] < 5  # 90 items
    assert [claim["label"].split(": ")[1].split(",")[0] for claim in claims.rows] == [
        *("4 draws", "uniform"),
    ]
    with pytest.raises(ValueError, match="put exact first"):
        ask("kernel", "--data", data, "--methods", "uniform-4", "--steps", 3)


def test_the_gradients_bias_is_that_of_a_known_estimator(data, monkeypatch):
    """Of a loss that is the exact one times 1.3, with noise of mean 0 on top."""
    config = kernel.protocol(kernel.DATA["movielens-100k"], options("kernel", "--data", data), 0.1)
    task = build_task(config)
    assert isinstance(task, PairsTask)
    model = build_model(config, task.tokenizer, **task.model_fields())
    exact = objectives.get("exact")

    def noisy(hidden, weight, labels):
        return (
            1.3 * exact(hidden, weight, labels) + 1e-3 * (hidden * torch.randn_like(hidden)).sum()
        )

    monkeypatch.setattr(kernel.objectives, "get", lambda name, **_: noisy if name == "x" else exact)
    found = kernel.gradient_error(model, task, {"name": "x"}, 0)
    assert found["gradient_bias"] == pytest.approx(0.3, abs=0.02)
    assert found["gradient_noise"] > 0.3


def test_xir_takes_no_other_data(data):
    with pytest.raises(ValueError, match="choose from movielens-100k, gowalla"):
        ask("xir", "--data", data, "--datasets", "netflix")
    with pytest.raises(ValueError, match=r"has no gowalla\.parquet; name its folder by --data"):
        ask("xir", "--data", data, "--datasets", "gowalla")


def test_whether_a_claim_held():
    assert judged("c", [0.010, 0.012, 0.011])["held"] == "yes"
    assert judged("c", [-0.010, -0.012, -0.011])["held"] == "no, the opposite"
    assert judged("c", [0.010, -0.012, 0.001])["held"] == "no"
    assert judged("c", [0.010])["held"] == "one seed"
    assert agrees("c", [0.10, 0.11, 0.12], 0.128)["held"] == "yes"
    assert agrees("c", [0.10, 0.11, 0.12], 0.132)["held"] == "no"
    assert agrees("c", [0.10], 0.10)["held"] == "one seed"


def test_every_paper_is_a_module():
    for name in papers.PAPERS:
        assert callable(importlib.import_module(f"sce_lm.benchmarks.papers.{name}").measure)
