"""What Triton's interpreter does, watched: launches, who writes where, the order of programs, and
kernels with a planted error. For tests that run under ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
from triton.runtime import interpreter


@dataclass
class Launch:
    """One launch of a kernel."""

    kernel: str
    arguments: dict
    """By name, as given."""
    tile_bytes: int = 0
    """Loaded and stored, every time counted."""
    touched: set[tuple[int, int]] = field(default_factory=set)
    """(address, bytes) of elements loaded or stored."""
    writers: dict[int, int] = field(default_factory=dict)
    """Which program wrote an address."""
    conflicts: list[str] = field(default_factory=list)

    @property
    def memory_bytes(self) -> int:
        """Distinct bytes loaded or stored."""
        return sum(size for _, size in self.touched)


@contextmanager
def watched(*, run: bool = True) -> Iterator[list[Launch]]:
    """Collect launches; without ``run`` the kernels are not executed. A conflict is an element
    that two programs of a launch write, that one program writes twice at once, or that one
    program reads and another one writes."""
    launches: list[Launch] = []
    original_run = interpreter.InterpretedFunction.run
    builder = interpreter.interpreter_builder
    original_load, original_store = builder.create_masked_load, builder.create_masked_store
    readers: dict[int, int] = {}

    def record(function, *arguments, grid, warmup, **options):
        names = function.arg_names
        given = dict(zip(names, arguments)) | {k: v for k, v in options.items() if k in names}
        launches.append(Launch(function.fn.__name__, given))
        readers.clear()
        if run:
            original_run(function, *arguments, grid=grid, warmup=warmup, **options)
            launch = launches[-1]
            for address, program in launch.writers.items():
                if readers.get(address, program) != program:
                    launch.conflicts.append("one program reads what another one writes")

    def program() -> int:
        (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
        return (x * height + y) * depth + z

    def load(pointers, mask, *rest):
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size, me = pointers.get_element_ty().primitive_bitwidth // 8, program()
        launches[-1].tile_bytes += at.size * size
        for address in np.unique(at).tolist():
            launches[-1].touched.add((address, size))
            readers[address] = me if readers.get(address, me) == me else -1
        return original_load(pointers, mask, *rest)

    def store(pointers, value, mask, *rest):
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        launch, me = launches[-1], program()
        size = pointers.get_element_ty().primitive_bitwidth // 8
        launch.tile_bytes += at.size * size
        if len(np.unique(at)) < at.size:
            launch.conflicts.append("one program writes an element twice at once")
        for address in at.ravel().tolist():
            launch.touched.add((address, size))
            if launch.writers.setdefault(address, me) != me:
                launch.conflicts.append("two programs write one element")
        return original_store(pointers, value, mask, *rest)

    with (
        mock.patch.object(interpreter.InterpretedFunction, "run", record),
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
    ):
        yield launches


@contextmanager
def program_order(rearrange: Callable[[np.ndarray], np.ndarray]) -> Iterator[None]:
    """Run the programs of every launch in another order."""
    builder = interpreter.interpreter_builder
    set_dimensions, set_index = builder.set_grid_dim, builder.set_grid_idx
    order: list[tuple[int, ...]] = []
    steps: Iterator[tuple[int, ...]] = iter(())

    def dimensions(*grid):
        nonlocal steps
        every = np.array(list(itertools.product(*map(range, grid))))
        order[:] = [tuple(map(int, index)) for index in rearrange(every)]
        steps = iter(order)
        set_dimensions(*grid)

    def index(*_):
        set_index(*next(steps))

    with (
        mock.patch.object(builder, "set_grid_dim", dimensions),
        mock.patch.object(builder, "set_grid_idx", index),
    ):
        yield


@contextmanager
def planted(module: ModuleType, old: str, new: str, folder: Path) -> Iterator[None]:
    """The module's kernels and device functions with ``old`` replaced by ``new`` in their source,
    in every module of the package that uses them."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert old in source, f"{module.__name__} no longer holds {old!r}: plant the error elsewhere"
    path = folder / f"planted_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    wrong = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wrong)
    replaced = []
    for name, value in vars(module).items():
        if isinstance(value, interpreter.InterpretedFunction) and hasattr(wrong, name):
            for user in list(sys.modules.values()):
                is_ours = getattr(user, "__name__", "").startswith("sce_lm.ops.triton")
                if is_ours and vars(user).get(name) is value:
                    replaced.append((user, name, value))
                    setattr(user, name, getattr(wrong, name))
    interpreter.InterpretedFunction.rewritten_fn.clear()
    try:
        yield
    finally:
        for user, name, value in replaced:
            setattr(user, name, value)
        interpreter.InterpretedFunction.rewritten_fn.clear()
