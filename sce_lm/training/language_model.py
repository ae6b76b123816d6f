"""The language-model task: next-token prediction on packed text, exact likelihood on held-out text.

A block's first token is context only: nothing predicts it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sce_lm.hf.adapter import last_statistics
from sce_lm.training.config import TrainConfig
from sce_lm.training.task import Task, on_device, sum_over_processes
from sce_lm.training.text import PackedText, tokenise


class LanguageModelTask(Task):
    """Next-token prediction on packed text."""

    headline = ("nll",)
    higher_is_better = False

    def __init__(
        self,
        train: Dataset,
        held_out: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
    ):
        """Args: train, held_out: documents, with the text in column `config.text_column`."""
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} has no end-of-text token, which is put "
                "between documents; give it an eos_token, or choose another tokenizer."
            )
        self.tokenizer = tokenizer
        self.config = config
        self.train = self._packed(train, "data")
        self.held_out = self._packed(held_out, "held-out data")
        self.num_rows = len(self.train)
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

    def describe(self) -> dict[str, Any]:
        return {
            "training_tokens": int(self.train.ends[-1]),
            "training_blocks": len(self.train),
            "held_out_tokens": int(self.held_out.ends[-1]),
            "held_out_blocks": len(self.held_out),
            "block_length": self.config.sequence_length,
        }

    def batch(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return _blocks(self.train, rows)

    def evaluate(
        self, model: PreTrainedModel, accelerator: Accelerator, *, final: bool
    ) -> dict[str, float]:
        """Negative log-likelihood a token in nats (nll), perplexity and top-1 accuracy.

        Where `eval_batches` bounds the evaluation, blocks evenly spaced over the held-out text are
        used; a final one takes all.
        """
        size, blocks = self.config.per_device_batch_size, len(self.held_out)
        if self.config.eval_batches and not final:
            blocks = min(blocks, self.config.eval_batches * size)
        rows = np.linspace(0, len(self.held_out) - 1, blocks).round().astype(int).tolist()
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        # A mixture of experts adds its balancing loss, which is no part of the likelihood.
        options: dict[str, Any] = {"use_cache": False}
        if getattr(model.config, "output_router_logits", False):
            options["output_router_logits"] = False

        totals = torch.zeros(3, dtype=torch.float64)  # nats, tokens, tokens predicted correctly
        with torch.no_grad():
            for chosen in batches[accelerator.process_index :: accelerator.num_processes]:
                inputs = on_device(_blocks(self.held_out, chosen), accelerator.device)
                tokens = inputs["labels"][:, 1:].numel()
                loss = model(**inputs, **options).loss
                statistics = last_statistics(model)
                assert statistics is not None
                assert statistics.correct is not None
                correct = statistics.correct.sum()
                totals += torch.tensor([loss.item() * tokens, tokens, correct.item()])
        nats, tokens, correct = sum_over_processes(accelerator, totals).tolist()
        nll = nats / tokens
        return {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "accuracy": correct / tokens}


def _blocks(packed: PackedText, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(np.stack([packed[row] for row in rows]))
    return {"input_ids": tokens, "labels": tokens}
