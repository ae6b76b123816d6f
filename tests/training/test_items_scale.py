"""Recommenders on real catalogues and on large ones, from the log to lists in a file."""

import pytest

pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from support.data import shared_data
from support.launch import ONE_THREAD
from transformers import AutoModelForCausalLM, AutoTokenizer

from sce_lm import recsys
from sce_lm.training.command_line import parse_config
from sce_lm.training.measure import start_peak
from sce_lm.training.run_building import build_run

ROOT = Path(__file__).resolve().parents[2]
SASREC = {"model_type": "sasrec", "max_position_embeddings": 50}
UNION = ("amazon-beauty-54k", "amazon-sports-5core", "food", "amazon-book-39k", "yelp-2019-train")

SCHEMA = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64())])

pytestmark = pytest.mark.slow


def configured(folder, log, **fields):
    """The configuration of a short run on a log with columns user_id and item_id."""
    fields = {
        "task": "items",
        "data": str(log),
        "output_dir": str(folder / "run"),
        "model_config": SASREC,
        "sequence_length": 50,
        "max_steps": 10,
        "checkpoint_every": 0,
        **fields,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(fields))
    return parse_config([str(path)])


def printed_by(*arguments):
    """What Python prints, run with these arguments in the repository."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=True,
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.data
def test_a_union_of_219_000_items_in_under_3_gigabytes(tmp_path):
    """Training with corrected SCE and evaluation, beyond the data and the optimiser's state."""
    parts = [
        pl.scan_parquet(shared_data(f"{name}.parquet")).select(
            pl.concat_str(pl.lit(f"{name}:"), column).alias(column)
            for column in ("user_id", "item_id")
        )
        for name in UNION
    ]
    pl.concat(parts).collect().write_parquet(tmp_path / "union.parquet")
    config = configured(
        tmp_path, tmp_path / "union.parquet", per_device_batch_size=512, eval_users=5000
    )
    run = build_run(config)
    assert len(run.task.tokenizer) > 219_000
    read_peak = start_peak("cpu")
    summary = run.train()
    state = 8 * run.learner.plain_model.num_parameters()
    assert read_peak() - state < 3 * 2**30
    assert summary["test"]["users"] == 5000


@pytest.mark.data
def test_lists_for_ten_thousand_histories_are_those_of_stock_logits(tmp_path):
    log = shared_data("yelp-2019-train.parquet")
    events = recsys.read_interactions(log, time="timestamp")
    tokenizer = recsys.build_item_tokenizer(recsys.catalogue(events))
    assert len(recsys.item_tokens(tokenizer)) == 66_576
    torch.manual_seed(0)
    config = recsys.SASRecConfig(
        vocab_size=len(tokenizer), max_position_embeddings=50, initializer_range=0.5
    )
    recsys.SASRecForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    histories = recsys.read_histories(log, time="timestamp").head(10_000)
    histories.rename({"user": "user_id", "history": "item_id"}).write_parquet(
        tmp_path / "in.parquet"
    )

    command = ["scripts/recommend.py", tmp_path / "model", "--input", tmp_path / "in.parquet"]
    command += ["--output", tmp_path / "lists.parquet", "--k", "10"]
    printed_by(*command)
    lists = pl.read_parquet(tmp_path / "lists.parquet")
    assert lists["user"].n_unique() == 10_000
    assert len(lists) == 100_000

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    expected = {}
    for user, history in histories[::20].rows():  # 500 of them, one by one
        tokens = torch.tensor([tokenizer.convert_tokens_to_ids(history)])
        with torch.no_grad():
            logits = model(tokens[:, -50:], logits_to_keep=1).logits[0, 0]
        logits[tokens[0]] = logits[: recsys.item_tokens(tokenizer).start] = -torch.inf
        expected[user] = tokenizer.convert_ids_to_tokens(logits.topk(10).indices)
    found = lists.filter(pl.col("user").is_in(list(expected))).group_by("user").agg("item").rows()
    assert dict(found) == expected


def test_a_catalogue_of_a_million_items_from_log_to_lists(tmp_path):
    generator = np.random.default_rng(0)
    items = np.concatenate((np.arange(1_000_000), generator.integers(0, 1_000_000, 200_000)))
    users = generator.integers(0, 150_000, len(items))
    pl.DataFrame({"user_id": users, "item_id": items}).write_parquet(tmp_path / "log.parquet")
    config = configured(
        tmp_path,
        tmp_path / "log.parquet",
        per_device_batch_size=256,
        objective_options={"sparse_grad": True, "num_buckets": 0},
        optimizer="sparse_adam",
        eval_users=100,
        max_steps=3,
    )
    summary = build_run(config).train()
    assert summary["vocabulary"] == 1_000_002
    assert summary["test"]["items"] == 1_000_000
    command = ["scripts/recommend.py", config.output_dir, "--history", "3", "999999", "--k", "5"]
    printed = printed_by(*command)
    assert len(printed.strip().splitlines()) == 5


READ_LOG = """
import resource, sys
from sce_lm.training.command_line import parse_config
from sce_lm.training.task_sources import build_task
task = build_task(parse_config([sys.argv[1]]))
print(task.describe()["events"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def test_a_log_of_50_million_events_is_read_and_split_in_under_4_gigabytes(tmp_path):
    """The whole process, libraries included, from the file to rows ready for training."""
    events, path = 50_000_000, tmp_path / "log.parquet"
    generator = np.random.default_rng(0)
    part = 5_000_000
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, events, part):
            columns = (
                generator.integers(0, 3_000_000, part),
                (500_000 * generator.random(part) ** 3).astype(np.int64),  # popular ones first
                np.arange(start, start + part),
            )
            writer.write_table(pa.table(dict(zip(SCHEMA.names, columns)), schema=SCHEMA))
    configured(tmp_path, path, time_column="timestamp")
    printed = printed_by("-c", READ_LOG, tmp_path / "config.yaml")
    found, gigabytes = map(float, printed.split())
    assert found == events
    assert gigabytes < 4
