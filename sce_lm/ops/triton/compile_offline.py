"""Compile kernels for GPUs that are not here, and read what the compiler made of them.

:func:`recording` runs launchers on small CPU tensors and takes down what they would launch on a
given architecture; :func:`compile_launch` builds one of those launches and reports registers,
spills, shared memory and matrix instructions from the machine code. ``ptxas``, ``cuobjdump`` and
``nvdisasm`` come with Triton; for AMD the assembly is read. What is compiled is what the launchers
launch: pointer types, None arguments, and divisibility by 16 as Triton specialises them.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sce_lm.ops.triton.configurations import Architecture, compiling_for

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel with the types of its arguments."""

    kernel: JITFunction = field(repr=False)
    architecture: Architecture
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    """Arguments that are multiples of 16."""
    options: dict[str, int]
    """num_warps and num_stages."""

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")

    @property
    def key(self) -> str:
        """Hash of all that decides the machine code."""
        parts = (
            self.kernel.cache_key,
            repr(self.architecture),
            repr(self.signature),
            repr(self.constants),
            repr(self.divisible),
            repr(self.options),
            triton.__version__,
        )
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def variant(self) -> str:
        """Optional arguments that are not given, and flags that are set."""
        absent = [name for name, value in self.constants.items() if value is None]
        flags = [name for name, value in self.constants.items() if value is True]
        return f"without {', '.join(absent) or 'nothing'}; {', '.join(flags) or 'no flags'}"

    @property
    def configuration(self) -> str:
        """Its tile and schedule, as in the table."""
        blocks = [v for n, v in self.constants.items() if n.startswith("BLOCK_")]
        tile = "x".join(map(str, blocks))
        return f"{tile} w{self.options['num_warps']} s{self.options['num_stages']}"

    @property
    def num_arguments(self) -> int:
        """Arguments that are not None."""
        return sum(name not in self.constants for name in self.signature)

    @property
    def has_product(self) -> bool:
        """Whether the kernel multiplies matrices."""
        return self._block("POSITIONS") > 1 and self._block("COLUMNS") > 1

    @property
    def tile_operations(self) -> int:
        """Operations of one step of the inner product; 0 without a product."""
        sides = [self._block(name) for name in ("POSITIONS", "COLUMNS", "WIDTH")]
        return 2 * math.prod(sides) if self.has_product else 0

    def tile_bytes(self, item_bytes: int) -> int:
        """Bytes of the two operands of such a step: the sides that the product runs over."""
        positions, columns, width = map(self._block, ("POSITIONS", "COLUMNS", "WIDTH"))
        if not self.has_product:
            return item_bytes * max(positions, columns) * width
        inner = {"hidden_gradient": columns, "row_gradient": positions}.get(self.name, width)
        outer = positions + columns + width - inner
        return item_bytes * inner * outer

    def _block(self, name: str) -> int:
        return self.constants.get(f"BLOCK_{name}", 1)


@dataclass(frozen=True)
class Compiled:
    """What a launch compiled to."""

    registers: int
    """Registers of a thread (vector registers on AMD)."""
    spills: int
    """Instructions that load or store spilled registers."""
    shared_bytes: int
    matrix_instructions: int
    """Instructions of the matrix unit."""


@contextmanager
def recording(architecture: Architecture) -> Iterator[list[Launch]]:
    """Take down launches instead of running them; outputs of launchers are not initialised."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        launches.append(_launch(kernel, architecture, args, kwargs))

    with mock.patch.object(JITFunction, "run", record), compiling_for(architecture):
        yield launches


def _launch(kernel: JITFunction, architecture: Architecture, args, kwargs) -> Launch:
    names = [p.name for p in kernel.params]
    values = dict(zip(names, args)) | {n: v for n, v in kwargs.items() if n in names}
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif torch.is_tensor(value):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
    options = {n: v for n, v in kwargs.items() if n not in names}
    return Launch(kernel, architecture, signature, constants, tuple(divisible), options)


def compile_launch(launch: Launch, cache: Path | None = None) -> Compiled:
    """Build a launch, or take the result from ``cache`` if its key is there."""
    kept = cache / f"{launch.key}.json" if cache is not None else None
    if kept is not None and kept.exists():
        return Compiled(**json.loads(kept.read_text()))
    architecture = launch.architecture
    names = list(launch.signature)
    source = ASTSource(
        launch.kernel,
        launch.signature,
        constexprs={(names.index(n),): v for n, v in launch.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in launch.divisible},
    )
    target = GPUTarget(architecture.backend, architecture.target, architecture.warp_size)
    built = triton.compile(source, target=target, options=launch.options)
    read = _read_cubin if architecture.backend == "cuda" else _read_amdgcn
    result = read(built, architecture)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(result)))
    return result


def _read_cubin(built, architecture: Architecture) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    return Compiled(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared_bytes=built.metadata.shared,
        matrix_instructions=len(re.findall(rf"\b{architecture.matrix_instruction}\b", code)),
    )


def _read_amdgcn(built, architecture: Architecture) -> Compiled:
    code = built.asm["amdgcn"]

    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", code)[-1])

    return Compiled(
        registers=metadata("vgpr_count"),
        spills=metadata("vgpr_spill_count"),  # scalar registers spill to vector registers
        shared_bytes=built.metadata.shared,
        matrix_instructions=len(re.findall(architecture.matrix_instruction, code)),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], check=True, capture_output=True, text=True
    ).stdout
