"""Checkpoints that are either complete or not there, and from which a run goes on exactly.

    RUN/checkpoints/step-00000500/           complete: it got this name by one rename, its files
                                             already on disk
    RUN/checkpoints/.partial-step-00001000/  being written, or left by a killed process: ignored,
                                             then removed

Inside, in formats that hold numbers and text and nothing that could be executed:

    model.safetensors, optimizer.safetensors     the parameters, and the optimiser's state of each
    random_rankR.safetensors                     the random states of a process
    sce_state_rankR.safetensors                  the objective's state of a process, if it has one
    teacher_state_rankR.safetensors              the same of a sampled distillation
    checkpoint.json                              step, batches that make a step, processes, steps
                                                 of the schedule, gradient scaler, and the SHA-256
                                                 of every file

The data position is the step: the order of the data is a function of seed and step alone.

Another number of processes may go on, if it can share the batches of a step equally: each then
accumulates more or fewer of them, and a step stays what it was. Its processes draw noise of their
own, and one that is new starts from the objective's state of one that was there.

A checkpoint that is damaged later (a file missing or changed) is refused by name rather than passed
over, since to go on from an older one in silence would lose work without a word.
"""

import hashlib
import json
import os
import random
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model

from sce_lm.files import in_one_line, read_json
from sce_lm.hf.saving import state_file
from sce_lm.training.learner import Learner, teacher_state_file

