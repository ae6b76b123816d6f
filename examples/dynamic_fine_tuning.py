"""Dynamic fine-tuning (arXiv 2508.05629) with SCE: each token's loss weighs its own probability.

    python examples/dynamic_fine_tuning.py [--steps 40]

The weight is detached, so that tokens which the model finds unlikely pull less; on average that is
a policy gradient with reward 1. Reduction "none" gives the losses, whose exp(-loss) are the
probabilities. Weights known before the call go in as `token_weights`, or through a patched model as
`model(..., loss_weights=...)`.
"""

import argparse
import pydoc

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sce_lm import SCEConfig, objectives

LENGTH, BATCH = 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Dynamic fine-tuning with SCE.")
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    text = torch.tensor(list(pydoc.plain(pydoc.render_doc("argparse")).encode()))
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sce = objectives.from_config(SCEConfig(shared_frequent=64, tail_candidates=64))
    exact = objectives.get("exact")

    def losses(objective: objectives.Objective, ids: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
        return objective(hidden, model.lm_head.weight, ids[:, 1:], reduction="none")

    for step in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
        each = losses(sce, text[starts + torch.arange(LENGTH)])
        # The first half is ordinary: from scratch every token is unlikely.
        probability = torch.exp(-each.detach()).clamp(max=1)
        weights = probability if step >= steps // 2 else torch.ones_like(each)
        (weights * each).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        found = losses(exact, text[None, :2000]).flatten()
    print(f"{found.mean():.3f} nats a byte, {found.median():.3f} for half of the bytes")


if __name__ == "__main__":
    main()
