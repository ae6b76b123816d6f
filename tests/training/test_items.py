"""The items task on real call sequences: the same figures as the evaluation of recsys."""

import json
from collections import Counter

import polars as pl
import pytest
import torch
from accelerate import Accelerator
from support.training import SMALL_SCE
from transformers import AutoModelForCausalLM, AutoTokenizer

from sce_lm import recsys
from sce_lm.hf import apply_sce
from sce_lm.objectives import get
from sce_lm.training.config import TrainConfig
from sce_lm.training.evaluation import evaluate_run
from sce_lm.training.items import ItemsTask
from sce_lm.training.loop import Run
from sce_lm.training.metrics import read_metrics

PACKAGES = ["asyncio", "email", "json", "unittest"]


def items_fields(folder, **changes):
    fields = {
        "task": "items",
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "data_options": {"packages": PACKAGES, "progress": False},
        "model_config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 20,
        },
        "objective": "sce",
        "objective_options": SMALL_SCE,
        "sequence_length": 20,
        "per_device_batch_size": 16,
        "max_steps": 20,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "eval_every": 10,
        "log_every": 5,
        "checkpoint_every": 10,
    }
    return {**fields, **changes}


def test_a_recommender_is_trained_evaluated_and_saved(tmp_path):
    run = Run(TrainConfig(**items_fields(tmp_path)))
    summary = run.train()

    records = read_metrics(run.folder / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0]
    assert [r["step"] for r in records if "ndcg@10" in r] == [10, 20]
    assert set(summary["test"]) == {"ndcg@10", "hr@10", "mrr@10", "coverage@10"}
    assert summary["test"]["hr@10"] > 0
    assert (run.folder / "curves.png").exists()

    # The saved model is a stock one, and recsys gives it the same figures.
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert model.config.vocab_size == len(tokenizer)
    test = run.task.split.test
    report = recsys.evaluate_items(
        apply_sce(model, get("exact")),
        test["history"].to_list(),
        test["target"].to_list(),
        items=recsys.item_tokens(tokenizer),
        max_length=20,
    )
    assert {name: report[name] for name in summary["test"]} == pytest.approx(summary["test"])
    assert evaluate_run(run.folder, Accelerator()) == pytest.approx(summary["test"])


def test_the_baseline_is_popularity_on_the_same_users(tmp_path):
    task = Run(TrainConfig(**items_fields(tmp_path, eval_users=50))).task
    assert isinstance(task, ItemsTask)
    users = task._evaluated_users(final=True)
    assert len(users) == 50
    items = recsys.item_tokens(task.tokenizer)
    counts = Counter(task.split.test["history"].explode().to_list())
    by_popularity = sorted(items, key=lambda token: (-counts[token], token))
    hits = 0
    for history, target in users.select("history", "target").rows():
        listed = [t for t in by_popularity[:200] if t not in history or t == target][:10]
        hits += target in listed
    assert task.baselines()["popularity"]["hr@10"] == pytest.approx(hits / 50)
    assert hits > 0


def test_a_batch_is_padded_and_its_padding_has_no_label(tmp_path):
    task = Run(TrainConfig(**items_fields(tmp_path))).task
    batch = task.batch([0, 1, 2, 3])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert batch["labels"][~padding].equal(batch["input_ids"][~padding])
    assert batch["input_ids"].dtype == torch.int64


def test_the_users_of_a_bounded_evaluation_are_the_same_each_time(tmp_path):
    run = Run(TrainConfig(**items_fields(tmp_path, eval_users=40)))
    assert run.evaluate(final=False) == run.evaluate(final=False)
    assert run.evaluate(final=False) != run.evaluate(final=True)


def test_a_log_of_ones_own_is_read_by_its_column_names(tmp_path):
    path = tmp_path / "log.csv"
    rows = [(f"u{u}", f"i{(u + t) % 9}", t) for t in range(5) for u in range(12)]
    pl.DataFrame(rows, schema=["who", "what", "when"], orient="row").write_csv(path)
    columns = {"user_column": "who", "item_column": "what", "time_column": "when"}
    changes = {"data": str(path), "data_options": {}, "max_steps": 2, "objective": "exact"}
    run = Run(TrainConfig(**items_fields(tmp_path, objective_options={}, **changes, **columns)))
    run.train()
    assert json.loads((run.folder / "summary.json").read_text())["vocabulary"] == 9 + 2

    wrong = items_fields(tmp_path / "other", **changes, **{**columns, "item_column": "thing"})
    with pytest.raises(ValueError, match="no column 'thing'"):
        Run(TrainConfig(**{**wrong, "objective_options": {}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_options": {"package": ["json"]}}, "data_options sets 'package'.*packages"),
        ({"data": "log.csv"}, "data_options are given .packages, progress. but data is 'log.csv'"),
    ],
)
def test_options_that_the_data_do_not_have_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Run(TrainConfig(**items_fields(tmp_path, **changes)))
