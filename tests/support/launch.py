"""Test programs of several processes (gloo): ``program.py RANK WORLD_SIZE FOLDER NAME ...``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
"""Environment of a program that computes with one thread, as the tests here do themselves."""


def run(
    program: str, world_size: int, folder: Path, names: Iterable[str], seconds: int = 600
) -> None:
    """Start the processes and wait; a process that fails or hangs is an error."""
    command = [sys.executable, "-W", "ignore", program]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(folder), *names],
            env=ONE_THREAD,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=seconds)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


def start() -> tuple[int, int, Path]:
    """Rank, number of processes and folder of this process, which joins the others."""
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = dist.FileStore(str(folder / f"store-{world_size}"), world_size)
    wait = timedelta(minutes=3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=wait)
    return rank, world_size, folder
