"""What may change when a run is resumed, and what is said and kept of it."""

import json
import math
import shutil

import pytest
from support.training import figures, lm_fields
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sce_lm.training.metrics_file import MetricsLog, read_metrics
from sce_lm.training.resuming import changed_fields, comparable
from sce_lm.training.run_building import build_run
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.train_config import TrainConfig


@pytest.fixture(scope="module")
def four_steps(corpus, tmp_path_factory):
    """The folder of a finished run of four steps, evaluated at 2 and 4, with keep_best."""
    folder = tmp_path_factory.mktemp("resuming") / "run"
    fields = lm_fields(corpus, output_dir=str(folder), max_steps=4, eval_every=2, keep_best=True)
    build_run(TrainConfig(**fields)).train()
    return folder


@pytest.fixture
def copied(four_steps, tmp_path):
    """A copy, and its fields."""
    folder = tmp_path / "run"
    shutil.copytree(four_steps, folder)
    return folder, {**RunFolder(folder).fields(), "output_dir": str(folder)}


def test_options_of_an_earlier_version_are_read_with_one_warning(tmp_path):
    options = {"tail_candidates": 32, "prior": {"labels": 3, "cache": 1}, "tail_strata": 4}
    stored = {"objective": "sce", "objective_options": options, "max_steps": 4}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.warns(UserWarning, match="objective 'sce' was saved by another") as warned:
        fields = RunFolder(tmp_path).fields()
    assert len(warned) == 1
    assert "tail_strata 4" in str(warned[0].message)
    assert fields["objective_options"] == {"tail_candidates": 32, "prior": {"labels": 3}}
    assert TrainConfig(**fields, model="any").objective_options["tail_candidates"] == 32


def test_a_finished_run_with_more_steps_goes_on(copied, capsys):
    """Its schedule is that of the longer run, from the step on."""
    folder, fields = copied
    before = read_metrics(folder / "metrics.jsonl")
    run = build_run(TrainConfig(**{**fields, "max_steps": 8}))
    assert run.step == 4
    said = capsys.readouterr().out
    assert "max_steps was 4 and is 8 from step 4 on: the cosine schedule is that of 8 steps" in said
    assert "learning rate there is 0.00075 where it was 0." in said  # the middle, after warming up
    summary = run.train()
    assert summary["steps"] == 8
    assert json.loads((folder / "summary.json").read_text()) == summary
    records = read_metrics(folder / "metrics.jsonl")
    assert records[: len(before)] == before
    assert records[len(before)] == {"step": 4, "changed": {"max_steps": [4, 8]}}
    rates = {r["step"]: r["learning_rate"] for r in records if "loss" in r}
    assert rates[5] == pytest.approx(0.75e-3)  # of step 4 of 8, two of them warming up
    assert RunFolder(folder).fields()["max_steps"] == 8
    assert build_run(TrainConfig(**{**fields, "max_steps": 8})).train() == summary


def test_the_schedule_is_that_of_a_run_that_was_as_long_from_the_start(corpus, tmp_path):
    fields = lm_fields(corpus, checkpoint_every=3, scheduler="linear")
    short, whole = tmp_path / "short", tmp_path / "whole"
    build_run(TrainConfig(**{**fields, "output_dir": str(short), "max_steps": 3})).train()
    for folder in (short, whole):
        build_run(TrainConfig(**{**fields, "output_dir": str(folder), "max_steps": 6})).train()
    rates = [
        {r["step"]: r["learning_rate"] for r in figures(folder) if "loss" in r and r["step"] > 3}
        for folder in (short, whole)
    ]
    assert rates[0] == rates[1]


def test_a_killed_run_goes_on_though_an_older_summary_is_there(copied):
    folder, fields = copied
    longer = TrainConfig(**{**fields, "max_steps": 8})
    build_run(longer)  # and no further
    run = build_run(longer)
    assert not run.is_finished
    assert run.step == 4
    changes = [r for r in read_metrics(folder / "metrics.jsonl") if "changed" in r]
    assert changes == [{"step": 4, "changed": {"max_steps": [4, 8]}}]


def test_a_run_without_checkpoints_does_not_go_on(copied):
    folder, fields = copied
    shutil.rmtree(folder / "checkpoints")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="ended after 4 steps and kept no checkpoint"):
        build_run(TrainConfig(**{**fields, "max_steps": 8}))
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert build_run(TrainConfig(**fields)).train()["steps"] == 4


def test_settings_of_reports_may_change_and_are_recorded(copied, capsys):
    folder, fields = copied
    changes = {"max_steps": 6, "eval_every": 1, "log_every": 2, "patience": 9, "probe_every": 3}
    changes |= {"trackers": ["tensorboard"], "process_timeout": 99.0, "checkpoints_to_keep": 1}
    build_run(TrainConfig(**{**fields, **changes})).train()
    said = capsys.readouterr().out
    for name in ("eval_every was 2 and is 1", "log_every was 1 and is 2", "patience was 0 and is"):
        assert name in said
    assert "process_timeout" not in said
    records = read_metrics(folder / "metrics.jsonl")
    (change,) = [record["changed"] for record in records if "changed" in record]
    assert set(change) == set(changes) - {"process_timeout", "checkpoints_to_keep"}
    assert [r["step"] for r in records if "validation/nll" in r] == [2, 4, 5, 6]


