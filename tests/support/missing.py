"""Interpreters that lack packages, or the network, as machines do on which one is a guest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

NOT_IN_THE_CORE = (
    "accelerate",
    "datasets",
    "matplotlib",
    "peft",
    "polars",
    "psutil",
    "rich",
    "trl",
)
"""What the losses, apply_sce and the benchmarks of the loss run without."""

NO_NETWORK = """
import socket
connect = socket.socket.connect
def only_here(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError("there is no network here")
    return connect(self, address)
def refuse(*_, **__):
    raise OSError("there is no network here")
socket.socket.connect, socket.getaddrinfo = only_here, refuse
"""


def environment(folder: Path, missing: Sequence[str] = (), *, network: bool = True) -> dict:
    """Variables under which Python, and what it starts, cannot import these modules.

    Args:
        folder: an empty one, for the module that Python imports first.
        network: False: nor open a connection.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({list(missing)!r}))"]
    code = "\n".join(lines) + ("" if network else NO_NETWORK)
    (folder / "sitecustomize.py").write_text(code)
    root = Path(__file__).parents[2]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}{os.pathsep}{root}"}
