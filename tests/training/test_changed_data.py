"""A run knows its data: written again in another order, format or place they are the same, and
when they have changed one sentence says so. Figures are those of what the run stored."""

import json
import random
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import polars as pl
import pytest
import torch
from accelerate import Accelerator
from support.training import figures, lm_fields
from transformers import AutoModelForCausalLM, AutoTokenizer

from sce_lm.benchmarks.real import real_problem
from sce_lm.training.metrics_file import read_metrics
from sce_lm.training.run_building import build_run
from sce_lm.training.run_evaluation import evaluate_on, evaluate_run
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def without_plots():
    """They take most of the time of such short runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sce_lm.training.loop.draw_report", lambda *_: None)
        patch.setattr("sce_lm.training.run_evaluation.draw_popularity", lambda *_: None)
        yield


def cycles():
    """80 users walk the same cycle of 30 items from different places."""
    draw = random.Random(0)
    rows = []
    for user in range(80):
        start, steps = draw.randrange(30), draw.randrange(5, 11)
        rows += [(f"u{user}", f"i{(start + k) % 30:02d}", user * 20 + k) for k in range(steps)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "time"], orient="row")


def items_fields(folder, **changes):
    fields = {
        "task": "items",
        "output_dir": str(folder / "run"),
        "data": str(folder / "log.csv"),
        "time_column": "time",
        "model_config": {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
        "objective": "exact",
        "sequence_length": 20,
        "per_device_batch_size": 16,
        "max_steps": 60,
        "learning_rate": 0.02,
        "warmup_steps": 2,
        "mask_seen": False,
        "eval_every": 30,
        "checkpoint_every": 30,
    }
    return {**fields, **changes}


def parameters(run):
    return AutoModelForCausalLM.from_pretrained(run / "model").state_dict()


def rewind(run, step):
    """Back to the checkpoint of a step, as if the run had been stopped after it."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "model")
    for later in (run / "checkpoints").glob("step-*"):
        if later.name > f"step-{step:08d}":
            shutil.rmtree(later)


def again(fields):
    """The parameters and the summary of a run that goes on."""
    run = build_run(TrainConfig(**fields))
    assert run.step > 0
    summary = run.train()
    return parameters(run.folder.path), summary


def assert_equal(left, right):
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)


@pytest.fixture(scope="module")
def trained_items(tmp_path_factory):
    """A folder with a log and a run on it."""
    folder = tmp_path_factory.mktemp("items")
    cycles().write_csv(folder / "log.csv")
    build_run(TrainConfig(**items_fields(folder))).train()
    return folder


@pytest.fixture
def items(trained_items, tmp_path):
    """Its copy, where data and run may be changed, and the copy's fields."""
    folder = tmp_path / "copy"
    shutil.copytree(trained_items, folder)
    config = json.loads((folder / "run" / "config.json").read_text())
    config |= {"data": str(folder / "log.csv"), "output_dir": str(folder / "run")}
    (folder / "run" / "config.json").write_text(json.dumps(config))
    return folder, items_fields(folder)


