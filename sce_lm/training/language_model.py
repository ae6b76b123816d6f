"""The language-model task: next-token prediction on packed text, exact likelihood on held-out text.

There is one held-out text: the test is on all of it, the validation on as many of its blocks as
`eval_batches` allows, evenly spaced, or on all as well.

A block's first token is context only: nothing predicts it.

Expected calibration error (Guo et al., ICML 2017): tokens fall into equal bins by the model's
confidence, the largest probability of all classes, and

    ECE = sum_b n_b / n · |accuracy_b - mean confidence_b|
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from accelerate import Accelerator
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sce_lm.hf.adapter import last_statistics
from sce_lm.objectives import Statistics
from sce_lm.training.fingerprint import Fingerprint
from sce_lm.training.task import HeldOut, Task, on_device, sum_over_processes
from sce_lm.training.text_blocks import PackedText, document_digests, tokenise
from sce_lm.training.train_config import TrainConfig

CALIBRATION_BINS = 15
"""Bins of the expected calibration error, as in the paper."""


class LanguageModelTask(Task):
    """Next-token prediction on packed text."""

    headline = ("nll",)
    higher_is_better = False

    def __init__(
        self,
        train: Dataset | None,
        held_out: Dataset | PackedText,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        source: dict[str, Fingerprint] | None = None,
    ):
        """`train` are documents with the text in column `config.text_column`, None where nothing is
        trained; `held_out` documents, or the blocks that a run stored; the tokenizer has an
        end-of-text token."""
        self.tokenizer = tokenizer
        self.config = config
        self.source = source or {}
        self.documents, self.held_out_documents = train, held_out
        self.train = self._packed(train, "data") if train is not None else None
        self.num_rows = 0 if self.train is None else len(self.train)
        self.held_out = (
            held_out
            if isinstance(held_out, PackedText)
            else self._packed(held_out, "held-out data")
        )
        self.separate_test = config.eval_batches > 0

    def _packed(self, documents: Dataset, what: str) -> PackedText:
        tokenised = tokenise(documents, self.tokenizer, self.config)
        packed = PackedText(tokenised, self.config.sequence_length)
        if not len(packed):
            raise ValueError(
                f"The {what} has {packed.ends[-1]} tokens in {len(documents)} documents, less than "
                f"one block of sequence_length {self.config.sequence_length}; give more text or a "
                "shorter sequence_length."
            )
        return packed

    def store(self, folder: Path) -> None:
        self.held_out.save(folder / "held_out.arrow")
        found = []
        for documents, is_held_out in ((self.documents, False), (self.held_out_documents, True)):
            assert isinstance(documents, Dataset)
            digest = document_digests(documents, self.config)
            found.append(pl.DataFrame({"digest": digest, "held_out": is_held_out}))
        pl.concat(found).filter(pl.col("digest") != 0).write_parquet(folder / "documents.parquet")

    def describe(self) -> dict[str, Any]:
        assert self.train is not None
        return {
            "training_tokens": int(self.train.ends[-1]),
            "training_blocks": len(self.train),
            "held_out_tokens": int(self.held_out.ends[-1]),
            "held_out_blocks": len(self.held_out),
            "validation_blocks": len(self._held_out_rows("validation")),
            "test_blocks": len(self._held_out_rows("test")),
            "block_length": self.config.sequence_length,
        }

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        assert self.train is not None
        return _blocks(self.train, rows)

    def validation_batch(self) -> dict[str, torch.Tensor]:
        return _blocks(self.held_out, self._spaced(self.config.per_device_batch_size))

    def _held_out_rows(self, on: HeldOut) -> list[int]:
        count = self.config.eval_batches * self.config.per_device_batch_size
        return self._spaced(count if count and on == "validation" else len(self.held_out))

    def _spaced(self, count: int) -> list[int]:
        """So many blocks, evenly spaced over the held-out text."""
        last = len(self.held_out) - 1
        return np.linspace(0, last, min(count, last + 1)).round().astype(int).tolist()

    def evaluate(
        self, model: PreTrainedModel, accelerator: Accelerator, on: HeldOut
    ) -> dict[str, float]:
        """Negative log-likelihood a token in nats (nll), perplexity, top-1 accuracy and expected
        calibration error (ece)."""
        size, rows = self.config.per_device_batch_size, self._held_out_rows(on)
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        own = batches[accelerator.process_index :: accelerator.num_processes]
        # A mixture of experts adds its balancing loss, which is no part of the likelihood.
        options: dict[str, Any] = {"use_cache": False}
        if getattr(model.config, "output_router_logits", False):
            options["output_router_logits"] = False

        totals = torch.zeros(2, dtype=torch.float64)  # nats, tokens
        # By bin of confidence: tokens predicted correctly, and the sum of confidences.
        bins = torch.zeros(2, CALIBRATION_BINS, dtype=torch.float64)
        with torch.no_grad():
            for chosen in tqdm(
                own,
                on,
                delay=2,
                leave=False,
                unit="batch",
                disable=not accelerator.is_main_process,
            ):
                inputs = on_device(_blocks(self.held_out, chosen), accelerator.device)
                tokens = inputs["labels"][:, 1:].numel()
                loss = model(**inputs, **options).loss
                statistics = last_statistics(model)
                assert statistics is not None
                totals += torch.tensor([loss.item() * tokens, tokens], dtype=torch.float64)
                bins += _calibration_bins(statistics)
        nats, tokens = sum_over_processes(accelerator, totals).tolist()
        correct, confidence = sum_over_processes(accelerator, bins)
        nll = nats / tokens
        return {
            "nll": nll,
            "perplexity": math.exp(min(nll, 700.0)),
            "accuracy": correct.sum().item() / tokens,
            "ece": (correct - confidence).abs().sum().item() / tokens,
        }


def _calibration_bins(statistics: Statistics) -> torch.Tensor:
    """``[2, bins]`` tokens predicted correctly, and the sum of confidences."""
    assert statistics.correct is not None
    assert statistics.confidence is not None
    # Where there is no label both are 0.
    values = torch.stack([statistics.correct.flatten(), statistics.confidence.flatten()])
    values = values.cpu().double()
    place = (values[1] * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    return torch.zeros(2, CALIBRATION_BINS, dtype=torch.float64).index_add_(1, place, values)


def _blocks(packed: PackedText, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(np.stack([packed[row] for row in rows]))
    return {"input_ids": tokens, "labels": tokens}
