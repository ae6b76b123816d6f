"""Text: documents read from files or the hub, tokenised, and packed into blocks of equal length.

Documents are tokenised, each with the end-of-text token behind it, joined into one stream and cut
into blocks of `sequence_length`; what is left over at the end is dropped. Tokenised documents are
kept on disk and mapped into memory, and blocks are views of them.
"""

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from sce_lm.files import data_files
from sce_lm.recsys.delimited import open_bytes
from sce_lm.training.config import TrainConfig

_LOADERS = {
    ".csv": "csv",
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "text",
}
_COMPRESSIONS = (".gz", ".zst")
_LOADER_OPTIONS: dict[str, dict[str, Any]] = {
    # The text "NA" is text.
    "csv": {"keep_default_na": False, "na_values": [""]},
    "text": {"sample_by": "paragraph", "encoding": "utf-8-sig"},
}


def read_documents(config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Training and held-out documents of local files or a hub data set, checked.

    A text file's documents are what blank lines separate. Where no held-out data is named, a
    random share of the documents is held out, chosen by the seed.

    Raises ValueError for data that cannot be read, a missing column, or no documents.
    """
    column, cache = config.text_column, config.cache_dir
    train = read(config.data, "train", column, cache, config.data_name)
    if config.held_out is not None:
        if is_local(config.data) or is_local(config.held_out):
            return train, read(config.held_out, "train", column, cache)
        return train, read(config.data, config.held_out, column, cache, config.data_name)
    if len(train) < 2:
        raise ValueError(
            f"{config.data} has {len(train)} document and none can be held out of it; give "
            "held-out text by held_out, or separate documents by blank lines."
        )
    parts = train.train_test_split(
        test_size=max(1, round(len(train) * config.held_out_fraction)), seed=config.seed
    )
    return parts["train"], parts["test"]


def is_local(source: str) -> bool:
    """Whether `source` names a path rather than a hub data set."""
    path = Path(source).expanduser()
    return path.exists() or path.is_absolute() or _ending(path) in _LOADERS


def read(source: str, split: str, column: str, cache_dir: str, name: str | None = None) -> Dataset:
    """One split of a hub data set, or a local file or folder of files, with its text in `column`.

    Args:
        source: path, taken as it stands and never as a pattern, or hub id.
        split: split of the hub data set; a path is one split, "train".
        column: column with the text ("text" in a text file).
        cache_dir: folder for the data in Arrow form.
        name: configuration name of the hub data set.

    Raises ValueError for data that cannot be read or have no rows, and for a missing column.
    """
    options: dict[str, Any] = {"path": source}
    files: list[Path] = []
    if is_local(source):
        files = _local_files(Path(source).expanduser())
        loader = _LOADERS[_ending(files[0])]
        # Escaped, since data sets take every path for a pattern.
        names = [glob.escape(str(file.absolute())) for file in files]
        options = {"path": loader, "data_files": names, **_LOADER_OPTIONS.get(loader, {})}
    try:
        documents = datasets.load_dataset(
            **options, name=name, split=split, cache_dir=str(Path(cache_dir).expanduser() / "data")
        )
    except Exception as error:  # the libraries behind raise what they like
        reason = " ".join(str(error.__cause__ or error).split())[:300].rstrip(".")
        place = next(filter(None, map(_damage, files)), None)
        if place is not None:
            raise ValueError(
                f"{place} cannot be read ({reason}); mend it or leave it out."
            ) from error
        raise ValueError(
            f"The data {source!r} cannot be read ({reason}); expected a local "
            f"{', '.join(_LOADERS)} path or the id of a hub data set; check it."
        ) from error
    assert isinstance(documents, Dataset)
    if column not in documents.column_names:
        raise ValueError(
            f"{source} has the columns {', '.join(documents.column_names)} and not {column!r}; "
            "name the one with the text by text_column."
        )
    kind = documents.features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        dtype = getattr(kind, "dtype", None)
        held = f"{dtype} values" if dtype else "values of several types, or with parts"
        raise ValueError(
            f"Column {column!r} of {source} holds {held}; expected text; name another by "
            "text_column."
        )
    return documents


def _local_files(path: Path) -> list[Path]:
    """A file, or all files below a folder but those that `data_files` passes over, of one kind."""
    if not path.exists():
        raise ValueError(f"There is no data file {path}; give the path of a file or folder.")
    files = [path] if path.is_file() else _files_below(path)
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{path} is empty; training needs text; give a file that has some.")
    kinds = {_LOADERS.get(_ending(file)) for file in files}
    if len(kinds) != 1 or None in kinds:
        endings = ", ".join(sorted({_ending(file) or file.name for file in files}))
        raise ValueError(
            f"{path} holds files of {endings}; expected files of one kind out of "
            f"{', '.join(_LOADERS)}; name one file, or tidy the folder."
        )
    return files


def _files_below(folder: Path) -> list[Path]:
    folders = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))
    )
    return [*data_files(folder), *(file for below in folders for file in _files_below(below))]


def _ending(path: Path) -> str:
    """How a file's name ends, in lower case and without the ending of a compression."""
    path = Path(path.name.lower())
    return (path.with_suffix("") if path.suffix in _COMPRESSIONS else path).suffix


def _damage(file: Path) -> str | None:
    """Where a file is no UTF-8 or no JSON lines, or itself if it is damaged in another way."""
    ending = _ending(file)
    number = 0
    try:
        if ending == ".parquet":
            pq.read_metadata(file)
            return None
        with open_bytes(file) as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 (used where a line fails)
                text = line.decode("utf-8-sig")
                if ending in (".jsonl", ".ndjson") and text.strip():
                    json.loads(text)
    except ValueError:
        return f"Line {number} of {file}" if number else str(file)
    except (OSError, EOFError, pa.ArrowException):
        return str(file)
    return None


def tokenise(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, config: TrainConfig
) -> Dataset:
    """`input_ids` of each document that is not blank, the end-of-text token last; kept on disk."""

    def encode(texts: list[str]) -> dict[str, Any]:
        end = tokenizer.eos_token_id
        kept = [text for text in texts if text and not text.isspace()]
        rows = tokenizer(kept, verbose=False)["input_ids"] if kept else []
        return {"input_ids": [r if r and r[-1] == end else [*r, end] for r in rows]}

    key = Hasher.hash([documents._fingerprint, tokenizer, config.text_column])
    folder = Path(config.cache_dir).expanduser() / "tokenised"
    folder.mkdir(parents=True, exist_ok=True)
    return documents.map(
        encode,
        batched=True,
        input_columns=[config.text_column],
        remove_columns=documents.column_names,
        features=Features({"input_ids": List(Value("int32"))}),
        cache_file_name=str(folder / f"{key}.arrow"),
        new_fingerprint=key,
        desc="tokenising",
    )


class PackedText(Sequence[np.ndarray]):
    """Blocks of equal length of a token stream that stays where it is (memory-mapped Arrow)."""

    def __init__(self, tokenised: Dataset, length: int):
        columns = tokenised.data.column("input_ids").chunks
        self.chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in columns]
        self.ends = np.cumsum([0] + [len(chunk) for chunk in self.chunks])
        self.length = length

    def __len__(self) -> int:
        return int(self.ends[-1]) // self.length

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of block `index`, int64 `[length]`."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start, stop = index * self.length, (index + 1) * self.length
        first = int(np.searchsorted(self.ends, start, side="right")) - 1
        pieces = []
        for chunk, begin in zip(self.chunks[first:], self.ends[first:]):
            if begin >= stop:
                break
            pieces.append(chunk[max(start - begin, 0) : stop - begin])
        return np.concatenate(pieces).astype(np.int64)