MANIFEST = "checkpoint.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run folder; all processes call its methods together."""

    folder: Path
    learner: Learner
    keep: int
    """The newest so many stay."""

    def remove_leftovers(self) -> None:
        """Clear away what a killed process was writing or removing."""
        if self.learner.accelerator.is_main_process:
            for leftover in self.folder.glob(".*-step-*"):
                shutil.rmtree(leftover)
        self.learner.accelerator.wait_for_everyone()

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return max(self.folder.glob("step-*"), default=None)

    def save(self, step: int, batches: int) -> None:
        """Write the state after `step` optimiser steps, then remove all but the newest `keep`.

        Args:
            batches: of one step, over all processes.

        Raises OSError or SafetensorError if it cannot be written; nothing of it is left then.
        """
        accelerator = self.learner.accelerator
        complete = self.folder / f"step-{step:08d}"
        partial = self.folder / f".partial-{complete.name}"
        try:
            _write_state(self.learner, partial)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                scaler = accelerator.scaler
                facts = {
                    "step": step,
                    "batches": batches,
                    "processes": accelerator.num_processes,
                    "schedule": self.learner.scheduler.last_epoch,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                }
                _complete(partial, complete, facts)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if accelerator.is_main_process:
            for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
                # Renamed first, so that a half-removed folder never passes for a checkpoint.
                removed = old.rename(old.with_name(f".removed-{old.name}"))
                shutil.rmtree(removed)
        accelerator.wait_for_everyone()

    def load(self, checkpoint: Path) -> dict[str, int]:
        """Restore everything from `checkpoint` and return its `step`, `batches` and `processes`.

        Raises ValueError if a file is missing, damaged, of another kind or does not fit this run,
        or if the processes there are now cannot share the batches of a step.
        """
        accelerator = self.learner.accelerator
        if accelerator.is_main_process:
            verify(checkpoint)
        accelerator.wait_for_everyone()
        manifest = read_json(checkpoint / MANIFEST)
        if manifest["batches"] % accelerator.num_processes:
            raise ValueError(
                f"{checkpoint} was written by {manifest['processes']} processes, whose steps take "
                f"{manifest['batches']} batches, and this run has {accelerator.num_processes}"
                "; start a number that divides them, or choose another output_dir."
            )
        try:
            _restore_state(self.learner, checkpoint, manifest)
        except (LookupError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise ValueError(
                f"The checkpoint {checkpoint} does not fit this run ({in_one_line(error)}); go on "
                "with the model, data and optimizer that it was written with, or choose another "
                "output_dir."
            ) from error
        return {name: manifest[name] for name in ("step", "batches", "processes")}


def _write_state(learner: Learner, folder: Path) -> None:
    accelerator = learner.accelerator
    if accelerator.is_main_process:
        folder.mkdir(parents=True)
        save_model(learner.plain_model, str(folder / MODEL))
        save_file(_optimizer_state(learner.optimizer), folder / OPTIMIZER)
    accelerator.wait_for_everyone()
    tensors, texts = _random_states(accelerator.device)
    save_file(tensors, _random_file(folder, accelerator.process_index), texts)
    for file, state in learner.states(folder, accelerator.process_index).items():
        if not state.is_new:
            state.save(file)


def _restore_state(learner: Learner, checkpoint: Path, manifest: dict[str, Any]) -> None:
    accelerator, rank = learner.accelerator, learner.accelerator.process_index
    load_model(learner.plain_model, checkpoint / MODEL)
    _restore_optimizer(learner.optimizer, load_file(checkpoint / OPTIMIZER))
    # One step back and one forward, which sets the rates of that step on this run's schedule.
    place = {"last_epoch": manifest["schedule"] - 1, "_step_count": manifest["schedule"]}
    learner.scheduler.load_state_dict(learner.scheduler.state_dict() | place)
    learner.scheduler.step()
    if accelerator.scaler is not None and manifest["scaler"]:
        accelerator.scaler.load_state_dict(manifest["scaler"])
    for file, state in learner.states(checkpoint, rank % manifest["processes"]).items():
        if file.exists():
            state.load(file)
    if manifest["processes"] == accelerator.num_processes:
        _restore_random_states(_random_file(checkpoint, rank), accelerator.device)


def verify(checkpoint: Path) -> None:
    """Raise ValueError unless a checkpoint has exactly the files that it should have, each as it
    was written and in its format."""
    try:
        foreign, damaged = _faults(checkpoint)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        foreign, damaged = None, Path(getattr(error, "filename", None) or MANIFEST).name
    advice = (
        "delete that folder to go on from the checkpoint before it, or from the start if there is "
        "none."
    )
    if foreign:
        raise ValueError(
            f"The checkpoint {checkpoint} holds {foreign}, which is none of its files: an earlier "
            "version wrote it, or somebody else, and to read it could run code, so nothing was "
            f"read; {advice}"
        )
    if damaged:
        raise ValueError(
            f"The checkpoint {checkpoint} is damaged ({damaged} is missing or not as it was "
            f"written); {advice}"
        )


def _faults(checkpoint: Path) -> tuple[str | None, str | None]:
    """The first file that does not belong there, and else the first that is not as written."""
    manifest = read_json(checkpoint / MANIFEST)
    files, ranks = manifest["files"], range(manifest["processes"])
    needed = {MODEL, OPTIMIZER, *(_random_file(checkpoint, rank).name for rank in ranks)}
    there = {path.name for path in checkpoint.iterdir() if not path.name.startswith(".")}
    found = (there | set(files)) - {MANIFEST}
    of_states = (state_file, teacher_state_file)
    foreign = found - needed - {of(checkpoint, rank).name for of in of_states for rank in ranks}
    if foreign:
        return min(foreign), None
    for name in sorted(needed | found):
        if _sha256(checkpoint / name) != files.get(name):
            return None, name
        try:
            with safe_open(checkpoint / name, "pt"):
                pass
        except SafetensorError:
            return None, name
    return None, None


def _random_file(folder: Path, rank: int) -> Path:
    return folder / f"random_rank{rank}.safetensors"


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Its tensors as `INDEX.NAME` of a parameter, and its numbers as int64 `[]`, which no optimiser
    here has for a tensor. The rest (rates, decay) is the configuration's and the schedule's."""
    return {
        f"{index}.{name}": torch.as_tensor(value).contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, torch.Tensor]) -> None:
    state: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for key, tensor in saved.items():
        index, name = key.split(".", 1)
        is_number = tensor.dtype == torch.int64 and tensor.dim() == 0
        state[int(index)][name] = tensor.item() if is_number else tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(state)})


def _random_states(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The generators of torch as tensors, those of Python and NumPy as JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        tensors[device.type] = torch.get_device_module(device).get_rng_state()
    name, key, *rest = np.random.get_state()
    numpy = [name, np.asarray(key).tolist(), *rest]
    return tensors, {"others": json.dumps({"python": random.getstate(), "numpy": numpy})}


def _restore_random_states(path: Path, device: torch.device) -> None:
    """Set them again; a kind of device that the checkpoint does not know keeps its own."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        others = json.loads(file.metadata()["others"])
    version, key, gauss = others["python"]
    random.setstate((version, tuple(key), gauss))
    np.random.set_state(tuple(others["numpy"]))
    torch.set_rng_state(tensors["cpu"])
    if device.type != "cpu" and device.type in tensors:
        torch.get_device_module(device).set_rng_state(tensors[device.type])


def _complete(partial: Path, complete: Path, facts: dict[str, Any]) -> None:
    """List the files, push all of it to disk, and give the folder its name."""
    files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1))
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
