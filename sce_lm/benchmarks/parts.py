"""Parts of a session on a borrowed machine, each in a process of its own with its own time limit.

A part that crashes or hangs loses its own result and no others. Its result is NAME.json in a
folder as soon as it is there, and what it prints is NAME.log. Processes are forked from a server
that has imported torch and touched no device, so that one costs a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sce_lm.benchmarks.results import write_json
from sce_lm.files import read_json

Result = dict[str, Any]
"""What a part found; "failed" or "skipped", and why, where it found nothing."""


@dataclass(frozen=True)
class Part:
    """A function and how long it may take."""

    name: str
    """Of its files."""
    run: Callable[..., Result]
    """At the top level of a module."""
    arguments: dict[str, Any] = field(default_factory=dict)
    limit: float = 60.0
    """Seconds."""


def start_server(*modules: str) -> None:
    """Name the modules that a part's process has imported when it begins."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))


def run_part(part: Part, folder: Path, limit: float) -> Result:
    """The part's result; its files are in ``folder``.

    Args:
        limit: seconds after which the process, and all that it started, is ended.
    """
    file, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    file.unlink(missing_ok=True)
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(part, folder))
    started = time.monotonic()
    process.start()
    try:
        process.join(limit)
        if process.is_alive():
            failed = f"took longer than {limit:.0f} s"
        elif process.exitcode and process.exitcode < 0:
            failed = f"the process was ended by {signal.Signals(-process.exitcode).name}"
        else:
            failed = f"the process ended with code {process.exitcode} and no result"
    finally:
        _end(process)
    if file.exists():
        result = read_json(file)
    else:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        result = {"part": part.name, "failed": failed, "last_lines": lines[-10:]}
    result["took"] = round(time.monotonic() - started, 2)
    write_json(file, result)
    return result


def _end(process: Any) -> None:
    """The process and its children, which are a group."""
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet
            process.kill()
    process.join()


def _run(part: Part, folder: Path) -> None:
    os.setsid()
    with (folder / f"{part.name}.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        result = part.run(**part.arguments)
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().splitlines() or [""]
        result = {"failed": f"{type(error).__name__}: {first[0]}"}
    sys.stdout.flush()
    write_json(folder / f"{part.name}.json", {"part": part.name, **result})