def evaluation(run, **options):
    """The rows and the warnings of an evaluation."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = evaluate_run(RunFolder(run), Accelerator(), **options)
    found = [str(w.message) for w in caught if str(run) in str(w.message)]
    return rows, found


def recommended(run, monkeypatch, capsys):
    command = ["recommend.py", str(run), "--history", "i03", "i04", "--k", "5"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "recommend.py"), run_name="__main__")
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_same_log_in_another_order_gives_the_same_figures(items, monkeypatch, capsys):
    """NDCG@10 went from 1.000 to .179 when items were numbered by the rows of the new file."""
    folder, _ = items
    run, summary = folder / "run", json.loads((folder / "run" / "summary.json").read_text())
    assert summary["test"]["ndcg@10"] > 0.9
    lists = recommended(run, monkeypatch, capsys)
    cycles().sample(fraction=1, shuffle=True, seed=1).write_csv(folder / "log.csv")
    rows, said = evaluation(run)
    assert rows["model"] == summary["test"]
    assert rows["popularity"]["ndcg@10"] < 0.5
    assert not said
    assert recommended(run, monkeypatch, capsys) == lists


CHANGES = {
    "a new item": (
        lambda log: (
            pl.concat([pl.DataFrame([log.row(0)], log.schema, orient="row"), log])
            .with_row_index("n")
            .with_columns(
                item_id=pl.when(pl.col("n") == 0).then(pl.lit("new")).otherwise("item_id")
            )
            .drop("n")
        ),
        "1 more item, 1 more event",
    ),
    "users gone": (
        lambda log: log.filter(pl.col("user_id") > "u3"),
        "24 fewer users, 182 fewer events",
    ),
    "other times": (
        lambda log: log.with_columns(pl.col("time") * 7 % 1601),
        "as many users, items and events as before, but others",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_log_is_named_and_the_stored_split_asked(items, name):
    folder, fields = items
    change, words = CHANGES[name]
    before = json.loads((folder / "run" / "summary.json").read_text())
    change(cycles()).sample(fraction=1, shuffle=True, seed=1).write_csv(folder / "log.csv")
    rows, said = evaluation(folder / "run")
    assert rows["model"] == before["test"]
    assert len(said) == 1
    assert re.search(f"have changed since it began .{words}", said[0])

    with pytest.raises(ValueError, match=f"began with other data .*{words}"):
        build_run(TrainConfig(**fields))  # a finished run is not trained on the new data either
    rewind(folder / "run", 30)
    with pytest.raises(ValueError, match=f"began with other data .*{words}") as refused:
        build_run(TrainConfig(**fields))
    assert "\n" not in str(refused.value)


def test_a_run_that_is_told_to_goes_on_with_the_split_that_it_stored(items):
    folder, fields = items
    before = json.loads((folder / "run" / "summary.json").read_text())
    cycles()[5:].write_csv(folder / "log.csv")
    weights = parameters(folder / "run")
    rewind(folder / "run", 30)
    told = {**fields, "resume_with_changed_data": True}
    with pytest.warns(UserWarning, match="goes on with the split that it stored"):
        resumed, summary = again(told)
    assert_equal(resumed, weights)
    assert summary["test"] == before["test"]
    notes = [r for r in read_metrics(folder / "run" / "metrics.jsonl") if "data" in r]
    assert [note["step"] for note in notes] == [30]


def test_a_log_that_was_moved_and_rewritten_is_the_same_to_a_resumed_run(items):
    folder, fields = items
    weights, before = parameters(folder / "run"), figures(folder / "run")
    rewind(folder / "run", 30)
    (folder / "log.csv").unlink()
    renamed = cycles().sample(fraction=1, shuffle=True, seed=1).rename({"time": "when"})
    renamed.write_parquet(folder / "moved.parquet")
    moved = {**fields, "data": str(folder / "moved.parquet"), "time_column": "when"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other data.*")
        resumed, _ = again(moved)
    assert_equal(resumed, weights)
    assert figures(folder / "run") == before


def test_a_log_that_is_gone_is_named_and_not_needed(items):
    folder, fields = items
    weights = parameters(folder / "run")
    (folder / "log.csv").unlink()
    rows, said = evaluation(folder / "run")
    assert rows["model"] == json.loads((folder / "run" / "summary.json").read_text())["test"]
    assert "cannot be read any more (There is no file" in said[0]
    rewind(folder / "run", 30)
    with pytest.warns(
        UserWarning, match="log.csv is not there any more; .* goes on with the split"
    ):
        resumed, _ = again(fields)
    assert_equal(resumed, weights)


def test_without_times_the_order_of_a_users_rows_is_content(tmp_path):
    log = cycles().drop("time")
    log.write_csv(tmp_path / "log.csv")
    fields = items_fields(tmp_path, time_column=None, max_steps=2, warmup_steps=0)
    build_run(TrainConfig(**fields)).train()
    log.sort("user_id", maintain_order=True).write_csv(tmp_path / "log.csv")
    assert evaluation(tmp_path / "run")[1] == []
    log.reverse().write_csv(tmp_path / "log.csv")
    assert "but others" in evaluation(tmp_path / "run")[1][0]


@pytest.mark.parametrize(
    "split",
    [
        {"split": "last_n", "split_n": 2, "min_item_events": 17},
        {"split": "temporal", "split_quantile": 0.8, "split_cold_items": "keep"},
        {"split": "temporal", "split_quantile": 0.7, "split_past": "all", "duplicates": "first"},
    ],
)
def test_every_split_is_read_as_it_was_written(tmp_path, split):
    cycles().write_csv(tmp_path / "log.csv")
    fields = items_fields(tmp_path, max_steps=2, warmup_steps=0, eval_k=[3], **split)
    run = build_run(TrainConfig(**fields))
    validation, test = run.evaluate("validation"), run.evaluate("test")
    baselines = run.task.baselines()
    stored = build_run(TrainConfig(**fields))
    assert stored.task.train.tokens.tolist() == run.task.train.tokens.tolist()
    assert stored.task.describe() == run.task.describe()
    assert stored.task.baselines() == baselines
    for on, expected in (("validation", validation), ("test", test)):
        asked = getattr(run.task.split, on).drop("user")
        assert getattr(stored.task.split, on).drop("user").equals(asked)
        assert stored.evaluate(on) == expected


def test_a_damaged_or_missing_split_is_refused(items):
    folder, fields = items
    run = folder / "run"
    (run / "stored_data" / "asked.parquet").write_bytes(b"PAR1 no more")
    for start in (
        lambda: evaluate_run(RunFolder(run), Accelerator()),
        lambda: build_run(TrainConfig(**fields)),
    ):
        with pytest.raises(
            ValueError, match=r"stored_data cannot be read .* bring it back"
        ) as refused:
            start()
        assert "\n" not in str(refused.value)
    shutil.rmtree(run / "stored_data")
    with pytest.raises(ValueError, match="of a version that did not store its split"):
        evaluate_run(RunFolder(run), Accelerator())
    with pytest.raises(ValueError, match="of a version that did not store its split"):
        build_run(TrainConfig(**fields))


def test_what_a_start_that_came_to_nothing_left_is_written_anew(tmp_path):
    cycles().write_csv(tmp_path / "log.csv")
    fields = items_fields(tmp_path, max_steps=2, warmup_steps=0)
    (tmp_path / "run" / "stored_data").mkdir(parents=True)
    (tmp_path / "run" / "stored_data" / "source.json").write_text("{}")
    run = build_run(TrainConfig(**fields))
    assert (
        run.folder.path / "stored_data" / "tokenizer" / "tokenizer.json"
    ).exists()  # before any step
    run.train()
    assert evaluate_run(run.folder, Accelerator())["model"]["users"] == 80


def test_a_folder_of_somebody_else_is_not_removed(tmp_path):
    cycles().write_csv(tmp_path / "log.csv")
    precious = tmp_path / "run" / "stored_data" / "log.csv"
    precious.parent.mkdir(parents=True)
    precious.write_text("user_id,item_id\n")
    with pytest.raises(
        ValueError, match=r"stored_data is in the way, .* choose another output_dir"
    ):
        build_run(TrainConfig(**items_fields(tmp_path)))
    assert precious.exists()
    assert not (tmp_path / "run" / "config.json").exists()


def test_another_log_is_asked_for_its_last_items(items):
    folder, _ = items
    log = pl.DataFrame(
        [
            *[("a", item, place) for place, item in enumerate(("i01", "alien", "i02", "i03"))],
            *[("b", item, place) for place, item in enumerate(("i07", "alien"))],
            ("c", "i05", 0),
            ("d", "alien", 0),
            ("d", "i06", 1),
        ],
        schema=["who", "what", "when"],
        orient="row",
    )
    log.write_csv(folder / "new.csv")
    columns = {"user_column": "who", "item_column": "what", "time_column": "when"}
    for source in (folder / "run", folder / "run" / "model"):
        found = evaluate_on(
            RunFolder(source), str(folder / "new.csv"), Accelerator(), k=[1, 30], **columns
        )
        report = found["model"]
        assert report["users"] == 2  # c has one event, d no history that is known
        assert report["unknown_events"] == 3
        assert report["users_without_history"] == 2
        assert report["unrankable_targets"] == 1
        assert report["hr@30"] == 0.5  # all items are listed, and one that is unknown is a miss
        assert "the last item of each user of" in report["protocol"]["split"]
        assert json.loads((source / "evaluation-of-new.csv.json").read_text()) == found
    assert not (folder / "run" / "evaluation.json").exists()


def test_lists_of_other_lengths_and_the_validation_are_evaluated(items):
    folder, _ = items
    rows, _ = evaluation(folder / "run", on="validation", k=[1, 3])
    run = build_run(TrainConfig(**items_fields(folder, eval_k=[10])))
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model").eval()
    assert {"ndcg@1", "ndcg@3"} < set(rows["model"])
    assert "ndcg@10" not in rows["model"]
    expected = run.task.evaluate(model, run.accelerator, "validation")
    ten, _ = evaluation(folder / "run", on="validation")
    assert ten["model"] == expected
    last = [r for r in read_metrics(folder / "run" / "metrics.jsonl") if "validation/mrr@10" in r]
    assert last[-1]["validation/mrr@10"] == expected["mrr@10"]
    written = json.loads((folder / "run" / "evaluation-validation.json").read_text())
    assert written == ten
    with pytest.raises(ValueError, match=r"k is \(31,\), but a list"):
        evaluate_run(RunFolder(folder / "run"), Accelerator(), k=[31])


# Text.


def documents(corpus):
    lines = (corpus / "text.jsonl").read_text().splitlines()
    return [json.loads(line)["text"][:4000] for line in lines]


def write_documents(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def trained_text(corpus):
    """A run on text, with its checkpoints, and the documents."""
    texts = documents(corpus)
    write_documents(corpus / "short.jsonl", texts)
    data = str(corpus / "short.jsonl")
    fields = lm_fields(corpus, data=data, output_dir=str(corpus / "first"), checkpoints_to_keep=9)
    build_run(TrainConfig(**fields)).train()
    return corpus, texts


@pytest.fixture
def text(trained_text, tmp_path):
    """A copy of the run whose data are a file of its own, the documents, and its fields."""
    corpus, texts = trained_text
    run, data = tmp_path / "run", tmp_path / "text.jsonl"
    shutil.copytree(corpus / "first", run)
    write_documents(data, texts)
    fields = lm_fields(corpus, output_dir=str(run), data=str(data), checkpoints_to_keep=9)
    (run / "config.json").write_text(json.dumps(TrainConfig(**fields).to_dict()))
    return run, data, texts, fields


@pytest.mark.parametrize("held_out", ["share", "file"])
def test_the_same_text_in_another_order_and_format_is_resumed_and_evaluated_alike(
    corpus, tmp_path, held_out
):
    texts = documents(corpus)
    texts = [*texts, texts[0], " \n"]  # one twice, one blank
    data, moved = tmp_path / "text.jsonl", tmp_path / "moved"
    write_documents(data, texts)
    fields = lm_fields(corpus, output_dir=str(tmp_path / "run"), data=str(data))
    if held_out == "file":
        write_documents(tmp_path / "held.jsonl", texts[:2])
        fields["held_out"] = str(tmp_path / "held.jsonl")
    before = build_run(TrainConfig(**fields)).train()
    weights, (expected, _) = parameters(tmp_path / "run"), evaluation(tmp_path / "run")
    data.unlink()
    moved.mkdir()
    for number, part in enumerate((texts[5:], texts[2:5], texts[:2])):
        pl.DataFrame({"text": part[::-1]}).write_parquet(moved / f"{number}.parquet")
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other data.*")
        resumed, summary = again({**fields, "data": str(moved)})
    assert_equal(resumed, weights)
    assert summary["test"] == before["test"]
    rows, said = evaluation(tmp_path / "run")
    assert rows == expected
    assert not said


def test_a_changed_text_is_named_refused_and_evaluated_on_what_was_held_out(text):
    run, data, texts, fields = text
    before, (expected, _) = json.loads((run / "summary.json").read_text()), evaluation(run)
    changed = [*texts[::-1][1:], "A new document. " * 40, "And another. " * 40]
    write_documents(data, changed)
    rows, said = evaluation(run)
    assert rows == expected
    assert rows["model"] == pytest.approx(before["test"])
    assert said == [
        f"The data of {run} have changed since it began (1 more document); the figures are on what "
        "the run stored."
    ]
    rewind(run, 4)
    with pytest.raises(ValueError, match=r"began with other data than there are now \(1 more doc"):
        build_run(TrainConfig(**fields))
    with pytest.warns(UserWarning, match="goes on with the text as it is now, without the doc"):
        _, summary = again({**fields, "resume_with_changed_data": True})
    assert summary["data"]["held_out_tokens"] == before["data"]["held_out_tokens"]
    assert summary["data"]["training_tokens"] != before["data"]["training_tokens"]
    told = build_run(TrainConfig(**{**fields, "resume_with_changed_data": True}))
    kept = set(told.task.documents["text"])
    assert kept < set(changed)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    held = tokenizer.decode(torch.cat([torch.from_numpy(b) for b in told.task.held_out]))
    assert len([t for t in texts if t in held or t[:500] in held]) == 1
    assert not any(t[:500] in held for t in kept)


def test_text_that_is_gone_is_named_and_stops_a_resumed_run(text):
    run, data, _, fields = text
    before = json.loads((run / "summary.json").read_text())
    data.unlink()
    rows, said = evaluation(run)
    assert rows["model"] == pytest.approx(before["test"])
    assert "cannot be read any more (There is no data file" in said[0]
    rewind(run, 4)
    with pytest.raises(ValueError, match="There is no data file"):
        build_run(TrainConfig(**fields))


def test_the_loss_of_a_run_is_measured_on_its_own_data_or_not_at_all(text, tmp_path):
    run, data, texts, _ = text
    (tmp_path / "problem").mkdir()
    write_documents(data, texts[::-1])
    real_problem(tmp_path / "problem", run, 64, "float32")
    write_documents(data, texts[:-1])
    with pytest.raises(ValueError, match="began with other data"):
        real_problem(tmp_path / "problem", run, 64, "float32")


def test_another_text_is_evaluated_whole(text, tmp_path):
    run, _, texts, _ = text
    write_documents(tmp_path / "other.jsonl", texts[:1])
    rows = [
        evaluate_on(RunFolder(folder), str(tmp_path / "other.jsonl"), Accelerator())["model"]["nll"]
        for folder in (run, run / "model")
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-6)
    with pytest.raises(ValueError, match="k is the length of a recommender's lists"):
        evaluate_run(RunFolder(run), Accelerator(), k=[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run/model"], "is a saved model, beside which there are no data"),
        (["run", "--data", "log.csv", "--split", "test"], "--split chooses from a run's own data"),
        (["run", "--time_column", "when"], "columns are of --data"),
        (["run", "--data", "log.csv", "--item_column", "thing"], "has no column 'thing'"),
        (["nothing"], "has no config.json; expected the folder of a finished run"),
        (["nothing", "--data", "log.csv"], "has no config.json; expected the folder of a finished"),
    ],
)
def test_the_evaluation_script_says_what_does_not_go_together(
    items, monkeypatch, arguments, message
):
    folder, _ = items
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(folder.rglob("evaluation*.json"))
