"""Random numbers of one call: a 64-bit seed, and streams that hang on nothing else.

The seed comes from the caller's generator or torch's default CPU generator, so that gradient
checkpointing, which restores that generator, replays a call's draws. Each use of randomness has a
stream of its own, keyed by (seed, data-parallel rank, stream).
"""

from __future__ import annotations

import hashlib

import torch


def draw_seed(generator: torch.Generator | None) -> int:
    """A fresh non-negative 63-bit seed from ``generator`` (CPU) or the default generator."""
    return int(torch.randint(0, 2**63 - 1, (), generator=generator, dtype=torch.int64))


def stream(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Generator on ``device`` for the use ``name`` of the call with this ``seed``, on this rank."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    key = hashlib.blake2b(f"{seed}/{rank}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key, "big") >> 1)
