"""RECE: reduced cross-entropy (Gusak, Mezentsev et al., CIKM 2024, arXiv 2408.02354).

In each round random directions hash positions and classes (argmax of the inner products); both are
sorted by hash and cut into equal chunks, and a position meets the classes of its own chunk and of
``extra_chunks`` neighbours on either side. The softmax runs over the union of all rounds and the
label; a class met in k rounds counts once, which the published code reaches by ``-log k`` on each
of its k logits. Every position is trained, with another part of the catalogue each time; Zhat is a
lower bound of Z.

    n_b = sqrt(4 · buckets_per_chunk · min(N, V) · (1 + 2·extra_chunks))
    chunks = n_b / buckets_per_chunk

The code pads positions and catalogue with zero rows to a multiple of n_b, which fill places of the
first chunks; here chunks are as equal as the numbers allow. A bias is part of the logits and not of
the hash, since the paper has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sce_lm.candidates.hashing import hash_chunks
from sce_lm.config import SoftmaxConfig, check_count
from sce_lm.objectives.base import Statistics
from sce_lm.objectives.call import Call
from sce_lm.objectives.sampled_objective import SampledObjective
from sce_lm.ops.chunk_cross_entropy import Chunks, chunk_cross_entropy
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions


@dataclass(frozen=True)
class RECEConfig(SoftmaxConfig):
    """Configuration of RECE. Raises ValueError for a value out of range."""

    num_buckets: int | Literal["auto"] = "auto"
    """n_b, random directions of a round; "auto": the formula above."""

    buckets_per_chunk: int = 1
    """Buckets for each chunk: the number of chunks is n_b over this."""

    extra_chunks: int = 1
    """Neighbouring chunks on either side whose classes a position also meets."""

    rounds: int = 1
    """Independent hashes whose chunks are united."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "num_buckets", auto=True)
        check_count(self, "buckets_per_chunk")
        check_count(self, "extra_chunks", low=0)
        check_count(self, "rounds")
        if self.num_buckets != "auto" and self.buckets_per_chunk > self.num_buckets:
            raise ValueError(
                f"RECEConfig: buckets_per_chunk={self.buckets_per_chunk} is more than "
                f"num_buckets={self.num_buckets}; give at least one chunk its buckets."
            )

    def resolve(self, num_positions: int, vocab_size: int) -> tuple[int, int]:
        """Directions and chunks of a round; never more chunks than positions or classes."""
        smaller = min(num_positions, vocab_size)
        buckets = self.num_buckets
        if buckets == "auto":
            met = 1 + 2 * self.extra_chunks
            buckets = max(1, round(math.sqrt(4 * self.buckets_per_chunk * smaller * met)))
        return buckets, max(1, min(buckets // self.buckets_per_chunk, smaller))


class RECE(SampledObjective):
    """Reduced cross-entropy by a :class:`RECEConfig`."""

    name = "rece"
    config_class = RECEConfig
    config: RECEConfig

    def has_static_shapes(self, head: Head) -> bool:
        return True

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        num_positions = len(positions)
        chunks = self._chunks(head, positions, call.stream("directions"))
        loss = chunk_cross_entropy(head, positions, chunks, backend=call.backend)
        buckets, count = self.config.resolve(num_positions, head.num_classes)
        met = min(1.0, (1 + 2 * chunks.reach) / count) * head.num_classes
        products = self.config.rounds * (met + buckets * (1 + head.vocab_size / num_positions))
        return loss, self.statistics(
            positions, call, products, ids=None, candidates=self.config.rounds * met
        )

    @torch.no_grad()
    def _chunks(self, head: Head, positions: Positions, generator: torch.Generator) -> Chunks:
        hidden = positions.hidden
        num_positions, width = hidden.shape
        buckets, count = self.config.resolve(num_positions, head.num_classes)
        nowhere = count + self.config.extra_chunks  # a chunk that no position reaches
        dtype = compute_dtype(hidden, head.weight)
        classes = [part for part in (head.weight, head.low_rank) if part is not None]
        chunks = []
        for _ in range(self.config.rounds):
            directions = torch.randn(
                buckets, width, generator=generator, device=generator.device, dtype=dtype
            )
            chunks.append(
                [
                    hash_chunks([hidden], directions, count, is_valid=positions.is_valid),
                    hash_chunks(classes, directions, count, head.kept, nowhere),
                ]
            )
        of_position, of_class = (torch.stack(rounds) for rounds in zip(*chunks))
        return Chunks(of_position, of_class, count, self.config.extra_chunks)
