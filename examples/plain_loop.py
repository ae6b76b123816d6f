"""SCE in a loop of your own, without Trainer or accelerate: two ways, on real text.

    python examples/plain_loop.py [--steps 40]

First a model that is no Hugging Face model: `sce_loss` takes hidden states and the head's weight.
Then a Hugging Face model: after `apply_sce` its own forward returns the loss. Both learn to predict
the next word of the standard library's documentation, and both end with the exact likelihood.
"""

import argparse
import pydoc
import re
from collections.abc import Iterator

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sce_lm import SCEConfig, SCEState, apply_sce, objectives, sce_loss

MODULES = ["argparse", "asyncio", "collections", "email", "json", "logging", "typing", "unittest"]
LENGTH, BATCH, WIDTH = 32, 16, 64


def read_words() -> tuple[torch.Tensor, int]:
    """The documentation of some modules as word numbers [words], and the number of words."""
    text = "\n".join(pydoc.plain(pydoc.render_doc(name)) for name in MODULES)
    words = re.findall(r"\w+|[^\w\s]", text)
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return torch.tensor([numbers[word] for word in words]), len(numbers)


def batches(words: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """`steps` times [BATCH, LENGTH] words from random places."""
    for _ in range(steps):
        starts = torch.randint(len(words) - LENGTH, (BATCH, 1))
        yield words[starts + torch.arange(LENGTH)]


class Recurrent(nn.Module):
    """A model of one's own: what matters is that it can return hidden states."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, vocabulary)

    def hidden_states(self, words: torch.Tensor) -> torch.Tensor:
        return self.body(self.embedding(words))[0]


def train_own_model(words: torch.Tensor, vocabulary: int, steps: int) -> float:
    model = Recurrent(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    state = SCEState()  # counts labels; save it beside your checkpoints
    for batch in batches(words, steps):
        loss = sce_loss(
            model.hidden_states(batch[:, :-1]),
            model.head.weight,
            batch[:, 1:],  # aligned: the label of a position is the next word
            bias=model.head.bias,
            config=SCEConfig(tail_candidates=512),
            state=state,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    exact = objectives.get("exact")
    with torch.no_grad():
        hidden = model.hidden_states(words[None, :2000])
        labels = words[None, 1:2001]
        return exact(hidden, model.head.weight, labels, bias=model.head.bias).item()


def train_hugging_face_model(words: torch.Tensor, vocabulary: int, steps: int) -> float:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = apply_sce(LlamaForCausalLM(config), SCEConfig(tail_candidates=512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for batch in batches(words, steps):
        model(input_ids=batch, labels=batch).loss.backward()  # the model shifts the labels
        optimizer.step()
        optimizer.zero_grad()
    model.eval()  # from here on the loss is the exact one
    with torch.no_grad():
        text = words[None, :2000]
        return model(input_ids=text, labels=text).loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description="SCE in a loop of your own.")
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    words, vocabulary = read_words()
    print(f"{len(words):,} words, {vocabulary:,} different ones")
    print(f"own model:          {train_own_model(words, vocabulary, steps):.3f} nats a word")
    print(
        f"Hugging Face model: {train_hugging_face_model(words, vocabulary, steps):.3f} nats a word"
    )


if __name__ == "__main__":
    main()
