"""Models that mask padded classes of their logits before the loss."""

import pytest
import torch
from support.models import tiny_batch, tiny_model
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from sce_lm import SCEConfig, apply_sce
from sce_lm.hf.lazy_logits import RecordedLogits

SEEN = 20
"""Classes from the end that are masked."""


def add(logits, value):
    mask = torch.zeros(logits.shape[-1])
    mask[-SEEN:] = value
    return logits + mask


def fill(logits, value):
    is_padding = torch.arange(logits.shape[-1]) >= logits.shape[-1] - SEEN
    return logits.masked_fill(is_padding, value)


def write(logits, value):
    logits[..., -SEEN:] = value
    return logits


class Masked(LlamaForCausalLM):
    """A Llama whose forward masks its last classes, as checkpoints with padded vocabularies do."""

    def forward(self, input_ids, labels=None, **options):
        hidden = self.model(input_ids).last_hidden_state
        logits = self.how(self.lm_head(hidden), self.value)
        self.was_formed = not isinstance(logits, RecordedLogits) or logits.is_materialised
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("how", [add, fill, write])
@pytest.mark.parametrize("value", [-1e4, torch.finfo(torch.float32).min, -torch.inf])
def test_losses_and_gradients_are_those_of_the_masked_model(how, value):
    """A vector that is added is a bias of the loss; other masks form the logits."""
    model = Masked(tiny_model("llama", num_hidden_layers=1).config)
    model.how, model.value = how, value
    batch = tiny_batch(batch=2, length=9)
    batch["labels"] = batch["labels"].clamp_max(model.config.vocab_size - SEEN - 1)
    results = []
    for config in (None, SCEConfig(control_variate=True)):  # whose lists hold so few classes
        if config is not None:
            apply_sce(model, config)
        model.zero_grad()
        loss = model(batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters())])
    assert model.was_formed == (how is not add)
    assert results[0][0].isfinite()
    for stock, ours in zip(*results):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)
    assert model.lm_head.weight.grad[-SEEN:].eq(0).all()
