"""Text: documents read from files or the hub, tokenised, and packed into blocks of equal length.

Documents are tokenised, each with the end-of-text token behind it, joined into one stream and cut
into blocks of `sequence_length`; what is left over at the end is dropped. Tokenised documents are
kept on disk and mapped into memory, and blocks are views of them.
"""

import glob
import json
from collections.abc import Callable, Sequence
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
from sce_lm.training.fingerprint import digests
from sce_lm.training.train_config import TrainConfig

_LOADERS = {
    ".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".txt": "text",
}  # fmt: skip
_COMPRESSIONS = (".gz", ".zst")
_LOADER_OPTIONS: dict[str, dict[str, Any]] = {
    # The text "NA" is text.
    "csv": {"keep_default_na": False, "na_values": [""]},
    "text": {"sample_by": "paragraph", "encoding": "utf-8-sig"},
}


def read_documents(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """The documents of local files or a hub data set, and those that are named to be held out.

    A text file's documents are what blank lines separate.

    Raises ValueError for data that cannot be read, a missing column, or no documents.
    """
    column, cache = config.text_column, config.cache_dir
    documents = read(config.data, "train", column, cache, config.data_name)
    if config.held_out is None:
        return documents, None
    if is_local(config.data) or is_local(config.held_out):
        return documents, read(config.held_out, "train", column, cache)
    return documents, read(config.data, config.held_out, column, cache, config.data_name)


def hold_out(documents: Dataset, config: TrainConfig) -> tuple[Dataset, Dataset]:
    """What is trained on and a random share that is held out, chosen by the seed.

    Raises ValueError if there is but one document.
    """
    if len(documents) < 2:
        raise ValueError(
            f"{config.data} has {len(documents)} document and none can be held out of it; give "
            "held-out text by held_out, or separate documents by blank lines."
        )
    parts = documents.train_test_split(
        test_size=max(1, round(len(documents) * config.held_out_fraction)), seed=config.seed
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
    if options["path"] == "text":
        # What blank lines separate begins and ends with a line that is none.
        documents = documents.map(_without_line_breaks, batched=True, input_columns=[column])
    return documents


def _without_line_breaks(texts: list[str]) -> dict[str, list[str]]:
    return {"text": [text.strip("\n") for text in texts]}


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
    """`input_ids` of each document that is not blank, the end-of-text token last; kept on disk.

    Raises ValueError for a tokenizer without such a token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no end-of-text token, which is put "
            "between documents; give it an eos_token, or choose another tokenizer."
        )

    def encode(texts: list[str]) -> dict[str, Any]:
        kept = [text for text in texts if not _is_blank(text)]
        rows = tokenizer(kept, verbose=False)["input_ids"] if kept else []
        return {"input_ids": [r if r and r[-1] == end else [*r, end] for r in rows]}

    # A tokenizer is the same wherever it was loaded from.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    same = tokenizer if backend is None else backend.to_str()
    found = document_digests(documents, config)
    key = Hasher.hash([found[found != 0].tobytes(), same, end])
    return _kept(documents, encode, {"input_ids": List(Value("int32"))}, "tokenised", key, config)


def document_digests(documents: Dataset, config: TrainConfig) -> np.ndarray:
    """uint64 `[documents]`, `fingerprint.digests` of each; 0 where it is blank."""

    def digest(texts: list[str]) -> dict[str, Any]:
        is_blank = [_is_blank(text) for text in texts]
        return {"digest": np.where(is_blank, np.uint64(0), digests(text or "" for text in texts))}

    key = Hasher.hash([documents._fingerprint, config.text_column])
    found = _kept(documents, digest, {"digest": Value("uint64")}, "digests", key, config)
    return found.data.column("digest").to_numpy()


def _is_blank(text: str | None) -> bool:
    return not text or text.isspace()


def _kept(
    documents: Dataset,
    function: Callable[[list[str]], dict[str, Any]],
    features: dict[str, Any],
    folder: str,
    key: str,
    config: TrainConfig,
) -> Dataset:
    """A function of batches of documents, its rows kept on disk under a name that says of what."""
    path = Path(config.cache_dir).expanduser() / folder / f"{key}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    return documents.map(
        function,
        batched=True,
        input_columns=[config.text_column],
        remove_columns=documents.column_names,
        features=Features(features),
        cache_file_name=str(path),
        new_fingerprint=key,
        desc=folder,
    )


class PackedText(Sequence[np.ndarray]):
    """Blocks of equal length of a token stream that stays where it is (memory-mapped Arrow)."""

    def __init__(self, tokenised: Dataset, length: int):
        self.documents = tokenised.data.column("input_ids")
        self.chunks = [c.flatten().to_numpy(zero_copy_only=False) for c in self.documents.chunks]
        self.ends = np.cumsum([0] + [len(chunk) for chunk in self.chunks])
        self.length = length
        self.key = f"{tokenised._fingerprint}/{length}"
        """Says which blocks: equal for equal documents in their order, tokenizer and length."""

    def save(self, path: Path) -> None:
        """Write the tokenised documents to an Arrow file, from which `Dataset.from_file` maps them
        into memory."""
        table = pa.table({"input_ids": self.documents})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)

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
