"""Checkpoints that are either complete or not there, and from which a run goes on exactly.

    RUN/checkpoints/step-00000500/           complete: it got this name by one rename, its files
                                             already on disk
    RUN/checkpoints/.partial-step-00001000/  being written, or left by a killed process: ignored,
                                             then removed

Inside: what accelerate saves (model, optimiser, scheduler, gradient scaler, the random states of
every process), the objective's state of every process, and `checkpoint.json` with the step, the
batches that make a step, the number of processes and the SHA-256 of every file. The data position
is the step: the order of the data is a function of seed and step alone.

Another number of processes may go on, if it can share the batches of a step equally: each then
accumulates more or fewer of them, and a step stays what it was. Its processes draw noise of their
own, and one that is new starts from the objective's state of one that was there.

A checkpoint that is damaged later (a file missing or changed) is refused by name rather than passed
over, since to go on from an older one in silence would lose work without a word.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from sce_lm.hf.saving import state_file
from sce_lm.objectives.base import Objective

MANIFEST = "checkpoint.json"


class Checkpoints:
    """The checkpoints of one run folder; all processes call `save` and `load` together."""

    def __init__(self, folder: Path, accelerator: Accelerator, objective: Objective, keep: int):
        self.folder = folder
        self.accelerator = accelerator
        self.objective = objective
        self.keep = keep
        if accelerator.is_main_process:
            for leftover in folder.glob(".*-step-*"):
                shutil.rmtree(leftover)
        accelerator.wait_for_everyone()

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return max(self.folder.glob("step-*"), default=None)

    def save(self, step: int, batches: int) -> None:
        """Write the state after `step` optimiser steps, then remove all but the newest `keep`.

        Args:
            batches: of one step, over all processes.
        """
        complete = self.folder / f"step-{step:08d}"
        partial = self.folder / f".partial-{complete.name}"
        if self.accelerator.is_main_process:
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial), safe_serialization=False)
        if self.objective.state is not None and not self.objective.state.is_new:
            self.objective.state.save(state_file(partial, self.accelerator.process_index))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _complete(partial, complete, step, batches, self.accelerator.num_processes)
            for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
                # Renamed first, so that a half-removed folder never passes for a checkpoint.
                removed = old.rename(old.with_name(f".removed-{old.name}"))
                shutil.rmtree(removed)
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Path) -> dict[str, int]:
        """Restore everything from `checkpoint` and return its `step`, `batches` and `processes`.

        Raises ValueError if a file is missing or damaged, or the processes there are now cannot
        share the batches of a step.
        """
        if self.accelerator.is_main_process:
            verify(checkpoint)
        self.accelerator.wait_for_everyone()
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if manifest["batches"] % self.accelerator.num_processes:
            raise ValueError(
                f"{checkpoint} was written by {manifest['processes']} processes, whose steps take "
                f"{manifest['batches']} batches, and this run has {self.accelerator.num_processes}"
                "; start a number that divides them, or choose another output_dir."
            )
        self.accelerator.load_state(str(checkpoint))
        state = state_file(checkpoint, self.accelerator.process_index % manifest["processes"])
        if state.exists() and self.objective.state is not None:
            self.objective.state.load(state)
        return {name: manifest[name] for name in ("step", "batches", "processes")}


def verify(checkpoint: Path) -> None:
    """Raise ValueError unless every file of a checkpoint is there as it was written."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        damaged = [name for name, digest in files.items() if _sha256(checkpoint / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        damaged = [getattr(error, "filename", None) or MANIFEST]
    if damaged:
        raise ValueError(
            f"The checkpoint {checkpoint} is damaged ({Path(damaged[0]).name} is missing or not as "
            "it was written); delete that folder to go on from the checkpoint before it, or from "
            "the start if there is none."
        )


def _complete(partial: Path, complete: Path, step: int, batches: int, processes: int) -> None:
    """List the files, push all of it to disk, and give the folder its name."""
    files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    manifest = {"step": step, "batches": batches, "processes": processes, "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*partial.iterdir(), partial):
        _sync(path)
    partial.rename(complete)
    _sync(complete.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
