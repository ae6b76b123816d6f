import pytest

pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)

import gzip
import json
import runpy
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import polars as pl
import torch
from polars.io.plugins import register_io_source
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


def load(folder: Path) -> tuple:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


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


def with_warning(source, **options) -> tuple[list[tuple], str]:
    """The histories of a source, and the warning about what was missing ("" without one)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = recsys.read_histories(source, **options).rows()
    assert len(caught) < 2
    return rows, str(caught[0].message) if caught else ""


ROWS_OF_LISTS = [
    {"user_id": "u", "item_id": [7.0, None, 8.0]},
    {"user_id": "u", "item_id": []},
    {"user_id": None, "item_id": [9.0]},
    {"user_id": "v", "item_id": None},
    {"user_id": "w", "item_id": [7.5, 1e16, float("nan"), 9.0]},
]
"""Two questions of one user, missing values, and ids that pandas made floats of."""


def written(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        text = "".join(json.dumps(row).replace("NaN", "null") + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "polars", "pandas", "Arrow"])
def test_lists_with_missing_values_and_float_ids(tmp_path, kind):
    frame = pl.DataFrame(ROWS_OF_LISTS)
    source = {"polars": frame, "pandas": frame.to_pandas(), "Arrow": frame.to_arrow()}.get(kind)
    if source is None:
        source = written(tmp_path / f"in.{kind}", ROWS_OF_LISTS)
    rows, warning = with_warning(source)
    assert rows == [
        ("u", ["7", "8"]),
        ("u", []),
        ("v", []),
        ("w", ["7.5", "10000000000000000", "9"]),
    ]
    assert warning.endswith(
        "1 rows without a user and 2 missing items of lists; they are left out."
    )


def test_lists_of_any_type_of_id_and_arrays(tmp_path):
    for lists, expected in (
        ([[1, 2], []], [["1", "2"], []]),
        ([["a", ""], None], [["a"], []]),
        (pl.Series([["a"], ["b"]], dtype=pl.List(pl.Categorical)), [["a"], ["b"]]),
        (pl.Series([[1, 2], [3, 4]], dtype=pl.Array(pl.Int64, 2)), [["1", "2"], ["3", "4"]]),
        (pl.Series([[], []], dtype=pl.List(pl.Null)), [[], []]),
    ):
        frame = pl.DataFrame({"user_id": [1.0, 2.0], "item_id": lists})
        rows = with_warning(frame)[0]
        assert rows == [("1", expected[0]), ("2", expected[1])]
    folder = tmp_path / "parts"
    folder.mkdir()
    written(folder / "part-10.jsonl", [{"user_id": 10, "item_id": ["b"]}])
    written(folder / "part-9.jsonl", [{"user_id": 9, "item_id": [1]}])
    (folder / "_SUCCESS").touch()
    assert with_warning(folder) == ([("9", ["1"]), ("10", ["b"])], "")


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_an_empty_cell_does_not_end_the_reading_of_a_log(tmp_path, suffix):
    log = pl.DataFrame(
        {
            "user_id": ["u", None, "v", "w", "u", "x"],
            "item_id": [3.0, 4.0, None, 5.0, 6.0, float("nan")],
            "timestamp": [2, 1, 1, None, 1, 1],
        }
    )
    path = tmp_path / f"log{suffix}"
    {".csv": log.write_csv, ".parquet": log.write_parquet, ".jsonl": log.write_ndjson}[suffix](path)
    rows, warning = with_warning(path, time="timestamp")
    assert rows == [("u", ["6", "3"]), ("v", []), ("w", []), ("x", [])]
    assert "1 rows without a user and 3 events without an item or a time; they are" in warning
    assert with_warning(path)[0] == [("u", ["3", "6"]), ("v", []), ("w", ["5"]), ("x", [])]
    assert with_warning(pd.DataFrame({"user_id": ["a", "b"], "item_id": [None, None]}))[0] == [
        ("a", []),
        ("b", []),
    ]


PARQUET = pl.DataFrame({"user_id": ["u"], "item_id": [["a"]]})
UNREADABLE = {
    "cut.parquet": (b"PAR1 and then nothing", "cut.parquet cannot be read as parquet"),
    "empty.parquet": (b"", "empty.parquet is empty"),
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "blank.jsonl": (b"\n\n", "blank.jsonl is empty"),
    "cut.jsonl": (b'{"user_id": "u", "item_id": ["a"]}\n{"user_id": "v", "it', "line 2 is no JSON"),
    "bytes.jsonl": (b'{"user_id": "u", "item_id": ["\xff"]}\n', "line 1 is not UTF-8"),
    "words.jsonl": (b"hello\n", "words.jsonl cannot be read as jsonl"),
    "header.csv": (b"user_id,item_id\n", "header.csv is empty"),
    "other.jsonl": (b'{"user_id": "u", "items": ["a"]}\n', "no column 'item_id' for the item"),
    "mixed.jsonl": (
        b'{"user_id": "u", "item_id": ["a"]}\n{"user_id": "v", "item_id": "b"}\n',
        "mixed.jsonl holds 1 lists as text in column 'item_id', such as",
    ),
    "mixed_numbers.jsonl": (
        b'{"user_id": "u", "item_id": 7}\n{"user_id": "v", "item_id": [7, 8]}\n',
        "mixed_numbers.jsonl",
    ),
    "text.csv": (b"user_id,item_id\nu,\"['a', 'b']\"\n", r"such as \['a', 'b'\]; give a row an"),
    "nested.jsonl": (b'{"user_id": "u", "item_id": [["a"]]}\n', "lists in column 'item_id', with"),
    "objects.jsonl": (b'{"user_id": "u", "item_id": {"a": 1}}\n', "items in column 'item_id'"),
    "nobody.jsonl": (b'{"user_id": null, "item_id": ["a"]}\n', "nobody.jsonl holds no history"),
    "nobody.csv": (b"user_id,item_id\n,a\n", "nobody.csv holds no history"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_holds_no_histories_is_refused_in_a_sentence(tmp_path, name):
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        with_warning(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_parquet_file_with_any_byte_changed_or_cut_is_read_or_refused(tmp_path):
    path = tmp_path / "in.parquet"
    PARQUET.write_parquet(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 0xFF
        for content in (changed, whole[:place]):
            path.write_bytes(content)
            with suppress(ValueError):
                recsys.read_histories(path)


def test_a_folder_of_lists_and_of_single_ids_is_refused(tmp_path):
    written(tmp_path / "a.jsonl", [{"user_id": "u", "item_id": ["a"]}])
    written(tmp_path / "b.jsonl", [{"user_id": "v", "item_id": "b"}])
    with pytest.raises(
        ValueError, match=r"lists in .*a\.jsonl and single ids in that of .*b\.jsonl"
    ):
        recsys.read_histories(tmp_path)


def test_a_path_is_no_pattern(tmp_path):
    written(tmp_path / "in[1].jsonl", [{"user_id": "u", "item_id": ["a"]}])
    written(tmp_path / "in1.jsonl", [{"user_id": "v", "item_id": ["b"]}])
    assert with_warning(tmp_path / "in[1].jsonl")[0] == [("u", ["a"])]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("counted", [True, False])
def test_files_hold_what_recommend_gives(tmp_path, monkeypatch, folder, suffix, counted):
    monkeypatch.setattr(recommendation_files, "USERS_AT_A_TIME", 2)  # so that files grow in parts
    loaded = load(folder)
    if counted:
        recsys.count_items(loaded[1], pl.DataFrame({"items": [[5, 9, 9]]}))
    histories = pl.concat((HISTORIES, pl.DataFrame({"user": ["x"], "history": [["i6"]]})))
    output = tmp_path / "out" / f"lists{suffix}"
    options = {"candidates": ["i7", "i3", "i8", "?"], "exclude": ["!", "i8"], "exclude_seen": False}
    report = recsys.recommend_file(*loaded, histories, output, 2, progress=False, **options)
    counts = {name: report[name] for name in report if not name.endswith(("seconds", "second"))}
    assert counts == {
        "users": 4,
        "users_without_history": 1,
        "users_without_list": 0 if counted else 1,
        "unknown_items": 1,
        "unknown_candidates": 1,
        "unknown_excluded": 1,
        "unknown_user_candidates": 0,
        "users_done_before": 0,
    }
    assert report["users_per_second"] == pytest.approx(4 / report["seconds"])

    found = recsys.recommend(*loaded, histories["history"], 2, **options)
    rows = [
        (user, rank, item, pytest.approx(score, rel=1e-6), "model")
        for user, items, scores in zip(histories["user"], found.items, found.scores, strict=True)
        if user != "w"
        for rank, (item, score) in enumerate(zip(items, scores, strict=True), 1)
    ]
    assert len(rows) == 6
    of_w = [("w", 1, "i7", 2.0, "popularity"), ("w", 2, "i3", 1.0, "popularity")]
    rows[4:4] = of_w if counted else [("w", None, None, None, "none")]
    assert read(output).rows() == rows
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_what_cannot_be_answered_leaves_no_file_behind(tmp_path, loaded):
    with pytest.raises(ValueError, match="k is 50"):
        recsys.recommend_file(*loaded, HISTORIES, tmp_path / "lists.csv", 50, progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"ends in '.xlsx'; recommendations are written to a file"):
        recsys.recommend_file(*loaded, HISTORIES, tmp_path / "lists.xlsx")


MANY = pl.DataFrame(
    {"user": [f"u{n}" for n in range(9)], "history": [[f"i{n}", f"i{3 * n}"] for n in range(9)]}
)


@pytest.fixture
def asked(monkeypatch):
    """How many users recommend_file has asked for in each part; before the call number `stop_at`
    it is interrupted."""
    asked = SimpleNamespace(users=[], stop_at=None)
    recommend = recommendation_files.recommend

    def ask(model, tokenizer, histories, k, **options):
        if len(asked.users) == asked.stop_at:
            asked.stop_at = None
            raise KeyboardInterrupt
        asked.users.append(len(histories))
        return recommend(model, tokenizer, histories, k, **options)

    monkeypatch.setattr(recommendation_files, "USERS_AT_A_TIME", 2)
    monkeypatch.setattr(recommendation_files, "recommend", ask)
    return asked


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_call_goes_on_without_repeating_or_losing_a_user(
    tmp_path, loaded, asked, suffix, damaged
):
    whole, output = tmp_path / f"whole{suffix}", tmp_path / f"lists{suffix}"
    report = recsys.recommend_file(*loaded, MANY, whole, 3, progress=False)
    assert (asked.users, report["users_done_before"]) == ([2, 2, 2, 2, 1], 0)
    asked.users.clear()
    asked.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        recsys.recommend_file(*loaded, MANY, output, 3, progress=False)
    assert not output.exists()
    if damaged:
        part = tmp_path / f".lists{suffix}.parts" / "1.parquet"
        part.write_bytes(part.read_bytes()[:-9])
    asked.users.clear()
    report = recsys.recommend_file(*loaded, MANY, output, 3, progress=False)
    assert asked.users == ([2, 2, 1] if damaged else [2, 1])
    assert (report["users"], report["users_done_before"]) == (9, 4 if damaged else 6)
    assert read(output).equals(read(whole))
    assert {path.name for path in tmp_path.iterdir()} == {whole.name, output.name}


def test_lists_of_another_question_are_made_anew(tmp_path, folder, asked):
    model, tokenizer = load(folder)

    def new(histories=MANY, k=3, **options) -> int:
        """Users asked for after the interrupted call of MANY, k = 3 and no options."""
        asked.users.clear()
        asked.stop_at = 4
        output = tmp_path / "lists.csv"
        with pytest.raises(KeyboardInterrupt):
            recsys.recommend_file(model, tokenizer, MANY, output, 3, progress=False)
        asked.users.clear()
        with torch.no_grad():
            model.get_output_embeddings().weight[5] += change
            recsys.recommend_file(model, tokenizer, histories, output, k, progress=False, **options)
            model.get_output_embeddings().weight[5] -= change
        return sum(asked.users)

    change = 0.0
    assert new() == new(batch_size=1) == 1
    assert new(k=2) == new(exclude=["i9"]) == new(candidates=["i9", "i8", "i7"]) == 9
    assert new(exclude_seen=False) == 9
    assert new(MANY.with_columns(history=pl.col("history").list.reverse())) == 9
    longer = pl.col("history").list.concat(pl.lit(["i1"]))
    of_one = pl.when(user="u3").then(longer).otherwise("history")
    assert new(MANY.with_columns(history=of_one)) == 2 + 1
    change = 1e-3
    assert new() == 9


def test_each_user_has_own_candidates(tmp_path, folder, asked, run):
    own = [["i1", "i2", "?"], None, [], ["i30"], ["i5", "i6", "i7", "i8"], None, *[["i9"]] * 3]
    frame = MANY.with_columns(candidates=pl.Series(own, dtype=pl.List(pl.String)))
    frame = pl.concat(
        (frame, frame[3:6].with_columns(history=pl.Series([["new"]] * 3))), how="vertical"
    )
    frame.write_parquet(tmp_path / "in.parquet")
    model, tokenizer = load(folder)
    recsys.count_items(tokenizer, pl.DataFrame({"items": [[5, 9, 9]]}))
    output = tmp_path / "lists.parquet"
    histories = recsys.scan_histories(
        tmp_path / "in.parquet", user="user", item="history", candidates="candidates"
    )
    options = {"exclude_seen": False, "exclude": ["i7"], "progress": False}
    report = recsys.recommend_file(model, tokenizer, histories, output, 3, **options)
    assert report["unknown_user_candidates"] == 1
    expected = []
    for user, history, of_user in frame.rows():
        allowed = None if of_user is None else [item for item in of_user if item != "?"]
        if allowed == []:
            expected.append((user, None, "none"))
            continue
        k = 3 if allowed is None else len(set(allowed) - {"i7"})
        found = recsys.recommend(
            model,
            tokenizer,
            [history],
            min(k, 3),
            candidates=allowed,
            exclude=["i7"],
            exclude_seen=False,
        )
        expected += [(user, item, found.sources[0]) for item in found.items[0]]
    assert read(output).select("user", "item", "source").rows() == expected
    assert {"popularity", "model", "none"} == set(read(output)["source"])

    command = (folder, "--input", tmp_path / "in.parquet", "--output", tmp_path / "l.csv")
    names = ("--user_column", "user", "--item_column", "history", "--keep_seen", "--k", 3)
    done = run(*command, *names, "--candidates_column", "candidates")
    assert done.returncode == 0, done.stderr
    assert "1 candidates of users are not in the catalogue" in done.stderr
    assert read(tmp_path / "l.csv").filter(user="u8")["item"].to_list() == ["i9"]
    with pytest.raises(ValueError, match="a row an event, and candidates of each user are read"):
        recsys.scan_histories(LOG, candidates="timestamp")
    with pytest.raises(ValueError, match="single values in column 'user'"):
        recsys.scan_histories(frame, user="user", item="history", candidates="user")
    with pytest.raises(ValueError, match="2 lists of user_candidates for 1 histories"):
        recsys.recommend(model, tokenizer, [["i1"]], 3, user_candidates=[None, None])


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("size", [1, 4, 9, 100])
def test_histories_in_parts_are_the_histories(tmp_path, is_log, size):
    rows = {"user_id": "user", "item_id": "history"}
    frame = MANY.select(pl.col(old).alias(new) for new, old in rows.items())
    path = tmp_path / "in.parquet"
    (frame.explode("item_id") if is_log else frame).write_parquet(path, row_group_size=4)
    found = recsys.scan_histories(path)
    assert found.num_histories == 9
    for _ in range(2):
        parts = list(found.parts(size))
        assert {len(part) for part in parts[:-1]} <= {size}
        assert pl.concat(parts).equals(recsys.read_histories(path))
        assert pl.concat(parts).equals(MANY)


def test_histories_are_not_read_far_ahead_of_those_that_are_answered(monkeypatch, loaded, tmp_path):
    """Of 300,000 histories a few tens of thousands are held, and of lists those of a part."""
    batch = pl.DataFrame({"user_id": [str(n) for n in range(1000)], "item_id": [["i1"]] * 1000})
    counts = SimpleNamespace(read=0, answered=0, ahead=0)

    def read(with_columns, predicate, n_rows, batch_size):
        for _ in range(300):
            counts.read += len(batch)
            found = batch if predicate is None else batch.filter(predicate)
            yield found if with_columns is None else found.select(with_columns)

    def answer(model, tokenizer, histories, k, **options):
        counts.answered += len(histories)
        counts.ahead = max(counts.ahead, counts.read - counts.answered)
        nothing = [[] for _ in histories]
        return recsys.Recommendations(nothing, nothing, ["none"] * len(histories), 0, 0, 0, 0, 0)

    monkeypatch.setattr(recommendation_files, "USERS_AT_A_TIME", 1000)
    monkeypatch.setattr(recommendation_files, "recommend", answer)
    histories = recsys.scan_histories(register_io_source(read, schema=batch.schema))
    assert counts.read == histories.num_histories == 300_000
    counts.read = 0
    output = tmp_path / "lists.parquet"
    report = recsys.recommend_file(*loaded, histories, output, 1, progress=False)
    assert report["users_without_list"] == counts.answered == counts.read == 300_000
    assert counts.ahead < 100_000
    assert pl.scan_parquet(output).select(pl.len()).collect().item() == 300_000


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script in this process, which has its imports already."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out, err = capsys.readouterr()
        if isinstance(end.value.code, str):  # what Python does with a text
            return Done(1, out, err + end.value.code)
        return Done(end.value.code or 0, out, err)

    return run


def test_the_script_is_a_program(folder):
    command = [sys.executable, str(SCRIPT), str(folder), "--history", "-i1"]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 3, done.stderr
    assert "users have no known item" in done.stderr


def test_the_script_lists_items_for_one_history(folder, loaded, run):
    done = run(folder, "--history", "i1", "new", "i2", "--k", 3)
    assert done.returncode == 0, done.stderr
    assert "1 items of histories are not in the catalogue and were skipped" in done.stderr
    expected = recsys.recommend(*loaded, [["i1", "i2"]], 3)
    assert [line.split()[2] for line in done.stdout.splitlines()] == expected.items[0]


def test_the_script_takes_ids_that_begin_with_a_dash(tmp_path, run):
    tokenizer = recsys.build_item_tokenizer(["-Xq3", "-5", "--y", "b"])
    config = recsys.SASRecConfig(vocab_size=len(tokenizer), initializer_range=1.0)
    recsys.SASRecForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    for arguments, history in (
        (("--history", "-Xq3", "-5", "--k", "2", tmp_path), ["-Xq3", "-5"]),
        ((tmp_path, "--k", "2", "--history", "-Xq3", "--", "b", "--y"), ["-Xq3", "b", "--y"]),
        ((tmp_path, "--history=-Xq3", "--history=--y", "--k", "2"), ["-Xq3", "--y"]),
    ):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
        assert not done.stderr.count("not in the catalogue")
        expected = recsys.recommend(*loaded, [history], 2)
        assert [line.split()[2] for line in done.stdout.splitlines()] == expected.items[0]
    for wrong in (("--history", "b", "--y"), ("--history",), ("--history", "b", "--input", "x")):
        assert run(tmp_path, *wrong).returncode == 2


@pytest.fixture
def run_folder(tmp_path, folder):
    """A run of scripts/train.py, as far as recommend.py reads it, with an item counted."""
    run_folder = tmp_path / "run"
    model, tokenizer = load(folder)
    recsys.count_items(tokenizer, pl.DataFrame({"items": [[30, 30, 31]]}))
    model.save_pretrained(run_folder / "model")
    tokenizer.save_pretrained(run_folder / "model")
    columns = {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp"}
    (run_folder / "config.json").write_text(json.dumps({**columns, "sequence_length": 1}))
    return run_folder


def test_the_script_takes_files_and_the_settings_of_a_run(tmp_path, run_folder, loaded, run):
    with_gap = pl.concat((LOG, LOG[:1].with_columns(user_id=pl.lit("x"), item_id=None)))
    with_gap.write_csv(tmp_path / "log.csv")
    allowed = tmp_path / "allowed.txt"  # from an editor of Windows, with an item of last year
    names = [f"i{n}" for n in range(10, 30)]
    allowed.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*names, "retired", "", " "]).encode())
    excluded = tmp_path / "excluded.txt"
    excluded.write_text("gone\n i11 \n\n")
    output = tmp_path / "lists.parquet"
    files = ("--output", output, "--candidates", allowed, "--exclude", excluded)
    done = run(run_folder, "--input", tmp_path / "log.csv", *files)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["users"], report["users_without_history"]) == (4, 2)
    for said in (
        "1 events without an item or a time; they are left out",
        "1 items of histories are not in the catalogue",
        "1 candidates are not in the catalogue",
        "1 items to exclude are not in the catalogue",
        "2 users have no known item",
    ):
        assert said in done.stderr
    names.remove("i11")
    expected = recsys.recommend(*loaded, [["i3"], ["i2"]], 10, candidates=names)
    lists = read(output)
    of_model = lists.filter(source="model")["item"].to_list()
    assert of_model == [item for items in expected.items for item in items]
    for user in ("w", "x"):
        of_user = lists.filter(user=user)
        assert of_user["item"].to_list()[:3] == ["i28", "i29", "i10"]
        assert set(of_user["source"]) == {"popularity"}


def test_the_script_says_when_nothing_is_known_of_anybody(tmp_path, folder, run_folder, run):
    done = run(run_folder, "--history", "new", "--k", 2)
    assert done.returncode == 3
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["1", "2.0000", "i28"],
        ["2", "1.0000", "i29"],
    ]
    assert "No list is the model's" in done.stderr
    LOG.write_csv(tmp_path / "log.csv")
    output = tmp_path / "lists.csv"
    wrong_column = ("--item_column", "timestamp", "--file_order")
    done = run(folder, "--input", tmp_path / "log.csv", "--output", output, *wrong_column)
    assert done.returncode == 3
    assert "one of the catalogue's, such as 'i0'" in done.stderr
    assert read(output)["source"].to_list() == ["none"] * 3


def test_the_script_says_in_one_sentence_what_is_wrong(tmp_path, folder, run):
    ids = tmp_path / "ids.txt"
    ids.write_text("i1\n", encoding="utf-16")
    empty = tmp_path / "log.csv"
    empty.write_text("user_id,item_id\n")
    output = tmp_path / "lists.csv"
    for arguments, message in (
        ((tmp_path, "--history", "i1"), "holds no model"),
        ((folder, "--history", "i1", "--k", 99), "k is 99"),
        ((folder, "--history", "i1", "--exclude", ids), "ids.txt is no text in UTF-8"),
        ((folder, "--history", "i1", "--exclude", tmp_path / "none.txt"), "none.txt"),
        ((folder, "--input", empty, "--output", output), "log.csv is empty"),
    ):
        done = run(*arguments)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith("recommend.py: ")
        assert message in done.stderr
    assert not output.exists()
