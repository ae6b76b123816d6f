"""Launch configurations: which tile each kernel uses on which architecture.

There is no tuning at run time; ``scripts/benchmark.py kernels --tune`` measures what lies beside a
row. The offline compilation test builds every row of this table and
refuses one that spills registers, needs more shared memory than the architecture has or, in half
precision, does not use the matrix unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of hidden states and weights that the kernels take."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """Tile and schedule of one kernel."""

    block_positions: int
    """Positions (or queries, or entries of a segment) in a tile."""
    block_columns: int
    """Candidates (or classes) in a tile."""
    block_width: int
    """Elements of the hidden width in a tile."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Depth of the software pipeline."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            power = field.name != "num_stages"
            if value < 1 or (power and value & (value - 1)):
                kind = "a power of two" if power else "positive"
                raise ValueError(f"Configuration.{field.name} is {value}; it must be {kind}.")

    def launch(self, kernel: Any, grid: tuple[int], *arguments: Any, **flags: bool | int):
        """Launch a kernel with this tile and schedule, on the device of its first argument. A grid
        has one dimension: the others end at 65,535 programs."""
        blocks = {
            "BLOCK_POSITIONS": self.block_positions,
            "BLOCK_COLUMNS": self.block_columns,
            "BLOCK_WIDTH": self.block_width,
        }
        tile = {name: size for name, size in blocks.items() if name in kernel.arg_names}
        schedule = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        # Triton launches on the current device, whichever holds the tensors.
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **flags, **tile, **schedule)

    def __str__(self) -> str:
        blocks = f"{self.block_positions}x{self.block_columns}x{self.block_width}"
        return f"{blocks} w{self.num_warps} s{self.num_stages}"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the compiler must know of a device family."""

    name: str
    """As in the table's rows: sm_90, gfx942."""
    backend: str
    """"cuda" or "hip"."""
    target: int | str
    """Compute capability times ten, or the gfx name."""
    warp_size: int
    shared_limit: int
    """Shared memory that one program may use, bytes."""
    matrix_instruction: str
    """What a half-precision product must compile to."""


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("sm_80", "cuda", 80, 32, 163 * 1024, "HMMA"),
        Architecture("sm_86", "cuda", 86, 32, 99 * 1024, "HMMA"),
        Architecture("sm_90", "cuda", 90, 32, 227 * 1024, "HGMMA"),
        Architecture("sm_100", "cuda", 100, 32, 227 * 1024, "UTCHMMA"),
        Architecture("gfx942", "hip", "gfx942", 64, 64 * 1024, "v_mfma"),
    )
}

INTERPRETER = Configuration(16, 16, 32, 1, 1)
"""Under Triton's interpreter: tiles so small that small tensors have many."""
_INTERPRETED = {
    "merge_rows": Configuration(1, 4, 64, 1, 1),
    "catalogue_scan": Configuration(16, 64, 32, 1, 1),
    "priority_sample": Configuration(1, 64, 1, 1, 1),
}

_target: Architecture | None = None
_instead: dict[str, Configuration] = {}


@contextmanager
def compiling_for(architecture: Architecture) -> Iterator[None]:
    """Choose this architecture's configurations, whatever the tensors' device."""
    global _target
    kept, _target = _target, architecture
    try:
        yield
    finally:
        _target = kept


@contextmanager
def replaced(kernel: str, by: Configuration) -> Iterator[None]:
    """Launch a kernel with another configuration than the table's."""
    _instead[kernel] = by
    try:
        yield
    finally:
        del _instead[kernel]


def configuration(kernel: str, *operands: torch.Tensor) -> Configuration:
    """The tile of a kernel for operands of one device and dtype."""
    like = operands[0]
    if kernel in _instead:
        return _instead[kernel]
    if _target is None and like.device.type == "cpu":
        return _INTERPRETED.get(kernel, INTERPRETER)
    architecture = architecture_of(like.device)
    if architecture is None:
        raise ValueError(f'{like.device} has no launch configurations; use backend="torch".')
    aligned = all(x.stride(0) % 16 == 0 and x.storage_offset() % 16 == 0 for x in operands)
    return choose(kernel, architecture, like.dtype, aligned=aligned)


def choose(
    kernel: str, architecture: Architecture, dtype: torch.dtype, aligned: bool = True
) -> Configuration:
    """The table's row for a kernel, an architecture and a dtype.

    Rows that do not start at multiples of 16 elements cannot be copied to shared memory
    asynchronously; they pass through registers, and the tiles must be smaller.
    """
    if kernel in _ANY:
        return _ANY[kernel]
    if dtype == torch.float32:
        return _SINGLE[kernel]
    return _HALF[kernel][architecture.name] if aligned else _UNALIGNED[kernel]


