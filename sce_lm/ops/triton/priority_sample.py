r"""Priority sample of a catalogue, a slab of classes a program, noise made on chip.

    r_j = a_j - log u_j;   T = the m largest r of a slab;   tau = its (m+1)-th
    c_j = max(0, tau - a_j)

is exactly unbiased in each slab (:mod:`sce_lm.candidates.priority`), so slabs need not speak to one
another and the catalogue is read once. ``u_j`` comes from Philox with a seed as key and the class
as counter: the same seed draws the same sample, whatever the launch, and no ``[V]`` noise exists.
A program keeps its best candidates as int64 keys, ``r`` above the class, in a list sorted on chip.

Every slab draws the same number of classes, so that no count has to come back from the device. For
that to be as good as one sample of all classes, slabs hold equal shares of the expected draws,
``min(1, t·q_j)`` with ``q = exp a``, and not of q: a class that is certain anyway fills one place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sce_lm.ops.triton.configurations import configuration
from sce_lm.ops.triton.supported import device_supported

DRAWS = 16
"""Most classes that a slab draws."""
NOTHING = 1e-290
"""Mass that stands for none, so that nothing is divided by 0."""
KEEP = 32
"""Candidates that a program keeps: more than ``DRAWS``, a power of two."""


@triton.jit
def uniform(seed, item):
    """u_j in (0, 1] from 32 random bits."""
    zero = tl.zeros_like(item)
    bits, _, _, _ = tl.philox(seed, item, zero, zero, zero)
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
def priority_sample_kernel(
    log_proposal,
    bounds,
    ids_out,
    log_weights_out,
    seed,
    size,
    num_slabs,
    KEEP: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    slab = tl.program_id(0)
    start = tl.load(bounds + slab).to(tl.int32)
    end = tl.load(bounds + slab + 1).to(tl.int32)
    key_of_call = tl.load(seed)
    nothing = tl.full([1], -(2**63), tl.int64)
    best = tl.broadcast_to(nothing, [KEEP])
    for first in range(start, end, BLOCK_COLUMNS):
        item = first + tl.arange(0, BLOCK_COLUMNS)
        a = tl.load(log_proposal + item, mask=item < end, other=float("-inf"))
        key = to_key(a - tl.log(uniform(key_of_call, item)), item)
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


def priority_sample_supported(log_proposal: torch.Tensor) -> str | None:
    """Why the kernel cannot take these inputs; None if it can."""
    if len(log_proposal) >= 2**31:
        return f"{len(log_proposal)} classes do not fit an int32 id"
    return device_supported(log_proposal.device)


def priority_sample(
    log_proposal: torch.Tensor, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw ``size`` distinct classes and the log-weights that make their sums unbiased.

    Args:
        log_proposal: ``[V]`` a_j up to a common constant, fixed before the noise is drawn; -inf
            leaves a class out.
        size: m >= 1; if it reaches the number of classes with a finite ``a``, all of them are
            taken with weight 1.
        generator: source of the seed, on the device of ``log_proposal``.

    Returns:
        ``[m]`` int64 ids and ``[m]`` fp32 log-weights c >= 0. A slab with fewer classes than its
        draws takes all; a place left over has ``c = -inf`` and any id.
    """
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=log_proposal.device)
    return _sample(log_proposal, size, seed)


@torch.library.custom_op("sce_lm::priority_sample", mutates_args=())
def _sample(log_proposal: Tensor, size: int, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the ``[1]`` int64 seed itself."""
    num_slabs = triton.cdiv(size, DRAWS)
    slab = torch.arange(num_slabs, device=seed.device)
    draws = size // num_slabs + (slab < size % num_slabs)
    mass = expected_draws(torch.softmax(log_proposal.double(), dim=0), size).cumsum(0)
    edges = draws.cumsum(0) * (mass[-1] / size)
    bounds = torch.nn.functional.pad(torch.searchsorted(mass, edges, right=True), (1, 0))
    bounds[-1] = len(log_proposal)
    ids = torch.empty(size, dtype=torch.int64, device=seed.device)
    log_weights = torch.empty(size, dtype=torch.float32, device=seed.device)
    log_proposal = log_proposal.float().contiguous()
    blocks = configuration("priority_sample", log_proposal)
    blocks.launch(
        priority_sample_kernel,
        (num_slabs,),
        log_proposal,
        bounds,
        ids,
        log_weights,
        seed,
        size,
        num_slabs,
        KEEP=KEEP,
    )
    return ids, log_weights


@_sample.register_fake
def _(log_proposal, size, seed):
    ids = log_proposal.new_empty(size, dtype=torch.int64)
    return ids, torch.empty_like(ids, dtype=torch.float32)


def expected_draws(q: torch.Tensor, size: int) -> torch.Tensor:
    """``min(1, t·q_j)``, which sum to ``size``, or all 1 if there are no more classes.

    With the k largest certain the others need ``t_k = (m - k) / sum_{i >= k} q_i``. That rises with
    k for as long as the next one would be certain too, and falls from there: t is the largest.
    """
    top = torch.topk(q, min(size, len(q))).values
    rest = (q.sum() - top.sum()).clamp_min(NOTHING)
    after = rest + top.flip(0).cumsum(0)  # of the last k first
    left = torch.arange(size - len(top) + 1, size + 1, dtype=q.dtype, device=q.device)
    # Rounding must not keep a class that is certain below 1.
    return (q * ((left / after).amax() * (1 + 1e-6))).clamp_max(1.0)
