r"""A prediction of the kernels' time from operations, bytes and a device's rates.

Each launch of a step is a :class:`Step` with three counts:

    operations     of its products, 2 a multiply-add
    memory bytes   each distinct byte that it reads or writes, once a launch
    tile bytes     what its programs ask for, a tile at a time: what the caches must serve

and takes ``max(operations / (share · matrix rate), memory bytes / (share · memory rate))``. Tile
bytes are shown and are not part of the time: no vendor states the rate. What is not a kernel of
ours is left out, k-means, sorting and small tensors among it. Nothing here has been measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sce_lm.ops.triton.configurations import Configuration
from sce_lm.ops.triton.control_variate import ROW_SUM_CHUNK

FLOAT = 4
"""Bytes of an fp32 number."""


@dataclass(frozen=True)
class Device:
    """Peak rates, from the vendor's data sheet."""

    name: str
    architecture: str
    matrix_rate: float
    """Dense bf16 operations a second."""
    memory_rate: float
    """Bytes a second."""
    single_rate: float = math.nan
    """fp32 operations a second, without the matrix unit."""


DEVICES = (
    Device("H100 SXM", "sm_90", 989e12, 3.35e12, 67e12),
    Device("A100 SXM 80 GB", "sm_80", 312e12, 2.04e12, 19.5e12),
)

PUBLISHED_CCE_MS = 92.6
"""Cut Cross-Entropy, forward and backward, N=16384, V=248320, d=2048, bf16 on an H100, as its
authors state it."""


@dataclass(frozen=True)
class Shape:
    """A problem; every list but the bucket's is shared by all positions."""

    positions: int
    vocab: int
    width: int
    shared: int = 0
    """S: labels and frequent classes."""
    tail: int = 0
    buckets: int = 0
    bucket_size: int = 0
    control: bool = False
    """Control variate: W and the certain rows are read for the mean of the rest."""
    item_bytes: int = 2
    """Bytes of an element of hidden states and weight."""


@dataclass(frozen=True)
class Step:
    """One launch, or launches of one kind."""

    phase: str
    """forward, backward or scan."""
    kernel: str
    list: str
    operations: float
    memory_bytes: float
    tile_bytes: float

    def seconds(self, device: Device, share: float) -> float:
        """Time at a share of the peak rates."""
        return max(
            self.operations / (share * device.matrix_rate),
            self.memory_bytes / (share * device.memory_rate),
        )


Choose = Callable[[str], Configuration]
"""The configuration of a kernel."""


def steps(shape: Shape, choose: Choose) -> list[Step]:
    """The launches of a forward and backward pass with a dense gradient of W."""
    n, d, size = shape.positions, shape.width, shape.item_bytes
    lists = [
        ("shared", shape.shared, 1, False),
        ("tail", shape.tail, 1, True),
        ("bucket", shape.bucket_size, shape.buckets, False),
    ]
    lists = [entry for entry in lists if entry[1] and entry[2]]
    found = []
    means = max(shape.buckets, 1)
    if shape.control:
        table = shape.vocab * d * size
        found += [
            _read("forward", "mean of W", "", table),
            _row_sum(shape, "forward", "shared", shape.shared, -(-shape.shared // ROW_SUM_CHUNK)),
            _row_sum(shape, "forward", "bucket", shape.buckets * shape.bucket_size, shape.buckets),
            _row_sum(shape, "backward", "positions", n, means),
            Step("forward", "row_dot", "mean", 0.0, n * d * size + means * d * FLOAT,
                 n * d * (size + FLOAT)),
        ]  # fmt: skip
    found.append(_read("forward", "row_dot", "label", 2 * n * d * size))
    found += [_forward(shape, choose, *entry) for entry in lists]
    slots = 0
    for index, (name, columns, segments, weighted) in enumerate(lists):
        slots += columns * segments
        gradient = _forward(shape, choose, name, columns, segments, weighted, backward=True)
        found += [
            gradient,
            _hidden_gradient(shape, choose, name, columns, segments, index, len(lists)),
            _row_gradient(shape, choose, name, columns, segments),
        ]
    entries = (slots * FLOAT + n * size) * d
    found.append(Step("backward", "merge_rows", "", 0.0, entries + slots * d * size, 2 * entries))
    found.append(_read("backward", "zeros of dW", "", shape.vocab * d * size))
    if shape.buckets:
        found += [_scan(shape, choose, step) for step in ("group maxima", "group scores")]
    return [step for step in found if step.memory_bytes]


def _read(phase: str, kernel: str, name: str, size: float) -> Step:
    return Step(phase, kernel, name, 0.0, size, size)


def _row_sum(shape: Shape, phase: str, name: str, rows: int, segments: int) -> Step:
    """Rows that are read once, and a sum for each segment."""
    d = shape.width
    return _read(phase, "row_sum", name, rows * d * shape.item_bytes + segments * d * FLOAT)


def _forward(shape, choose, name, columns, segments, weighted, backward=False) -> Step:
    n, d, size = shape.positions, shape.width, shape.item_bytes
    kind = "logit_gradient" if backward else "forward"
    tile = choose(f"{kind}_weighted" if weighted else kind)
    position_tiles = math.ceil(n / segments / tile.block_positions) * segments
    column_tiles = math.ceil(columns / tile.block_columns)
    rows = tile.block_positions + tile.block_columns
    out = n * columns * size if backward else 2 * n * column_tiles * FLOAT
    weights = columns * FLOAT * (n if weighted else 0)
    return Step(
        "backward" if backward else "forward",
        kind,
        name,
        2.0 * n * columns * d,
        (n + columns * segments) * d * size + out + weights / max(n, 1),
        position_tiles * column_tiles * rows * d * size + out + weights,
    )


def _hidden_gradient(shape, choose, name, columns, segments, index, count) -> Step:
    n, d, size = shape.positions, shape.width, shape.item_bytes
    tile = choose("hidden_gradient")
    position_tiles = math.ceil(n / segments / tile.block_positions) * segments
    width_tiles = math.ceil(d / tile.block_width)
    ends = n * d * (size if index == count - 1 else FLOAT)
    begins = n * d * (FLOAT if index else size)
    return Step(
        "backward",
        "hidden_gradient",
        name,
        2.0 * n * columns * d,
        n * columns * size + columns * segments * d * size + begins + ends,
        n * columns * size * width_tiles + columns * d * size * position_tiles + begins + ends,
    )


def _row_gradient(shape, choose, name, columns, segments) -> Step:
    n, d, size = shape.positions, shape.width, shape.item_bytes
    tile = choose("row_gradient")
    out = columns * segments * d * FLOAT
    return Step(
        "backward",
        "row_gradient",
        name,
        2.0 * n * columns * d,
        n * columns * size + n * d * size + out,
        n * columns * size * math.ceil(d / tile.block_width)
        + n * d * size * math.ceil(columns / tile.block_columns)
        + out,
    )


def _scan(shape, choose, step) -> Step:
    d, size, queries = shape.width, shape.item_bytes, shape.buckets
    tile = choose("catalogue_scan")
    query_tiles = math.ceil(queries / tile.block_positions)
    class_tiles = math.ceil(shape.vocab / tile.block_columns)
    rows = tile.block_positions + tile.block_columns
    return Step(
        "scan",
        step,
        "",
        2.0 * queries * shape.vocab * d,
        (shape.vocab + queries) * d * size,
        query_tiles * class_tiles * rows * d * size,
    )
