"""The items task on real call sequences: the same figures as the evaluation of recsys."""

import json
from collections import Counter
from types import SimpleNamespace

import polars as pl
import pytest
from accelerate import Accelerator
from support.training import SMALL_SCE
from transformers import AutoModelForCausalLM, AutoTokenizer

from sce_lm import recsys
from sce_lm.hf import apply_sce
from sce_lm.objectives import get
from sce_lm.training.items import ItemsTask
from sce_lm.training.metrics_file import read_metrics
from sce_lm.training.run_building import build_run
from sce_lm.training.run_evaluation import evaluate_run
from sce_lm.training.stored_data import read_split
from sce_lm.training.task_sources import build_task
from sce_lm.training.train_config import TrainConfig

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
    run = build_run(TrainConfig(**items_fields(tmp_path)))
    summary = run.train()

    records = read_metrics(run.folder.path / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0]
    assert [r["step"] for r in records if "validation/ndcg@10" in r] == [10, 20]
    figures = {"ndcg@10", "hr@10", "mrr@10", "coverage@10"}
    assert figures < set(summary["test"])
    assert summary["test"]["hr@10"] > 0
    assert (run.folder.path / "report.png").exists()

    # The saved model is a stock one, and recsys gives it the same figures.
    tokenizer = AutoTokenizer.from_pretrained(run.folder.path / "model")
    model = AutoModelForCausalLM.from_pretrained(run.folder.path / "model")
    assert model.config.vocab_size == len(tokenizer)
    test = run.task.split.test
    report = recsys.evaluate_items(
        apply_sce(model, get("exact")),
        test["history"].to_list(),
        test["target"].to_list(),
        items=recsys.item_tokens(tokenizer),
        max_length=20,
        split=run.task.split.protocol,
    )
    assert {**summary["test"], **report} == summary["test"]
    assert report["protocol"]["split"].startswith("leave-one-out; events of equal time")
    rows = evaluate_run(run.folder, Accelerator())
    assert rows["model"] == summary["test"]
    assert set(rows) == {"model", "popularity", "Markov chain", "item-kNN"}
    assert json.loads((run.folder.path / "evaluation.json").read_text()) == rows
    assert (run.folder.path / "popularity.png").read_bytes().startswith(b"\x89PNG")
    profile = rows["popularity"]["list_entries_by_popularity"]
    assert profile["recommended"][-1] == profile["trained"][-1] == 1
    assert profile["recommended"][-3] > profile["trained"][-3]  # the top tenth of the catalogue


def test_the_baseline_is_popularity_on_the_same_users(tmp_path):
    task = build_run(TrainConfig(**items_fields(tmp_path, eval_users=50))).task
    assert isinstance(task, ItemsTask)
    users = task._questions("test")
    assert len(users) == 50
    items = recsys.item_tokens(task.tokenizer)
    counts = Counter(task.split.before_test().explode().to_list())
    by_popularity = sorted(items, key=lambda token: (-counts[token], token))
    hits = 0
    for history, target in users.select("history", "target").rows():
        listed = [t for t in by_popularity[:200] if t not in history or t == target][:10]
        hits += target in listed
    assert task.baselines()["popularity"]["hr@10"] == pytest.approx(hits / 50)
    assert hits > 0


def test_baselines_have_not_seen_what_they_are_asked(tmp_path):
    """Each user's validation item is nobody else's."""
    rows = [
        (user, item)
        for user in range(6)
        for item in ("a", "b", f"validation of {user}", f"test of {user}")
    ]
    log = pl.DataFrame(
        rows, schema={"user": pl.String, "item": pl.String}, orient="row", strict=False
    )
    config = TrainConfig(**items_fields(tmp_path, eval_k=[3]))
    task = ItemsTask.of_log(log.lazy(), None, config)
    for on in ("validation", "test"):
        assert task.baselines(on)["Markov chain"]["ndcg@3"] < 0.5  # 1 if it had


def test_a_temporal_split_has_what_was_popular_lately_beside_it(tmp_path):
    """Before the cut "old" is popular; in its last seven days "new" is."""
    day = 86_400
    rows = [(f"a{n}", "old", 1.6e9 + n) for n in range(9) for _ in range(2)]
    rows += [(f"b{n}", "new", 1.6e9 + (40 + n) * day) for n in range(4)]
    rows += [("c", item, 1.6e9 + (50 + n) * day) for n, item in enumerate(("x", "new", "new"))]
    rows += [("d", "x", 1.6e9 + 10 * day)]
    log = pl.DataFrame(rows, schema=["user", "item", "time"], orient="row").lazy()
    fields = {"split": "temporal", "split_time": str(1.6e9 + 45 * day), "eval_k": [1]}
    config = TrainConfig(**items_fields(tmp_path, **fields, mask_seen=False))
    task = ItemsTask.of_log(log, None, config)
    folder = tmp_path / "stored"
    folder.mkdir()
    task.store(folder)
    task.split = read_split(folder)  # what is stored is enough
    hits = {name: row["hr@1"] for name, row in task.baselines().items()}
    assert hits.pop("Markov chain") == hits.pop("item-kNN") == 0
    assert hits == {
        "popularity": 0,
        "popularity, last 7 days": 1,
        "popularity, last 30 days": 1,
    }
    config = TrainConfig(**items_fields(tmp_path, **fields, popularity_days=[60]))
    assert ItemsTask.of_log(log, None, config).baselines()["popularity, last 60 days"]["hr@1"] == 0


