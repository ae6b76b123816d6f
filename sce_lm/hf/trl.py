"""`SCESFTTrainer`: TRL's SFTTrainer with the model's objective as its training loss.

TRL computes exact log-probabilities in a fused head of its own and takes its loss and its metrics
from those, whatever loss the model has. Here the training loss is the model's. The metrics that
need the whole softmax, entropy and token accuracy, are exact on a sample of the batch's positions;
evaluation is TRL's own, exact on all of them. TRL is no dependency: ``pip install trl``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer
from trl import SFTTrainer  # pyright: ignore

from sce_lm.hf.adapter import objective_of
from sce_lm.hf.lazy_logits import LazyLogits

PROBED_POSITIONS = 256
"""Positions of a micro-batch on whose whole softmax the training metrics are computed."""


class SCESFTTrainer(SFTTrainer):  # pyright: ignore
    """``SFTTrainer`` for a model that :func:`~sce_lm.apply_sce` patched; its arguments are TRL's.

    Packing, completion-only and assistant-only loss, PEFT and accumulation are as in TRL, since
    they come with the labels.

    Raises:
        ValueError: the model is not patched, or the loss is not the negative log-likelihood.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        loss_type = getattr(self.args, "loss_type", "nll")
        if objective_of(model) is None:
            raise ValueError(
                f"this {type(model).__name__} has no objective; call apply_sce(model, ...) first "
                "and pass that model, or use TRL's SFTTrainer."
            )
        if loss_type != "nll":
            raise ValueError(
                f"loss_type is {loss_type!r}, which weighs exact probabilities; use "
                'loss_type="nll", or TRL\'s SFTTrainer.'
            )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The model's own loss in training; TRL's in evaluation."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        result: Any = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        loss, outputs = result
        self._record_metrics(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _record_metrics(self, inputs: dict[str, Any], outputs: Any) -> None:
        """What TRL logs beside the loss, under its names."""
        trl: Any = self  # TRL's own attributes
        metrics, gather = trl._metrics["train"], trl.accelerator.gather_for_metrics
        sums = gather(_probe(outputs.logits, inputs["labels"], trl.state.global_step)[None])
        entropy, correct, probed = sums.sum(dim=0).tolist()
        metrics["entropy"].append(entropy / max(probed, 1))
        metrics["mean_token_accuracy"].append(correct / max(probed, 1))
        if "attention_mask" in inputs:
            tokens = inputs["attention_mask"].sum()
        else:  # sequences without padding in one row
            tokens = torch.tensor(inputs["position_ids"].size(1), device=sums.device)
        trl._total_train_tokens += int(gather(tokens).sum()) // trl._tp_size
        metrics["num_tokens"] = [trl._total_train_tokens]
        if trl.aux_loss_enabled:
            metrics["aux_loss"].append(gather(outputs.aux_loss).mean().item())


def _probe(logits: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.Tensor:
    """``[3]`` sums over sampled positions that have a label: entropy, top class is right, one."""
    # PEFT's prompt tuning puts virtual tokens before those of the batch; they have no labels.
    labels = nn.functional.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=-100)
    logits, labels = logits[:, :-1], labels[:, 1:].contiguous().to(logits.device)
    labelled = (labels != -100).flatten().nonzero().squeeze(1)
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask.view(-1)[labelled[order[:PROBED_POSITIONS].to(labelled.device)]] = True
    log_p = _rows(logits[mask]).float().log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum()
    correct = (log_p.argmax(dim=-1) == labels[mask]).sum()
    return torch.stack([entropy, correct.float(), mask.sum().float()])


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """``[n, V]``: of unformed logits only these rows are formed."""
    post = logits.transform if isinstance(logits, LazyLogits) else None
    if not isinstance(logits, LazyLogits) or post is None:
        return logits
    raw, added = logits.head(logits.hidden_states), logits.with_added_bias(None)
    return post(raw if added is None else raw + added)
