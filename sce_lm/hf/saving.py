"""An objective beside the weights it trains: its options as JSON, its state as safetensors.

    objective.json                   name and options; `objectives.from_dict` builds it again
    sce_state_rank0.safetensors      what one process counted so far, one file a process

`SCECallback` writes both into every checkpoint of the Trainer; `sce-lm train` writes the
options into its run folder and the state into its checkpoints. The weights stay those of a stock
model, so a folder is loaded in two lines:

    model = AutoModelForCausalLM.from_pretrained(folder)
    apply_sce(model, load_objective(folder))
"""

from __future__ import annotations

import os
from pathlib import Path

from sce_lm import objectives
from sce_lm.files import read_json, write_json
from sce_lm.objectives import Objective

OBJECTIVE_FILE = "objective.json"


def state_file(folder: Path, rank: int) -> Path:
    """Where one process keeps its state in a folder."""
    return folder / f"sce_state_rank{rank}.safetensors"


def save_objective(objective: Objective, folder: str | os.PathLike, rank: int = 0) -> None:
    """Write an objective into an existing folder; only rank 0 writes the options.

    A state that has counted nothing yet is not written.
    """
    folder = Path(folder)
    if rank == 0:
        write_json(folder / OBJECTIVE_FILE, objective.to_dict())
    if objective.state is not None and not objective.state.is_new:
        objective.state.save(state_file(folder, rank))


def load_objective(folder: str | os.PathLike, rank: int = 0) -> Objective:
    """The objective that a folder was saved with, and this process's state if the folder has it.

    Options that an earlier version saved and this one does not have are named in one warning.

    Raises:
        FileNotFoundError: the folder has no objective.json.
        ValueError: the file names no objective of this version, or one of the two is damaged.
    """
    folder = Path(folder)
    file = folder / OBJECTIVE_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; give a folder that SCECallback, save_objective or "
            "sce-lm train wrote, or build the objective with objectives.get(...)."
        )
    options = read_json(file)
    if not isinstance(options, dict) or "name" not in options:
        raise ValueError(
            f"{file} holds {options!r:.60}; expected the name and options of an objective; put the "
            "file back that was written."
        )
    objective = objectives.from_dict(options)
    state = state_file(folder, rank)
    if objective.state is not None and state.is_file():
        objective.state.load(state)
    return objective