def test_another_way_to_evaluate_starts_a_new_search_for_the_best(copied, capsys):
    """eval_batches 4 -> 2: the figures cannot be compared, and the run stands at its end."""
    folder, fields = copied
    (folder / "summary.json").unlink()  # it was killed while it finished
    run = build_run(TrainConfig(**{**fields, "eval_batches": 2}))
    assert "eval_batches was 4 and is 2 from step 4 on; figures before and" in (
        capsys.readouterr().out
    )
    assert run.best.step == 0
    summary = run.train()
    assert (summary["steps"], summary["model_of_step"]) == (4, 4)
    evaluated = [r for r in read_metrics(folder / "metrics.jsonl") if "validation/nll" in r]
    assert [r["step"] for r in evaluated] == [2, 4, 4]
    assert summary["validation"]["nll"] == evaluated[-1]["validation/nll"]
    assert evaluated[-1]["validation/nll"] != evaluated[-2]["validation/nll"]


def test_the_best_of_a_finished_run_is_still_there_when_it_goes_on(copied):
    folder, fields = copied
    weights = [path.parent.name for path in (folder / "best").rglob("model.safetensors")]
    assert weights == ["step-00000004"]
    run = build_run(TrainConfig(**{**fields, "max_steps": 6}))
    assert run.best.step == 4
    run.best.load(run.learner.plain_model)


def test_a_best_that_was_not_kept_is_looked_for_anew(copied, capsys):
    folder, fields = copied
    shutil.rmtree(folder / "best")
    run = build_run(TrainConfig(**{**fields, "max_steps": 6}))
    assert "weights of the best evaluation, of step 4, were not kept" in capsys.readouterr().out
    assert run.best.step == 0
    assert run.train()["model_of_step"] == 6


def test_fewer_steps_end_a_run_where_it_stands(copied, capsys):
    folder, fields = copied
    (folder / "summary.json").unlink()
    summary = build_run(TrainConfig(**{**fields, "max_steps": 3})).train()
    assert "the run is past its end, so it is not trained further" in capsys.readouterr().out
    assert summary["steps"] == 4


def test_what_defines_a_run_may_not_change(copied):
    _, fields = copied
    with pytest.raises(ValueError, match=r"configuration \(seed 0 -> 1\); go on with the same"):
        build_run(TrainConfig(**{**fields, "max_steps": 8, "seed": 1}))


def test_fields_of_other_versions_do_not_stop_a_run(copied):
    """A field that is new and at its default; one that is gone; one that is new and set."""
    folder, fields = copied
    stored = json.loads((folder / "config.json").read_text())
    del stored["lora_rank"], stored["mask_seen"]
    (folder / "config.json").write_text(json.dumps({**stored, "momentum": 0.5}))
    with pytest.warns(UserWarning, match="whose configuration had momentum 0.5; this version"):
        found = RunFolder(folder).fields()
    assert changed_fields(found, TrainConfig(**fields), folder) == {}
    assert changed_fields(found, TrainConfig(**{**fields, "mask_seen": False}), folder) == {
        "mask_seen": [True, False]
    }
    changed = TrainConfig(**{**fields, "model": "m", "model_config": {}, "lora_rank": 2})
    with pytest.raises(ValueError, match="lora_rank 0 -> 2"):
        changed_fields(found, changed, folder)


def test_a_change_goes_back_with_the_run(tmp_path):
    """From a checkpoint before it, the steps after that are made with the new setting too."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for record in (
        {"step": 2, "nll": 3.0},
        {"step": 4, "nll": 2.0},
        {"step": 4, "changed": {"eval_users": [0, 9]}},
        {"step": 6, "nll": 2.5},
        {"step": 6, "changed": {"log_every": [1, 2]}},
    ):
        log.append(record)
    assert [r["step"] for r in comparable(read_metrics(log.path))] == [6, 6]
    log.keep_until(3)
    assert read_metrics(log.path) == [
        {"step": 2, "nll": 3.0},
        {"step": 3, "changed": {"eval_users": [0, 9]}},
        {"step": 3, "changed": {"log_every": [1, 2]}},
    ]


def test_tensorboard_shows_a_step_once(corpus, tmp_path):
    """The run goes back to step 4 after six were logged."""
    folder = tmp_path / "run"
    fields = lm_fields(corpus, output_dir=str(folder), trackers=["tensorboard"])
    build_run(TrainConfig(**fields)).train()
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    resumed = build_run(TrainConfig(**fields))
    assert resumed.step == 4
    resumed.train()
    files = list((folder / "sce_lm").glob("events.out.tfevents*"))
    assert len(files) == 2
    events = EventAccumulator(str(folder / "sce_lm"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("validation/nll")] == [5, 6]


def test_epochs_give_the_steps_and_a_run_that_goes_on_keeps_them(corpus, tmp_path):
    fields = lm_fields(
        corpus,
        output_dir=str(tmp_path),
        num_epochs=0.5,
        gradient_accumulation_steps=2,
        checkpoint_every=0,
    )
    run = build_run(TrainConfig(**fields))
    rows = run.task.num_rows * 0.5
    assert run.config.max_steps == math.ceil(rows / (2 * run.config.per_device_batch_size))
    assert run.config.max_steps != TrainConfig.max_steps
    run.folder.begin(run.config, run.learner.objective, run.task.describe())
    run.lock.release()
    again = build_run(TrainConfig(**fields))
    assert again.config.max_steps == run.config.max_steps
    again.lock.release()
    more = build_run(TrainConfig(**{**fields, "num_epochs": 1.0}))
    assert more.config.max_steps == math.ceil(2 * rows / (2 * run.config.per_device_batch_size))
    more.lock.release()
    with pytest.raises(ValueError, match="num_epochs is -1"):
        TrainConfig(**{**fields, "num_epochs": -1})
