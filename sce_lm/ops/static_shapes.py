"""Where a call must not wait: on a device, no shape and no branch may depend on data.

A wait empties the queue of work that the host has put together, and a shape that depends on data
forbids graphs and fusion. So ignored positions stay where they are with the weight 0, repeated
classes stay in sorted lists with the weight 0, and what the host need not know stays on the device.
On a CPU there is no queue, and leaving such places out is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

_everywhere: ContextVar[bool] = ContextVar("everywhere", default=False)


def needs_static_shapes(device: torch.device) -> bool:
    """Whether code on tensors of this device depends on data in no shape and no branch."""
    return device.type != "cpu" or _everywhere.get()


@contextmanager
def static_shapes() -> Iterator[None]:
    """Inside, that holds on a CPU too, so that the results of the two ways can be compared."""
    kept = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(kept)


class Tiles(NamedTuple):
    """Members of groups in tiles of one size, each within one group, as many as hold any sizes of
    the groups."""

    group: torch.Tensor
    """``[T]`` int64: the group of each tile; any for a tile that is empty."""
    members: torch.Tensor
    """``[T, size]`` int64, in order; any where a place is empty."""
    is_there: torch.Tensor
    """``[T, size]`` bool."""


def tiles_of_groups(group_of: torch.Tensor, num_groups: int, size: int) -> Tiles:
    """Cut M members, ``group_of [M]``, into ``ceil(M / size) + num_groups - 1`` tiles."""
    total = len(group_of)
    ascending, by_group = torch.sort(group_of, stable=True)
    edges = torch.arange(num_groups + 1, device=group_of.device)
    bounds = torch.searchsorted(ascending, edges)
    tiles = (bounds.diff() + size - 1) // size
    ends = tiles.cumsum(0)
    tile = torch.arange(-(-total // size) + num_groups - 1, device=group_of.device)
    group = torch.searchsorted(ends, tile, right=True).clamp_max(num_groups - 1)
    first_tile, stop = (ends - tiles)[group], bounds[1:][group]
    first = bounds[group] + (tile - first_tile) * size
    place = first.unsqueeze(1) + torch.arange(size, device=group_of.device)
    return Tiles(group, by_group[place.clamp_max(total - 1)], place < stop.unsqueeze(1))
