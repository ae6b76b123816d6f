"""XIR's cache: what its draws have met, how the next cache is drawn, one for all processes.

The memory of an :class:`~sce_lm.candidates.state.SCEState` holds two things:

    occurrences [V]     1 at first, plus how often each class has been drawn since
    drawn [D]           the classes that the latest call has drawn, some perhaps several times

A cache is drawn with replacement in proportion to the occurrences, of all classes or of those drawn
by the latest call alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from sce_lm.candidates.distinct import distinct
from sce_lm.candidates.proposals import Categorical
from sce_lm.candidates.state import SCEState
from sce_lm.ops.static_shapes import needs_static_shapes

OCCURRENCES, DRAWN = "occurrences", "drawn"


class Cache(NamedTuple):
    """One call's cache, over the classes that it holds and those that the caller asked about."""

    ids: torch.Tensor
    """``[U]`` as :func:`~sce_lm.candidates.distinct.distinct` gives them."""
    counts: torch.Tensor
    """``[U]`` how often the cache holds each; 0 for some that were asked about."""
    asked: torch.Tensor
    """``[U]`` how often it was asked about each."""
    q: torch.Tensor
    """``[U]`` fp64 probability of each in one draw of the cache."""


def draw_cache(
    state: SCEState,
    size: int,
    asked: torch.Tensor,
    generator: torch.Generator,
    vocab_size: int,
    *,
    among_drawn: bool,
    is_asked: torch.Tensor | None = None,
    left_out: torch.Tensor | None = None,
) -> Cache:
    """A cache of ``size`` draws.

    Args:
        asked: ``[n]`` ids of further classes whose probability is wanted, perhaps repeated.
        among_drawn: take only classes that the latest call drew (any, before the first call).
        is_asked: ``[n]`` bool: which of these count; None: all.
        left_out: ``[M]`` ids of classes that the cache may not hold; None: it may hold any.
    """
    occurrences = occurrences_of(state, vocab_size, asked.device)
    if left_out is not None:
        occurrences = occurrences.index_fill(0, left_out, 0.0)
    if among_drawn and DRAWN in state.memory:
        drawn = state.memory[DRAWN].to(asked.device)
        occurrences = torch.zeros_like(occurrences).index_copy_(0, drawn, occurrences[drawn])
    proposal = Categorical(occurrences.log())
    held = proposal.draw((size,), generator)
    is_there = None if is_asked is None else pad(is_asked, (size, 0), value=True)
    ids, occurs, is_spare = distinct(torch.cat([held, asked]), vocab_size, is_there)
    in_cache = asked.new_zeros(vocab_size).index_add_(0, held, torch.ones_like(held))[ids]
    in_asked = occurs - in_cache
    if is_spare is not None:
        in_cache, in_asked = (n.masked_fill(is_spare, 0) for n in (in_cache, in_asked))
    return Cache(ids, in_cache, in_asked, proposal.log_prob(ids).exp())


def record_draws(
    state: SCEState, ids: torch.Tensor, draws: torch.Tensor, vocab_size: int, decay: float
) -> None:
    """Add a call's draws of each class to the occurrences, which fade by ``decay`` a call first.

    Args:
        ids: ``[U]`` classes.
        draws: ``[U]`` how often each was drawn, over all positions.
        decay: 1 keeps everything; below 1 what a class holds beyond its first 1 fades.
    """
    occurrences = occurrences_of(state, vocab_size, ids.device)
    if decay < 1.0:
        occurrences = 1.0 + decay * (occurrences - 1.0)
    state.memory[OCCURRENCES] = occurrences.index_add(0, ids, draws.to(torch.float64))
    if needs_static_shapes(ids.device):  # one of them stands for those that were not drawn
        one = ids.index_select(0, draws.argmax(dim=0, keepdim=True))
        state.memory[DRAWN] = torch.where(draws > 0, ids, one)
    else:
        state.memory[DRAWN] = torch.unique(ids[draws > 0])


def merge_occurrences(state: SCEState, device: torch.device) -> None:
    """Give every process the mean of all processes' occurrences, so that their caches are drawn
    from what all of them have met. To be called by every process once an optimiser step, also by
    those that had no labels; without a process group nothing happens.

    Two collectives: the size of the catalogue, which a process without labels does not know yet,
    and ``[V]`` fp64 numbers.

    Args:
        device: where the process group communicates.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    mine = state.memory.get(OCCURRENCES)
    size = torch.tensor(0 if mine is None else len(mine), device=device)
    torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MAX)
    if size == 0:
        return
    total = occurrences_of(state, int(size), device).clone()
    torch.distributed.all_reduce(total)
    state.memory[OCCURRENCES] = total / torch.distributed.get_world_size()


def occurrences_of(state: SCEState, vocab_size: int, device: torch.device) -> torch.Tensor:
    """``[V]`` fp64, not to be written into.

    Raises:
        ValueError: the state's cache is over another catalogue.
    """
    if OCCURRENCES not in state.memory:
        return torch.ones(vocab_size, dtype=torch.float64, device=device)
    occurrences = state.memory[OCCURRENCES]
    if len(occurrences) != vocab_size:
        raise ValueError(
            f"this SCEState has a cache over {len(occurrences)} classes but weight has "
            f"{vocab_size} rows; load the state that was saved with this model."
        )
    return occurrences.to(device)
