"""English technical text from the documentation of installed packages, with a tokenizer.

A document is one module: its docstrings in source order, each under its qualified name. Modules
longer than 20,000 characters (the language reference that `help()` shows, torch's operators) are
cut between docstrings, so that no single subject fills the held-out part. The README of each
package, as its metadata holds it, is a document as well.

Libraries repeat themselves, and a repetition across the split would make the held-out text easier
than it is. So a docstring is kept once, and one that is mostly made of lines already seen (a
model's configuration beside another's) is left out. Files are read in an order shuffled by the seed
until `max_bytes` are reached.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from sce_lm.files import new_folder
from sce_lm.training.embedded import docstrings
from sce_lm.training.embedded.sources import (
    DEFAULT_PACKAGES,
    find_sources,
    fingerprint,
    read_files,
)

END_OF_TEXT = "<|endoftext|>"
DOCUMENT_CHARACTERS = 20_000
TELLING_LINE = 20
"""Shorter lines ("Returns:", "Example:") do not say whether a text is a copy."""


@dataclasses.dataclass(frozen=True)
class EmbeddedText:
    """Two text files and the tokenizer trained on the first, on disk, and their sizes."""

    train: Path
    """JSON lines with the field "text", one document a line, in shuffled order."""
    heldout: Path
    """The same for documents kept out of training, the tokenizer's included."""
    tokenizer: Path
    """Folder for `AutoTokenizer.from_pretrained`; its end-of-text token is both eos and bos."""
    train_documents: int
    train_bytes: int
    heldout_documents: int
    heldout_bytes: int
    vocab_size: int


def embedded_text(
    cache_dir: str | Path,
    *,
    packages: Sequence[str] = DEFAULT_PACKAGES,
    max_bytes: int = 15_000_000,
    min_characters: int = 80,
    heldout_share: float = 0.03,
    vocab_size: int = 32_768,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> EmbeddedText:
    """Collect text from installed packages and train a byte-level BPE on it.

    A second call finds both in the cache and returns.

    Args:
        cache_dir: holds one finished folder for each set of package versions and options.
        packages: top-level names, "stdlib" for the standard library; missing ones are skipped.
        max_bytes: UTF-8 bytes of text after which no further file is read, both parts together.
        min_characters: shorter docstrings are left out.
        heldout_share: expected share of documents held out, chosen by their content alone.
        vocab_size: tokens, the 256 bytes and end-of-text included; little text gives fewer.
        seed: order of files and documents.
        workers: reading processes; by default one for each processor of this process.
        progress: show bars.

    Raises:
        ValueError: too little text for a training and a held-out part.
    """
    sources = find_sources(packages)
    options = {
        "max_bytes": max_bytes,
        "min_characters": min_characters,
        "heldout_share": heldout_share,
        "vocab_size": vocab_size,
        "seed": seed,
        "tokenizers": tokenizers.__version__,
    }
    folder = Path(cache_dir) / f"text-{fingerprint(packages, sources, options)}"
    if not folder.is_dir():
        order = random.Random(seed)
        order.shuffle(sources)
        answers = read_files(docstrings.__file__, sources, workers)
        with contextlib.closing(answers):
            documents = _up_to(
                max_bytes,
                _documents(itertools.chain(_readmes(sorted(packages)), answers), min_characters),
                progress,
            )
        order.shuffle(documents)
        parts: dict[str, list[str]] = {"train": [], "heldout": []}
        for document in documents:
            parts["heldout" if _fraction(document) < heldout_share else "train"].append(document)
        if not all(parts.values()):
            raise ValueError(
                f"{len(documents)} documents of text in {', '.join(packages) or 'no package'} are "
                "too few for a training and a held-out part: name more installed packages, or "
                f"raise heldout_share ({heldout_share}) or max_bytes ({max_bytes})"
            )
        tokenizer = _train_tokenizer(parts["train"], vocab_size, progress)
        with new_folder(folder) as unfinished:
            tokenizer.save_pretrained(unfinished / "tokenizer")
            statistics = {"vocab_size": len(tokenizer)}
            for part, texts in parts.items():
                _write_lines(unfinished / f"{part}.jsonl", texts)
                statistics[f"{part}_documents"] = len(texts)
                statistics[f"{part}_bytes"] = sum(len(text.encode()) for text in texts)
            (unfinished / "statistics.json").write_text(json.dumps(statistics))
    statistics = json.loads((folder / "statistics.json").read_text())
    return EmbeddedText(
        folder / "train.jsonl", folder / "heldout.jsonl", folder / "tokenizer", **statistics
    )


def _readmes(packages: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The long description of each package that has one, in the form that `docstrings` has."""
    readmes = []
    for package in packages:
        try:
            text = importlib.metadata.metadata(package).json.get("description")
        except importlib.metadata.PackageNotFoundError:
            continue
        if isinstance(text, str):
            readmes.append([(package, text.strip())])
    return readmes


def _documents(modules: Iterable[list[tuple[str, str]]], min_characters: int) -> Iterator[str]:
    """Join the new texts of each module into documents of about DOCUMENT_CHARACTERS at most."""
    seen_texts: set[str] = set()
    seen_lines: set[str] = set()
    for module in modules:
        pieces: list[str] = []
        size = 0
        for name, text in module:
            key = " ".join(text.split())
            if len(text) < min_characters or key in seen_texts:
                continue
            seen_texts.add(key)
            stripped = map(str.strip, text.splitlines())
            lines = [line for line in stripped if len(line) >= TELLING_LINE]
            copied = sum(len(line) for line in lines if line in seen_lines)
            seen_lines.update(lines)
            if 2 * copied > sum(map(len, lines)):
                continue
            if pieces and size + len(text) > DOCUMENT_CHARACTERS:
                yield "\n\n".join(pieces)
                pieces, size = [], 0
            pieces.append(f"{name}\n\n{text}")
            size += len(text)
        if pieces:
            yield "\n\n".join(pieces)


def _up_to(max_bytes: int, documents: Iterable[str], progress: bool) -> list[str]:
    taken: list[str] = []
    size = 0
    units = {"unit": "B", "unit_scale": True}
    with tqdm(None, "reading documentation", max_bytes, disable=not progress, **units) as bar:
        for document in documents:
            taken.append(document)
            size += len(document.encode())
            bar.update(min(size, max_bytes) - bar.n)
            if size >= max_bytes:
                break
    return taken


def _fraction(document: str) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8]) / 2**64


def _train_tokenizer(texts: list[str], vocab_size: int, progress: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress and sys.stderr.isatty(),  # elsewhere it prints blank lines
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def _write_lines(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
