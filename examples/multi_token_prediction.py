"""Multi-token prediction with one head weight: D predictions a position, one call of the loss.

    python examples/multi_token_prediction.py [--steps 40 --depth 4]

Head k predicts the word k places ahead from a small transform of the hidden state (a residual
layer, as in Medusa; Gloeckle et al. 2024 use a whole block), and all heads share the output
embedding. Their D·N positions go through `sce_lm.sce_loss` in one call, so that they share one
selection of candidates, and exact cross-entropy takes them in one stream. Learns words of the
standard library's documentation, then prints the held-out loss of each head and the time of the
loss against D.
"""

import argparse
import pydoc
import re
import time
from collections.abc import Callable

import torch
from torch import nn

from sce_lm import SCEConfig, SCEState, objectives, sce_loss

MODULES = ["argparse", "collections", "json", "logging", "typing"]
LENGTH, BATCH, WIDTH = 32, 16, 64
CATALOGUE = 50_000
"""Classes of the head whose loss is timed."""


def read_words() -> tuple[torch.Tensor, int]:
    """The documentation of some modules as word numbers [words], and the number of words."""
    text = "\n".join(pydoc.plain(pydoc.render_doc(name)) for name in MODULES)
    words = re.findall(r"\w+|[^\w\s]", text)
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return torch.tensor([numbers[word] for word in words]), len(numbers)


class Heads(nn.Module):
    """D transforms of the hidden states, and the one weight behind all of them."""

    def __init__(self, depth: int, vocabulary: int):
        super().__init__()
        self.transforms = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.weight = nn.Parameter(torch.randn(vocabulary, WIDTH) * WIDTH**-0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [D, ..., d]."""
        silu = nn.functional.silu
        return torch.stack([hidden_states + silu(f(hidden_states)) for f in self.transforms])


class Model(nn.Module):
    """Any model that gives hidden states."""

    def __init__(self, depth: int, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.heads = Heads(depth, vocabulary)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [D, batch, length, d]."""
        return self.heads(self.body(self.embedding(words))[0])


def labels_ahead(words: torch.Tensor, depth: int) -> torch.Tensor:
    """[batch, length] -> [D, batch, length]: the word k places ahead, -100 past the end."""
    ahead = torch.full((depth, *words.shape), -100)
    for k in range(1, depth + 1):
        ahead[k - 1, :, :-k] = words[:, k:]
    return ahead


def train(words: torch.Tensor, vocabulary: int, depth: int, steps: int) -> Model:
    model = Model(depth, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    state = SCEState()
    for _ in range(steps):
        starts = torch.randint(len(words) - 2000 - LENGTH, (BATCH, 1))
        batch = words[starts + torch.arange(LENGTH)]
        loss = sce_loss(
            model(batch),
            model.heads.weight,
            labels_ahead(batch, depth),
            config=SCEConfig(tail_candidates=512),
            state=state,
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def held_out(model: Model, words: torch.Tensor, depth: int) -> list[float]:
    """Exact loss of each head on the last words."""
    text = words[None, -2000:]
    losses = objectives.get("exact")(
        model(text), model.heads.weight, labels_ahead(text, depth), reduction="none"
    )
    return [float(losses[k, :, : -k - 1].mean()) for k in range(depth)]


def time_losses(depths: list[int]) -> None:
    """Seconds of the loss with its gradients, the lesser of two calls."""
    exact = objectives.get("exact")
    losses: dict[str, Callable[..., torch.Tensor]] = {"exact": exact, "SCE": sce_loss}
    hidden_states = torch.randn(256, WIDTH)
    print(f"seconds of the loss, {len(hidden_states)} positions, {CATALOGUE:,} classes")
    print("   D " + "".join(f"{name:>10}" for name in losses))
    for depth in depths:
        heads = Heads(depth, CATALOGUE)
        labels = torch.randint(CATALOGUE, (depth, len(hidden_states)))
        row = f"{depth:4} "
        for loss in losses.values():
            seconds = []
            for _ in range(2):
                inputs = heads(hidden_states).detach().requires_grad_()
                started = time.perf_counter()
                loss(inputs, heads.weight, labels).backward()
                seconds.append(time.perf_counter() - started)
            row += f"{min(seconds):10.3f}"
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description="Multi-token prediction with one head weight.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--depth", type=int, default=4, help="words that are predicted, D")
    options = parser.parse_args()
    torch.manual_seed(0)
    words, vocabulary = read_words()
    print(f"{len(words):,} words, {vocabulary:,} different ones")
    model = train(words, vocabulary, options.depth, options.steps)
    for k, loss in enumerate(held_out(model, words, options.depth), 1):
        print(f"held-out exact loss, {k} ahead: {loss:.3f} nats a word")
    time_losses(sorted({1, 2, options.depth}))


if __name__ == "__main__":
    main()