def architecture_of(device: torch.device) -> Architecture | None:
    """The architecture whose configurations a device takes, or that of :func:`compiling_for`; None:
    there are none.

    CUDA devices of other compute capabilities from 8.0 up take those of sm_86, which need the least
    shared memory.
    """
    return _target or _found(device)


@lru_cache
def _found(device: torch.device) -> Architecture | None:
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return ARCHITECTURES.get(name)
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return None
    name = "sm_100" if major == 10 else f"sm_{major}{minor}"
    return ARCHITECTURES.get(name, ARCHITECTURES["sm_86"])


_ANY = {
    "row_dot": Configuration(16, 1, 128, 4, 2),
    "row_sum": Configuration(1, 16, 128, 4, 2),
    "merge_rows": Configuration(1, 16, 128, 4, 2),
    "merge_splits": Configuration(64, 1, 1, 2, 1),
    "candidate_epilogue": Configuration(64, 1, 1, 2, 1),
    "priority_sample": Configuration(1, 512, 1, 4, 1),
}
_NAMES = tuple(ARCHITECTURES)


def _rows(*configurations: Configuration) -> dict[str, Configuration]:
    return dict(zip(_NAMES, configurations))


_HALF = {
    "forward": _rows(
        Configuration(128, 128, 64, 8, 3),
        Configuration(128, 128, 32, 8, 3),
        Configuration(128, 128, 64, 8, 4),
        Configuration(128, 128, 64, 8, 4),
        Configuration(128, 128, 32, 8, 2),
    ),
    "forward_weighted": _rows(
        Configuration(64, 128, 64, 8, 3),
        Configuration(64, 128, 32, 8, 3),
        Configuration(64, 128, 64, 8, 4),
        Configuration(64, 128, 64, 8, 4),
        Configuration(64, 128, 32, 8, 2),
    ),
    "logit_gradient": _rows(
        Configuration(64, 128, 64, 8, 3),
        Configuration(64, 128, 32, 8, 3),
        Configuration(128, 128, 64, 8, 4),
        Configuration(128, 64, 64, 8, 4),
        Configuration(128, 128, 32, 8, 2),
    ),
    "logit_gradient_weighted": _rows(
        Configuration(64, 128, 64, 8, 3),
        Configuration(64, 128, 32, 8, 3),
        Configuration(64, 128, 64, 8, 4),
        Configuration(64, 128, 64, 8, 4),
        Configuration(64, 128, 32, 8, 2),
    ),
    "hidden_gradient": _rows(
        Configuration(128, 64, 64, 8, 3),
        Configuration(128, 32, 128, 8, 3),
        Configuration(128, 64, 128, 8, 4),
        Configuration(128, 64, 128, 8, 4),
        Configuration(128, 32, 128, 8, 2),
    ),
    "row_gradient": _rows(
        Configuration(64, 128, 128, 8, 3),
        Configuration(32, 128, 128, 8, 3),
        Configuration(64, 128, 128, 8, 4),
        Configuration(64, 128, 128, 8, 4),
        Configuration(32, 128, 128, 8, 2),
    ),
    "catalogue_scan": _rows(
        Configuration(64, 128, 64, 4, 3),
        Configuration(64, 128, 32, 4, 3),
        Configuration(64, 128, 64, 4, 4),
        Configuration(64, 128, 64, 4, 4),
        Configuration(64, 128, 32, 4, 2),
    ),
}
_UNALIGNED = {
    "forward": Configuration(64, 64, 32, 4, 2),
    "forward_weighted": Configuration(64, 64, 32, 8, 2),
    "logit_gradient": Configuration(64, 64, 32, 4, 2),
    "logit_gradient_weighted": Configuration(64, 64, 32, 8, 2),
    "hidden_gradient": Configuration(64, 32, 64, 8, 2),
    "row_gradient": Configuration(32, 64, 64, 4, 2),
    "catalogue_scan": Configuration(64, 64, 32, 4, 2),
}
_SINGLE = {
    "forward": Configuration(64, 32, 16, 8, 2),
    "forward_weighted": Configuration(32, 64, 16, 8, 2),
    "logit_gradient": Configuration(32, 64, 16, 8, 2),
    "logit_gradient_weighted": Configuration(32, 64, 16, 8, 2),
    "hidden_gradient": Configuration(32, 16, 64, 8, 2),
    "row_gradient": Configuration(16, 64, 64, 8, 2),
    "catalogue_scan": Configuration(64, 32, 16, 8, 2),
}
