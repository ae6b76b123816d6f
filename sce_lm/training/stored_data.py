"""What a run derived from its data, kept in RUN/stored_data from the start and read from there.

    source.json            fingerprints of the data that the run began with
    tokenizer/             the tokenizer
    training.parquet       a recommender: users (numbers) and the items trained on (tokens)
    asked.parquet          the whole histories of the users who are asked
    validation.parquet     the places in those that are asked for, a row a question
    test.parquet
    split.json             how the split was made, in words
    held_out.arrow         a language model: the held-out documents, tokenised
    documents.parquet      digests of its documents, in the order in which they are read

A log may be written again in another order, grow or go: a resumed run and its evaluation ask what
the run asked when it began.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from sce_lm.files import in_one_line, new_folder, write_json
from sce_lm.recsys import Split
from sce_lm.training.fingerprint import Fingerprint
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.task import Task

QUESTIONS = ("validation", "test")


def store(task: Task, run: RunFolder) -> None:
    """Write all of it, or nothing; one process does. What a start left that came to nothing is
    replaced; ValueError if the folder is something else."""
    folder = run.stored_data
    if folder.exists() and not (folder / "source.json").exists():
        raise ValueError(
            f"{folder} is in the way, where a run stores what it derives from its data; move it, "
            "or choose another output_dir."
        )
    for left in (folder, *run.path.glob(f".{folder.name}.*")):
        shutil.rmtree(left, ignore_errors=True)
    with new_folder(folder) as unfinished:
        task.tokenizer.save_pretrained(unfinished / "tokenizer")
        source = {name: dataclasses.asdict(found) for name, found in task.source.items()}
        write_json(unfinished / "source.json", source)
        task.store(unfinished)


@contextmanager
def stored(run: RunFolder) -> Iterator[Path]:
    """The folder of a run's stored data, to be read in the block.

    Raises ValueError, in one sentence, if there is none or it cannot be read.
    """
    folder = run.stored_data
    if not folder.is_dir():
        raise ValueError(
            f"{run} is of a version that did not store its split and a fingerprint of its data, so "
            "nothing tells whether the data are still the same; train it again in another "
            "output_dir, or evaluate its model folder on data that you name."
        )
    try:
        yield folder
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        raise ValueError(
            f"{folder} cannot be read ({in_one_line(error, 200)}), which "
            "holds what the run derived from its data; bring it back from a copy, or train the "
            "run again in another output_dir."
        ) from error


def read_source(run: RunFolder) -> dict[str, Fingerprint]:
    """The fingerprints that a run began with, by source: "data", and "held_out" where the held-out
    text is a source of its own."""
    with stored(run) as folder:
        found = json.loads((folder / "source.json").read_text())
        return {name: Fingerprint(**fields) for name, fields in found.items()}


def write_split(split: Split, folder: Path) -> None:
    """Write a split as integers. Every history in it is the beginning of another or of what its
    user is asked last, so histories are kept once a user."""
    users = pl.concat([split.train["user"], split.test["user"]]).unique(maintain_order=True)
    numbers = users.to_frame().with_row_index("number")

    def numbered(frame: pl.DataFrame) -> pl.DataFrame:
        joined = frame.join(numbers, on="user", how="left", maintain_order="left")
        return joined.with_columns(user="number").drop("number")

    asked = split.test.select("user", items=pl.col("history").list.concat(pl.concat_list("target")))
    # Of several questions of a user the last has the longest history.
    asked = asked.unique("user", keep="last", maintain_order=True)
    numbered(split.train).write_parquet(folder / "training.parquet")
    numbered(asked).write_parquet(folder / "asked.parquet")
    for name in QUESTIONS:
        questions: pl.DataFrame = getattr(split, name)
        places = numbered(questions.select("user", place=pl.col("history").list.len()))
        places.write_parquet(folder / f"{name}.parquet")
    write_json(folder / "split.json", {"protocol": split.protocol})


def read_split(folder: Path) -> Split:
    """The split that :func:`write_split` wrote, with numbers for its users."""
    asked = pl.read_parquet(folder / "asked.parquet")

    def questions(name: str) -> pl.DataFrame:
        places = pl.read_parquet(folder / f"{name}.parquet")
        joined = places.join(asked, on="user", how="left", maintain_order="left")
        items, place = pl.col("items"), pl.col("place")
        return joined.select("user", history=items.list.head(place), target=items.list.get(place))

    return Split(
        train=pl.read_parquet(folder / "training.parquet"),
        validation=questions("validation"),
        test=questions("test"),
        protocol=json.loads((folder / "split.json").read_text())["protocol"],
    )