def test_the_users_of_a_bounded_evaluation_are_the_same_each_time(tmp_path):
    run = build_run(TrainConfig(**items_fields(tmp_path, eval_users=40)))
    assert run.evaluate("validation") == run.evaluate("validation")
    assert run.evaluate("validation") != run.evaluate("test")


def test_a_log_of_ones_own_is_read_by_its_column_names(tmp_path):
    path = tmp_path / "log.csv"
    rows = [(f"u{u}", f"i{(u + t) % 9}", t) for t in range(5) for u in range(12)]
    pl.DataFrame(rows, schema=["who", "what", "when"], orient="row").write_csv(path)
    columns = {"user_column": "who", "item_column": "what", "time_column": "when"}
    changes = {"data": str(path), "data_options": {}, "max_steps": 2, "objective": "exact"}
    changes["eval_k"] = [5]
    run = build_run(
        TrainConfig(**items_fields(tmp_path, objective_options={}, **changes, **columns))
    )
    run.train()
    assert json.loads((run.folder.path / "summary.json").read_text())["vocabulary"] == 9 + 2

    wrong = items_fields(tmp_path / "other", **changes, **{**columns, "item_column": "thing"})
    with pytest.raises(ValueError, match="no column 'thing'"):
        build_run(TrainConfig(**{**wrong, "objective_options": {}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_options": {"package": ["json"]}}, "data_options sets 'package'.*packages"),
        ({"data": "log.csv"}, "data_options are given .packages, progress. but data is 'log.csv'"),
    ],
)
def test_options_that_the_data_do_not_have_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        build_run(TrainConfig(**items_fields(tmp_path, **changes)))


def log_of_cycles(folder, users=40, events=8):
    """Everyone walks the same cycle of nine items, from different places."""
    path = folder / "log.csv"
    rows = [(f"u{u}", f"i{(u + t) % 9}", 10 * u + t) for u in range(users) for t in range(events)]
    pl.DataFrame(rows, schema=["user_id", "item_id", "time"], orient="row").write_csv(path)
    return {"data": str(path), "data_options": {}, "time_column": "time"}


@pytest.mark.parametrize(
    ("changes", "protocol", "users"),
    [
        ({"split": "last_n", "split_n": 2}, "last-2; ", 80),
        ({"split": "temporal", "split_quantile": 0.8}, "temporal at the 0.8 quantile of time", 8),
        ({"split": "temporal", "split_time": "300"}, "temporal at 300; ", 10),
        ({"mask_seen": False}, "leave-one-out; ", 40),
    ],
)
def test_split_and_masking_are_those_of_the_configuration(tmp_path, changes, protocol, users):
    fields = items_fields(
        tmp_path, max_steps=1, **log_of_cycles(tmp_path), **changes, eval_k=[3, 5]
    )
    run = build_run(TrainConfig(**fields))
    test = run.train()["test"]
    assert test["protocol"]["split"].startswith(protocol)
    assert test["users"] == users
    seen = "kept" if "mask_seen" in changes else "masked, the target excepted"
    assert test["protocol"]["seen_items"] == seen
    assert {"ndcg@3", "ndcg@5"} < set(test)
    described = json.loads((run.folder.path / "data.json").read_text())
    assert described["users"] == 40
    assert described["items"] == 9
    assert described["test_questions"] == users
    assert described["length_median"] == 8
    card = (run.folder.path / "data.md").read_text()
    for name, value in (*described.items(), *changes.items(), ("data", fields["data"])):
        assert f"| {name} | {value} |" in card or name == "mask_seen"
    assert "40 users, 9 items, 320 events; digest of their content" in card
    assert "| packing |" not in card  # what is as it is by default


def test_a_card_of_the_data_that_people_wrote_in_stays(tmp_path):
    fields = items_fields(tmp_path, max_steps=1, **log_of_cycles(tmp_path), eval_k=[3])
    card = build_run(TrainConfig(**fields)).folder.path / "data.md"
    card.write_text("licence: ours\n")
    run = build_run(TrainConfig(**fields | {"max_steps": 2}))
    run.train()
    assert card.read_text() == "licence: ours\n"


def test_text_times_are_read_by_the_format_of_the_configuration(tmp_path):
    log = log_of_cycles(tmp_path)
    day = pl.date(2024, 1, 1) + pl.duration(days=pl.col("time"))
    frame = pl.read_csv(log["data"]).with_columns(time=day.dt.strftime("%d/%m/%Y"))
    frame.write_csv(log["data"])
    fields = items_fields(tmp_path, **log, split="temporal", split_time="2024-10-27", eval_k=[3])
    described = build_run(TrainConfig(**fields, time_format="%d/%m/%Y")).task.describe()
    assert described["test_questions"] == 10  # as of split_time 300 in days
    assert described["protocol"].startswith("temporal at 2024-10-27 00:00:00; ")
    with pytest.raises(ValueError, match=r"the first '01/01/2024'.*say how .* with time_format"):
        build_run(TrainConfig(**fields | {"output_dir": str(tmp_path / "other")}))


def test_filters_are_those_of_the_configuration(tmp_path):
    fields = items_fields(tmp_path, **log_of_cycles(tmp_path), min_item_events=36, eval_k=[5])
    described = build_run(TrainConfig(**fields)).task.describe()
    assert described["items"] == 5
    with pytest.raises(ValueError, match="No event is left of 320"):
        build_run(
            TrainConfig(**{**fields, "min_user_events": 9, "output_dir": str(tmp_path / "few")})
        )
    with pytest.raises(ValueError, match=r"k is \(10,\), but a list .* has 1 to 5 items"):
        build_run(TrainConfig(**{**fields, "eval_k": [10], "output_dir": str(tmp_path / "long")}))


def test_packed_and_padded_rows_train_alike(tmp_path):
    losses = []
    for packing in (True, False):
        changes = {"packing": packing, "output_dir": str(tmp_path / str(packing))}
        exact = {"objective": "exact", "objective_options": {}}
        run = build_run(
            TrainConfig(**items_fields(tmp_path, **exact, max_steps=4, log_every=1, **changes))
        )
        run.train()
        losses.append([r["loss"] for r in read_metrics(run.metrics.path) if "loss" in r])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_model_that_cannot_pack_is_refused(tmp_path):
    mamba = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    fields = items_fields(tmp_path, model_config=mamba)
    with pytest.raises(ValueError, match=r"mamba model .* set packing to false"):
        build_run(TrainConfig(**fields))
    assert (
        build_run(TrainConfig(**{**fields, "packing": False}))
        .task.batch([0, 1])["attention_mask"]
        .any()
    )


def test_the_best_model_is_kept_and_a_run_without_improvement_stops(tmp_path):
    """A learning rate that is far too high after the first steps makes later models worse."""
    fields = items_fields(
        tmp_path,
        **log_of_cycles(tmp_path),
        eval_k=[5],
        keep_best=True,
        patience=3,
        max_steps=200,
        eval_every=5,
        learning_rate=0.05,
        warmup_steps=60,
    )
    run = build_run(TrainConfig(**fields))
    summary = run.train()
    figure, records = "validation/ndcg@5", read_metrics(run.metrics.path)
    validation = {r["step"]: r[figure] for r in records if figure in r}
    best = max(validation, key=validation.__getitem__)  # the first of equal ones
    assert summary["model_of_step"] == best
    assert summary["steps"] == best + 3 * 5 < 200
    assert summary["validation"]["ndcg@5"] == validation[best]
    kept = [path.parent.name for path in (run.folder.path / "best").rglob("model.safetensors")]
    assert kept == [f"step-{best:08d}"]  # beside the checkpoints, from which the run could go on

    model = AutoModelForCausalLM.from_pretrained(run.folder.path / "model")
    assert run.task.evaluate(model, run.accelerator, "validation")["ndcg@5"] == validation[best]
    assert evaluate_run(run.folder, run.accelerator)["model"] == summary["test"]


def test_a_run_that_does_not_fit_warns_before_it_starts(tmp_path, monkeypatch):
    free = SimpleNamespace(available=10 * 2**20)
    monkeypatch.setattr("sce_lm.training.memory_prediction.psutil.virtual_memory", lambda: free)
    with pytest.warns(
        UserWarning, match=r"will probably not fit. Memory: about \d+ MiB of \d+ free"
    ):
        build_run(TrainConfig(**items_fields(tmp_path)))


def test_the_tokenizer_carries_how_often_items_occur_in_training(tmp_path):
    task = build_task(TrainConfig(**items_fields(tmp_path)))
    assert isinstance(task, ItemsTask)
    counted = task.split.train["items"].explode().value_counts().sort("items")
    counts = recsys.item_counts(task.tokenizer)
    assert counts.sum() == counted["count"].sum()
    assert counts[counts > 0].tolist() == counted["count"].to_list()
