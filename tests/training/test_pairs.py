"""A two-tower model through the training script."""

import numpy as np
import polars as pl
import pytest

from sce_lm.training.pairs import PairsTask
from sce_lm.training.recommenders import load_recommender
from sce_lm.training.run_building import build_run
from sce_lm.training.run_evaluation import evaluate_run
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.task_sources import build_task
from sce_lm.training.train_config import FieldError, TrainConfig

MODEL = {"model_type": "two_tower", "hidden_size": 8}


@pytest.fixture
def fields(tmp_path):
    """Two groups of users, each with its own half of 40 items; some pairs stand there twice."""
    random = np.random.default_rng(0)
    pairs = [
        (user, int(item) + 20 * (user % 2))
        for user in range(40)
        for item in random.choice(20, 10, replace=False)
    ]
    users, items = zip(*pairs, *pairs[:30])
    pl.DataFrame({"user_id": users, "item_id": items}).write_parquet(tmp_path / "log.parquet")
    return {
        "task": "items",
        "split": "random",
        "data": str(tmp_path / "log.parquet"),
        "output_dir": str(tmp_path / "run"),
        "model_config": MODEL,
        "objective": "exact",
        "per_device_batch_size": 32,
        "max_steps": 100,
        "optimizer": "adam",
        "learning_rate": 0.03,
        "warmup_steps": 0,
        "weight_decay": 1e-5,
        "eval_every": 0,
        "eval_k": [10, 20],
        "checkpoint_every": 0,
    }


def test_it_learns_and_is_evaluated_as_it_was(fields):
    run = build_run(TrainConfig(**fields))
    task = run.task
    assert isinstance(task, PairsTask)
    assert task.num_rows == 320
    assert run.learner.plain_model.config.num_users == 40
    batch = task.batch(range(320))
    assert (batch["input_ids"][:, 0] == batch["input_ids"][:, 1]).all()
    trained = set(zip(batch["input_ids"][:, 0].tolist(), batch["labels"][:, 1].tolist()))
    tested = {(u, t) for u, row in enumerate(task.split["test"]) for t in row}
    assert len(trained) == 320
    assert len(tested) == 80
    assert not trained & tested
    summary = run.train()
    # Ten of a user's group are left when the eight of training are masked, two of them right.
    assert summary["test"]["recall@20"] > 0.95
    (popularity,) = task.baselines().values()
    assert summary["test"]["ndcg@10"] > popularity["ndcg@10"]
    rows = evaluate_run(RunFolder(fields["output_dir"]), run.accelerator)
    assert rows["model"] == pytest.approx(summary["test"])
    with pytest.raises(ValueError, match="knows users by number and reads no histories"):
        load_recommender(RunFolder(fields["output_dir"]).path)


@pytest.mark.parametrize("objective", ["bir", "xir", "in_batch", "sampled_softmax", "sce"])
def test_every_objective_trains_it(fields, objective):
    assert build_run(TrainConfig(**{**fields, "objective": objective, "max_steps": 2})).train()


def test_the_split_follows_the_seed(fields):
    first, second = (build_task(TrainConfig(**fields, seed=seed)) for seed in (0, 1))
    assert isinstance(first, PairsTask)
    assert isinstance(second, PairsTask)
    assert not first.split.equals(second.split)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "leave_one_out"}, "for two_tower alone, and it for them"),
        ({"model_config": {"model_type": "sasrec"}}, "for two_tower alone, and it for them"),
        ({"keep_best": True}, "would choose by the test"),
        ({"patience": 2, "eval_every": 5}, "would choose by the test"),
    ],
)
def test_what_does_not_go_together(fields, changes, message):
    with pytest.raises(FieldError, match=message):
        TrainConfig(**{**fields, **changes})
