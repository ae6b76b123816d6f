"""A run folder belongs to one process at a time (the main one of a run with several).

    RUN/.lock           locked by the operating system, which frees it when the process ends
    RUN/.lock.json      who holds it, for the message of the one that comes second

Both go when the run ends or is refused; what a killed process leaves of them stops nobody.
"""

import json
import os
import platform
from contextlib import suppress
from datetime import datetime

from filelock import FileLock, Timeout

from sce_lm.training.run_folder import RunFolder


class RunLock:
    """The lock of one run folder; a process that holds it may take it again."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self._lock = FileLock(folder.lock.resolve(), timeout=0, is_singleton=True)
        self._made_folder = False

    def acquire(self) -> None:
        """Take the lock; the folder is made where there is none.

        Raises ValueError, which names the process, if another one has it.
        """
        self._made_folder = not self.folder.path.exists()
        self.folder.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"{self.folder} is in use by {self._name_of_holder()}; wait until it has ended, "
                "or choose another output_dir."
            ) from None
        started = datetime.now().isoformat(" ", "seconds")
        holder = {"pid": os.getpid(), "host": platform.node(), "started": started}
        self.folder.lock_holder.write_text(json.dumps(holder))

    def release(self) -> None:
        """Give the lock back, and remove the folder again if nothing has come into it."""
        if not self._lock.is_locked:
            return
        self.folder.lock_holder.unlink(missing_ok=True)
        # Before the release: whoever takes it next makes a file of his own.
        self.folder.lock.unlink(missing_ok=True)
        self._lock.release(force=True)
        if self._made_folder:
            with suppress(OSError):  # it is not empty
                self.folder.path.rmdir()

    def _name_of_holder(self) -> str:
        try:
            holder = json.loads(self.folder.lock_holder.read_text())
            return (
                f"process {holder['pid']} on {holder['host']}, which started at {holder['started']}"
            )
        except (OSError, ValueError, KeyError):  # it is just starting or ending
            return "another process"
