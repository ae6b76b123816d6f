import pytest

pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import torch
from support.launch import ONE_THREAD
from transformers import AutoModelForCausalLM, AutoTokenizer

from sce_lm import recsys
from sce_lm.recsys import recommendation_files

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "recommend.py"
LOG = pl.DataFrame(
    {
        "user_id": ["u", "v", "u", "w", "v", "u"],
        "item_id": ["i3", "i1", "i5", "new", "i2", "i4"],
        "timestamp": [3, 1, 2, 1, 2, 1],
    }
)
HISTORIES = pl.DataFrame(
    {"user": ["u", "v", "w"], "history": [["i4", "i5", "i3"], ["i1", "i2"], ["new"]]}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = recsys.build_item_tokenizer(f"i{n}" for n in range(40))
    config = recsys.SASRecConfig(vocab_size=len(tokenizer), initializer_range=1.0)
    recsys.SASRecForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def read(path: Path) -> pl.DataFrame:
    readers = {".csv": pl.read_csv, ".parquet": pl.read_parquet, ".jsonl": pl.read_ndjson}
    return readers[path.suffix](path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_histories_are_read_from_a_log(tmp_path, suffix):
    path = tmp_path / f"log{suffix}"
    {".csv": LOG.write_csv, ".parquet": LOG.write_parquet, ".jsonl": LOG.write_ndjson}[suffix](path)
    assert recsys.read_histories(path, time="timestamp").equals(HISTORIES)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_histories_are_read_from_a_row_each(tmp_path, suffix):
    frame = pl.DataFrame({"id": [1, 2, 3], "seen": [[1, 2], [], None]})
    path = tmp_path / f"histories{suffix}"
    (frame.write_parquet if suffix == ".parquet" else frame.write_ndjson)(path)
    found = recsys.read_histories(path, user="id", item="seen")
    assert found.rows() == [("1", ["1", "2"]), ("2", []), ("3", [])]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_files_hold_what_recommend_gives(tmp_path, monkeypatch, loaded, suffix):
    monkeypatch.setattr(recommendation_files, "USERS_AT_A_TIME", 2)  # so that files grow in parts
    output = tmp_path / "out" / f"lists{suffix}"
    report = recsys.recommend_file(*loaded, HISTORIES, output, 4, progress=False)
    assert (report["users"], report["unknown_items"], report["users_without_history"]) == (3, 1, 1)
    assert report["users_per_second"] == pytest.approx(3 / report["seconds"])

    found = recsys.recommend(*loaded, HISTORIES["history"].to_list(), 4)
    rows = [
        (user, rank, item, pytest.approx(score, rel=1e-6))
        for user, items, scores in zip(HISTORIES["user"], found.items, found.scores, strict=True)
        for rank, (item, score) in enumerate(zip(items, scores, strict=True), 1)
    ]
    assert len(rows) == 8
    assert read(output).rows() == rows
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_a_file_that_was_not_finished_is_not_left_behind(tmp_path, loaded):
    with pytest.raises(ValueError, match="k is 50"):
        recsys.recommend_file(*loaded, HISTORIES, tmp_path / "lists.csv", 50, progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"ends in '.xlsx'; recommendations are written to a file"):
        recsys.recommend_file(*loaded, HISTORIES, tmp_path / "lists.xlsx")


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)


def test_the_script_lists_items_for_one_history(folder, loaded):
    done = run(folder, "--history", "i1", "new", "i2", "--k", 3)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("1 items of the history are not known")
    expected = recsys.recommend(*loaded, [["i1", "i2"]], 3)
    assert [line.split()[2] for line in lines] == expected.items[0]


def test_the_script_takes_files_and_the_settings_of_a_run(tmp_path, folder, loaded):
    run_folder = tmp_path / "run"
    (run_folder / "model").parent.mkdir()
    (run_folder / "model").symlink_to(folder)
    columns = {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp"}
    (run_folder / "config.json").write_text(json.dumps({**columns, "sequence_length": 1}))
    LOG.write_csv(tmp_path / "log.csv")
    allowed = tmp_path / "allowed.txt"
    allowed.write_text("\n".join(f"i{n}" for n in range(10, 30)))
    output = tmp_path / "lists.parquet"
    done = run(
        run_folder, "--input", tmp_path / "log.csv", "--output", output, "--candidates", allowed
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["users"] == 3
    last_items = [["i3"], ["i2"]]
    expected = recsys.recommend(*loaded, last_items, 10, candidates=allowed.read_text().split())
    assert read(output)["item"].to_list() == [item for items in expected.items for item in items]


def test_the_script_says_in_one_sentence_what_is_wrong(tmp_path, folder):
    for arguments, message in (
        ((tmp_path, "--history", "i1"), "holds no model"),
        ((folder, "--history", "i1", "--k", 99), "k is 99"),
    ):
        done = run(*arguments)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("recommend.py: ")
        assert message in done.stderr
