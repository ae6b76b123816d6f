"""Priority sampling (Duffield, Lund, Thorup 2007): m distinct classes, exactly unbiased sums.

    u_j ~ U(0, 1];   r_j = a_j - log u_j;   T = the m largest r;   tau = the (m+1)-th largest r
    c_j = max(0, tau - a_j)                 minus the log of the inclusion probability, given tau
    E[ sum_{j in T} f_j exp(c_j) ] = sum_j f_j         for every f fixed before u is drawn

The sum is right for every f at once, hence for every position that shares the sample. Cut the
classes into tiles, take m_i with a threshold of its own from each, and the sum of the tiles' sums
is just as unbiased: large catalogues are sampled a tile at a time.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from sce_lm.ops.dispatch import Backend, kernels
from sce_lm.ops.static_shapes import needs_static_shapes

TILE = 2**18
"""Classes whose noise is held at a time (2 MiB of fp64)."""


def priority_sample(
    log_proposal: torch.Tensor,
    size: int,
    generator: torch.Generator,
    *,
    tile: int = TILE,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw ``size`` distinct classes and the log-weights that make their sums unbiased.

    Args:
        log_proposal: ``[V]`` fp64, a_j up to a common constant; -inf leaves a class out.
        size: m >= 1; if it reaches the number of classes with a finite ``a``, all of them are
            taken with weight 1. With several tiles each draws in proportion to its share of the
            proposal and at least 1, so that the total may differ from m by the number of tiles.
        generator: source of u, on the device of ``log_proposal``. The uniforms have 53 bits, and
            class j takes the j-th, so that a draw does not depend on which classes are left out.
        tile: classes a tile, on a CPU.
        backend: :data:`~sce_lm.ops.dispatch.Backend`. The kernel has tiles and random numbers of
            its own. It, and static shapes, may leave places empty, with ``c = -inf`` and any id.

    Returns:
        ``[m]`` int64 ids and ``[m]`` log-weights c >= 0, in fp64 (from the kernel in fp32).

    Raises:
        ValueError: backend "triton", and it cannot run.
    """
    run = kernels("priority_sample", backend, log_proposal.device, log_proposal)
    if run is not None:
        return run(log_proposal, size, generator)
    if needs_static_shapes(log_proposal.device):
        return _sample_in_place(log_proposal, min(size, len(log_proposal)), generator)
    available = torch.isfinite(log_proposal)
    if size >= int(available.sum()):
        ids = available.nonzero().squeeze(1)
        return ids, log_proposal.new_zeros(len(ids))
    pieces = log_proposal.split(tile)
    if len(pieces) == 1:
        return _sample_tile(log_proposal, size, generator)
    mass = torch.stack([torch.logsumexp(piece, dim=0) for piece in pieces])
    sizes = (torch.softmax(mass, dim=0) * size).round().clamp_min(1).long().tolist()
    drawn = [_sample_tile(piece, m, generator) for piece, m in zip(pieces, sizes)]
    ids = [found + i * tile for i, (found, _) in enumerate(drawn)]
    return torch.cat(ids), torch.cat([c for _, c in drawn])


def priority_samples(
    log_proposals: torch.Tensor, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample of each row of ``log_proposals [B, V]``, one after another from the same noise.

    Args:
        size: m, at most V. A row must have as many classes with a finite ``a``; where shapes are
            static it may have fewer, and places left over have ``c = -inf`` and any id.

    Returns:
        ``[B, m]`` int64 ids and ``[B, m]`` log-weights c >= 0, as :func:`priority_sample`.
    """
    if needs_static_shapes(log_proposals.device):
        return _sample_in_place(log_proposals, size, generator)
    ids, log_weights = zip(*(_sample_tile(row, size, generator) for row in log_proposals))
    return torch.stack(ids), torch.stack(log_weights)


def _sample_tile(log_proposal, size, generator):
    rank = _ranks(log_proposal, generator)
    finite = torch.isfinite(log_proposal)
    available = int(finite.sum())
    if size >= available:
        return finite.nonzero().squeeze(1), log_proposal.new_zeros(available)
    top = torch.topk(rank, size + 1)
    ids, threshold = top.indices[:size], top.values[size]
    return ids, (threshold - log_proposal[ids]).clamp_min_(0.0)


def _sample_in_place(log_proposal, size, generator):
    """A tile, or rows of them, whose number of classes with a finite ``a`` is not looked at: there
    may be fewer than places."""
    rank, last = _ranks(log_proposal, generator), log_proposal.shape[-1] - 1
    if size > last:
        rank = pad(rank, (0, 1), value=-torch.inf)
    top = torch.topk(rank, size + 1)
    best, threshold = top.values[..., :size], top.values[..., size:]
    ids = top.indices[..., :size].clamp_max(last)
    c = (threshold - log_proposal.gather(-1, ids)).clamp_min_(0.0)
    return ids, c.masked_fill_(best == -torch.inf, -torch.inf)


def _ranks(log_proposal, generator):
    uniform = torch.rand(
        log_proposal.shape, generator=generator, dtype=torch.float64, device=log_proposal.device
    )
    return log_proposal - torch.log1p(-uniform)  # 1 - uniform lies in (0, 1]
