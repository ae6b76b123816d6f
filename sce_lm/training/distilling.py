"""A teacher beside the model that a run trains: a model that is run, or what one stored.

    loss = share · divergence from the teacher + (1 - share) · the run's objective

Both are sums over the positions of a step, divided by their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sce_lm import objectives
from sce_lm.candidates.state import SCEState
from sce_lm.config import SCEConfig
from sce_lm.distillation import STORED_COLUMNS, HeadScores, StoredTopK, distillation_loss
from sce_lm.hf.adapter import apply_sce, lazy_logits
from sce_lm.objectives import Objective
from sce_lm.teacher_folder import TeacherFolder
from sce_lm.training.models import load_model, load_tokenizer
from sce_lm.training.text_blocks import PackedText
from sce_lm.training.train_config import TrainConfig


class RunTeacher:
    """A causal language model in eval mode, patched so that it forms no logits."""

    def __init__(self, model: Any) -> None:
        self.model = apply_sce(model, objectives.get("exact")).eval().requires_grad_(False)

    @property
    def num_bytes(self) -> int:
        """Of its parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def targets(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """What it adds to the batch of these rows: nothing."""
        return {}

    @torch.no_grad()
    def scores(self, inputs: dict[str, torch.Tensor]) -> HeadScores:
        """Of each position that has a next one, ``[rows, length - 1]``."""
        with lazy_logits(self.model):
            outputs = self.model(input_ids=inputs["input_ids"], use_cache=False)
        return HeadScores.of(outputs.logits[:, :-1])


class StoredTeacher:
    """The rows of a folder that `sce-lm teach` wrote."""

    num_bytes = 0

    def __init__(self, folder: TeacherFolder) -> None:
        self.folder = folder

    def targets(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """As of :class:`RunTeacher`."""
        found = self.folder.rows(rows)
        return dict(zip(STORED_COLUMNS, (found.ids, found.log_probs)))

    def scores(self, inputs: dict[str, torch.Tensor]) -> StoredTopK:
        """As of :class:`RunTeacher`; takes the targets out of ``inputs``."""
        stored = self.folder.stored
        ids, log_probs = (inputs.pop(name) for name in STORED_COLUMNS)
        return StoredTopK(ids, log_probs, stored.rest, stored.temperature)


class Distillation:
    """The loss of a run that has a teacher."""

    def __init__(
        self, teacher: RunTeacher | StoredTeacher, config: TrainConfig, objective: Objective
    ) -> None:
        self.teacher, self.share = teacher, config.teacher_share
        sampled = objective.config if isinstance(objective.config, SCEConfig) else SCEConfig()
        self.state = SCEState() if config.teacher_sampled else None
        self.options: dict[str, Any] = {
            "divergence": config.teacher_divergence,
            "temperature": config.teacher_temperature,
            "beta": config.teacher_beta,
            "objective": sampled if config.teacher_sampled else "exact",
            "state": self.state,
        }

    def targets(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """What the teacher adds to the batch of these training rows, on the CPU."""
        return self.teacher.targets(rows)

    def __call__(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items: torch.Tensor
    ) -> torch.Tensor:
        """The sum over the positions of a batch, divided by ``num_items``."""
        theirs, own = self.teacher.scores(inputs), 0.0
        labels = inputs["labels"]
        if self.share < 1.0:
            outputs = model(**inputs, num_items_in_batch=num_items, use_cache=False)
            own = (1.0 - self.share) * outputs.loss
        else:
            with lazy_logits(model):
                outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        ours = HeadScores.of(outputs.logits[:, :-1])
        if isinstance(theirs, HeadScores):  # heads may be padded differently
            classes = min(len(ours.weight), len(theirs.weight))
            ours, theirs = first_classes(ours, classes), first_classes(theirs, classes)
        divergence = distillation_loss(
            ours, theirs, labels[:, 1:], num_items_in_batch=num_items, **self.options
        )
        return self.share * divergence + own


def first_classes(scores: HeadScores, number: int) -> HeadScores:
    """Without the classes behind, which are no tokens; the same if there are none."""

    def first(part: torch.Tensor | None) -> Any:
        return None if part is None else part[:number]

    bias, low_rank = first(scores.bias), first(scores.low_rank)
    return replace(scores, weight=first(scores.weight), bias=bias, low_rank=low_rank)


def load_teacher(source: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> RunTeacher:
    """A model to be run, over the tokens of the run.

    Args:
        source: hub id or folder.
        tokenizer: the run's.
        options: of :func:`~sce_lm.training.models.load_model`.

    Raises:
        ValueError: there is no model or no tokenizer, or its tokens are others.
    """
    own: Any = load_tokenizer(source)
    files = {"tokenizer.json", *own.vocab_files_names.values()}
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in files):
        raise ValueError(
            f"The teacher {source!r} has no tokenizer beside it, so nothing says which tokens its "
            "classes are; put the tokenizer that it was trained with there."
        )
    ours, theirs = tokenizer.get_vocab(), own.get_vocab()
    if ours != theirs:
        differing = len(ours.items() ^ theirs.items())
        raise ValueError(
            f"The teacher {source!r} has {len(theirs)} tokens and the run {len(ours)}, and "
            f"{differing} of them are not the same under the same number; choose a teacher with "
            "the run's tokenizer."
        )
    model = load_model(source, **options)
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if rows < len(tokenizer):
        raise ValueError(
            f"The teacher {source!r} has {rows} token embeddings and the tokenizer "
            f"{len(tokenizer)} tokens; every token needs a row."
        )
    return RunTeacher(model)


def stored_teacher(source: str, text: PackedText, config: TrainConfig) -> StoredTeacher:
    """What `sce-lm teach` stored of these blocks.

    Raises:
        ValueError: it is of another text or temperature, or not complete.
    """
    folder = TeacherFolder.read(source)
    stored, missing = folder.stored, folder.missing()
    if stored.text != text.key or stored.rows != len(text):
        raise ValueError(
            f"The teacher in {source} was stored for other blocks of text than this run trains on "
            f"({stored.rows} of them; here are {len(text)}); call sce-lm teach with the data, "
            "tokenizer, sequence_length, held-out text and seed of this run."
        )
    if missing:
        raise ValueError(
            f"The teacher in {source} lacks {len(missing)} of its {stored.parts} parts; the "
            "command that wrote it goes on with them."
        )
    if stored.temperature != config.teacher_temperature:
        raise ValueError(
            f"teacher_temperature is {config.teacher_temperature} and the teacher in {source} was "
            f"stored at {stored.temperature}; use that one."
        )
    return StoredTeacher(folder)
