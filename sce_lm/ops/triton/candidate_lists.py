"""Candidate lists, as the kernels see them: columns, and the positions that use them.

A list holds ``K`` columns for each of ``L`` segments of positions. The shared list and the tail
have one segment with all positions, as they stand; the buckets' lists have a segment a bucket, of
any size; the whole catalogue is a list whose columns are the classes themselves. Positions of
several segments are visited in an ``order`` in which segments are contiguous, and each tile of
positions lies in one segment. The number of tiles depends on N and L alone, not on how positions
fall into segments, so that nothing waits for the device: surplus tiles are empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from sce_lm.ops.static_shapes import needs_static_shapes


@dataclass(frozen=True)
class CandidateList:
    """Columns of ``L`` segments of positions."""

    num_columns: int
    """K."""
    ids: torch.Tensor | None
    """``[L, K]`` int64 classes; None: column j is class j."""
    num_positions: int
    """N."""
    order: torch.Tensor | None = None
    """``[N]`` int64: positions, segment after segment; None: there is one segment."""
    bounds: torch.Tensor | None = None
    """``[L + 1]`` int64: where segments start in ``order``."""
    log_weights: torch.Tensor | None = None
    """``[R, K]`` fp32, -inf leaves a column out; None: all 0."""
    weight_row: torch.Tensor | None = None
    """``[N]`` int64: each position's row of ``log_weights``; None: its segment."""
    kind: Literal["shared", "tail", "bucket", "catalogue"] = "shared"
    """What the columns are. A tail is a sample of the rest R: the control variate applies."""
    _tiles: dict[int, PositionTiles] = field(default_factory=dict, compare=False)

    @property
    def num_segments(self) -> int:
        return 1 if self.bounds is None else len(self.bounds) - 1

    @property
    def num_slots(self) -> int:
        """Columns of all segments."""
        return self.num_segments * self.num_columns

    def tiles(self, block: int) -> PositionTiles:
        """Tiles of at most ``block`` positions: ``T = ceil(N / block) + L - 1`` hold them all."""
        if block not in self._tiles:
            self._tiles[block] = _cut(self, block)
        return self._tiles[block]


class PositionTiles(NamedTuple):
    """Tiles of positions, each of one segment."""

    count: int
    """T."""
    segment: torch.Tensor | None
    """``[T]`` int64; None: there is one."""
    start: torch.Tensor | None
    """``[T]`` int64: first place in ``order``; a surplus tile starts at the segment's end."""


@triton.jit
def positions_of_tile(
    order, bounds, tile_segment, tile_start, tile, num_positions, BLOCK_POSITIONS: tl.constexpr
):
    """(segment, end of its places, places of the tile, positions there); lanes at places behind the
    end hold position 0."""
    if order is not None:
        segment = tl.load(tile_segment + tile)
        start = tl.load(tile_start + tile)
        end = tl.load(bounds + segment + 1)
        place = start + tl.arange(0, BLOCK_POSITIONS)
        position = tl.load(order + place, mask=place < end, other=0)
    else:
        segment = tile.to(tl.int64) * 0
        end = segment + num_positions
        place = tile.to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
        position = tl.where(place < end, place, 0)
    return segment, end, place, position


class CandidateTensors(NamedTuple):
    """The tensors of :class:`sce_lm.ops.candidates.Candidates`."""

    shared: torch.Tensor
    tail: torch.Tensor
    tail_log_weights: torch.Tensor
    bucket_items: torch.Tensor | None
    bucket_of: torch.Tensor | None
    bucket_log_weights: torch.Tensor | None
    masked: torch.Tensor | None = None

    @property
    def num_shared(self) -> int | torch.Tensor:
        """Shared candidates, empty places aside: a number, or 0-dim on the device."""
        shared = self.shared
        return (shared >= 0).sum() if needs_static_shapes(shared.device) else len(shared)


def _cut(members: CandidateList, block: int) -> PositionTiles:
    bounds, last = members.bounds, members.num_segments - 1
    count = -(-members.num_positions // block) + last
    if bounds is None:
        return PositionTiles(count, None, None)
    tile = torch.arange(count, device=bounds.device)
    tiles = (bounds.diff() + block - 1) // block
    ends = tiles.cumsum(0)
    segment = torch.searchsorted(ends, tile, right=True).clamp_max_(last)
    start = bounds[segment] + (tile - (ends - tiles)[segment]) * block
    return PositionTiles(count, segment, torch.minimum(start, bounds[segment + 1]))


def whole_catalogue(num_positions: int, vocab_size: int) -> CandidateList:
    """The list of every class, for every position."""
    return CandidateList(vocab_size, None, num_positions, kind="catalogue")


def candidate_lists(candidates: CandidateTensors, num_positions: int) -> list[CandidateList]:
    """Shared, tail and bucket lists of a call; at least one, which may be empty."""
    shared, tail, c, items, bucket_of, bucket_c, _ = candidates
    lists = []
    if len(shared):
        ids, weights = shared, None
        if needs_static_shapes(shared.device):  # empty places among them
            ids = shared.clamp_min(0)
            weights = torch.zeros(1, len(shared), device=shared.device)
            weights = weights.masked_fill_(shared < 0, -torch.inf)
        lists.append(CandidateList(len(shared), ids, num_positions, log_weights=weights))
    if len(tail):
        c = c.float().unsqueeze(0)
        if items is not None:  # an item of the position's own bucket is not in its rest
            own = _found(tail.expand(len(items), -1), items, bucket_c)
            c = c.masked_fill(own, -torch.inf).contiguous()
        row = bucket_of if len(c) > 1 else None
        lists.append(CandidateList(len(tail), tail, num_positions, None, None, c, row, "tail"))
    if items is not None and bucket_of is not None and items.shape[1]:
        by_bucket, order = torch.sort(bucket_of, stable=True)
        edges = torch.arange(len(items) + 1, device=items.device)
        bounds = torch.searchsorted(by_bucket, edges)
        c = None if bucket_c is None else bucket_c.float().contiguous()
        ids = items.contiguous()
        buckets = CandidateList(items.shape[1], ids, num_positions, order, bounds, c, kind="bucket")
        lists.append(buckets)
    return lists or [CandidateList(0, shared, num_positions)]


def _found(ids: torch.Tensor, rows: torch.Tensor, log_weights: torch.Tensor | None) -> torch.Tensor:
    """Whether each id of a row is among the present items of the same row of ``rows``."""
    if rows.shape[1] == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    if log_weights is not None:  # an empty slot may repeat any id
        rows = rows.masked_fill(log_weights == -torch.inf, -1)
    rows = rows.sort(dim=1).values
    slot = torch.searchsorted(rows, ids.contiguous()).clamp_max_(rows.shape[1] - 1)
    return rows.gather(1, slot) == ids
