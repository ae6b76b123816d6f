r"""Priority sample of a catalogue, a slab of classes a program, noise made on chip.

    r_j = a_j - log u_j;   T = the m largest r of a slab;   tau = its (m+1)-th
    c_j = max(0, tau - a_j)

is exactly unbiased in each slab (:mod:`sce_lm.candidates.priority`), so slabs need not speak to one
another and the catalogue is read once. ``u_j`` comes from Philox with the call's seed as key and
(class, rank of the process) as counter: the same seed draws the same sample, whatever the launch,
and no ``[V]`` noise exists. Slabs hold equal shares of the proposal, so each draws the same number
of classes and no count has to come back from the device. A program keeps its best candidates as
int64 keys, ``r`` above the class, in a list sorted on chip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sce_lm.ops.triton.configurations import configuration

DRAWS = 16
"""Most classes that a slab draws."""
KEEP = 32
"""Candidates that a program keeps: more than ``DRAWS``, a power of two."""


@triton.jit
def uniform(seed, item, rank):
    """u_j in (0, 1] from 32 random bits."""
    zero = tl.zeros_like(item)
    bits, _, _, _ = tl.philox(seed, item, zero + rank, zero, zero)
    return (bits.to(tl.float32) + 1.0) * (1.0 / 4294967296.0)


@triton.jit
def to_key(r, item):
    """int64 in the order of r, with the class in its low half."""
    bits = r.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | item.to(tl.int64)


@triton.jit
def from_key(key):
    """The r of a key."""
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def tail_sample_kernel(
    log_proposal,
    bounds,
    ids_out,
    log_weights_out,
    seed,
    rank,
    size,
    num_slabs,
    KEEP: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    slab = tl.program_id(0)
    start = tl.load(bounds + slab).to(tl.int32)
    end = tl.load(bounds + slab + 1).to(tl.int32)
    nothing = tl.full([1], -(2**63), tl.int64)
    best = tl.broadcast_to(nothing, [KEEP])
    for first in range(start, end, BLOCK_COLUMNS):
        item = first + tl.arange(0, BLOCK_COLUMNS)
        a = tl.load(log_proposal + item, mask=item < end, other=float("-inf"))
        key = to_key(a - tl.log(uniform(seed, item, rank)), item)
        key = tl.where(a > float("-inf"), key, nothing)
        both = tl.join(best, tl.topk(key, KEEP))
        best = tl.topk(tl.reshape(both, [2 * KEEP]), KEEP)

    draws = size // num_slabs + (slab < size % num_slabs).to(tl.int32)
    place = tl.arange(0, KEEP)
    found = best != nothing
    is_draw = place < draws
    # Where the slab has no (m+1)-th candidate all are taken, with weight 1.
    after = (place == draws) & found
    tau = tl.max(tl.where(after, from_key(best), float("-inf")), axis=0)
    item = (best & 0xFFFFFFFF).to(tl.int32)  # pyright: ignore[reportOperatorIssue]
    item = tl.where(found, item, 0)
    a = tl.load(log_proposal + item, mask=found & is_draw, other=0.0)
    c = tl.where(found, tl.maximum(tau - a, 0.0), float("-inf"))
    out = slab * (size // num_slabs) + tl.minimum(slab, size % num_slabs) + place
    tl.store(ids_out + out, item.to(tl.int64), mask=is_draw)
    tl.store(log_weights_out + out, c, mask=is_draw)


def tail_sample(
    log_proposal: torch.Tensor, size: int, seed: int, rank: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw ``size`` distinct classes and the log-weights that make their sums unbiased.

    Args:
        log_proposal: ``[V]`` a_j up to a common constant, fixed before the seed was drawn; -inf
            leaves a class out.
        size: m >= 1.
        seed: fresh 63-bit seed of the call.
        rank: of the process, so that data-parallel ranks draw their own samples.

    Returns:
        ``[m]`` int64 ids and ``[m]`` fp32 log-weights c >= 0. A slab with fewer classes than its
        draws takes all; a place left over has ``c = -inf`` and any id.
    """
    log_proposal = log_proposal.float().contiguous()
    num_slabs = triton.cdiv(size, DRAWS)
    mass = (log_proposal - log_proposal.amax()).double().exp().cumsum(0)
    edges = torch.arange(1, num_slabs, device=mass.device) * (mass[-1] / num_slabs)
    bounds = torch.nn.functional.pad(torch.searchsorted(mass, edges), (1, 1))
    bounds[-1] = len(log_proposal)
    ids = torch.empty(size, dtype=torch.int64, device=mass.device)
    log_weights = torch.empty(size, dtype=torch.float32, device=mass.device)
    blocks = configuration("tail_sample", log_proposal)
    blocks.launch(
        tail_sample_kernel,
        (num_slabs,),
        log_proposal,
        bounds,
        ids,
        log_weights,
        seed,
        rank,
        size,
        num_slabs,
        KEEP=KEEP,
    )
    return ids, log_weights
