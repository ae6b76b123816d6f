"""How seconds and memory of a piece of code are measured, and how it gets a process of its own.

Memory is a peak over what the process held before: on the CPU the resident set as the operating
system counts it, on a GPU the allocator's figure. A process of its own for each measurement keeps
one method's caches, compiled code and freed memory away from the next.

    echo '{"path": "inputs.safetensors"}' | python -m sce_lm.training.measure MODULE:NAME THREADS

runs a function on JSON arguments; the last line printed is its JSON result (:func:`in_process`).
"""

import contextlib
import ctypes
import importlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")


def in_process(function: Callable[..., Any], **arguments: Any) -> Any:
    """``function(**arguments)`` in a new interpreter, with as many threads of torch as this one.

    Args:
        function: at the top level of an importable module.
        arguments: JSON values, as is the result.

    Raises:
        RuntimeError: it raised, with the end of its error output, or was killed.
    """
    target = f"{function.__module__}:{function.__qualname__}"
    result = subprocess.run(
        [sys.executable, "-m", "sce_lm.training.measure", target, str(torch.get_num_threads())],
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode < 0:
        name = signal.Signals(-result.returncode).name
        memory = " (the system was probably out of memory)" if name == "SIGKILL" else ""
        raise RuntimeError(f"the process of {target} was ended by {name}{memory}.")
    if result.returncode:
        raise RuntimeError(f"{target} failed: {result.stderr.strip()[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def held_bytes(device: str) -> int:
    """What this process holds now: allocated on the GPU, or resident as the system counts it."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    # What the C library keeps of freed memory would be used again without being counted.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _bytes_in(STATUS, "VmRSS")


def start_peak(device: str) -> Callable[[], int]:
    """A function that gives the peak since now, in bytes over what is held now."""
    held = held_bytes(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return lambda: torch.cuda.max_memory_allocated() - held
    # Resets VmHWM. Where a sandbox forbids it the peak is that since the process began, which
    # can only be larger.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return lambda: max(0, _bytes_in(STATUS, "VmHWM") - held)


def available_bytes() -> int:
    """Memory of the machine that can still be allocated without swapping."""
    return _bytes_in(Path("/proc/meminfo"), "MemAvailable")


def _bytes_in(path: Path, field: str) -> int:
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {field}; measure on Linux or on a GPU.")


def time_calls(
    run: Callable[[], Any],
    device: str,
    repeats: int,
    *,
    budget: float = math.inf,
    between: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Wall seconds of at most ``repeats`` calls of ``run``, and of one at least.

    Args:
        device: "cuda" waits for the GPU before and after each call.
        budget: seconds after which no further call is begun.
        between: called after each call, outside the time.
    """
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < budget):
        _synchronise(device)
        started = time.perf_counter()
        run()
        _synchronise(device)
        seconds.append(time.perf_counter() - started)
        between()
    return seconds


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    module, name = sys.argv[1].split(":")
    torch.set_num_threads(int(sys.argv[2]))
    with contextlib.redirect_stdout(sys.stderr):
        result = getattr(importlib.import_module(module), name)(**json.load(sys.stdin))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
