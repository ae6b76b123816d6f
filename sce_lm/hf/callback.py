"""`SCECallback`: the objective and its state in each checkpoint of the Trainer, and in its logs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sce_lm.hf.adapter import (
    accept_new_state,
    loss_seconds,
    objective_figures,
    objective_of,
    probe_loss,
    smooth_labels,
)
from sce_lm.hf.saving import save_objective, state_file
from sce_lm.objectives import Objective


class SCECallback(TrainerCallback):
    """Saves, restores and logs the objective of the model that the Trainer trains.

    Its options go into ``checkpoint-<step>/objective.json``, so that
    :func:`~sce_lm.hf.load_objective` builds it again. Every process has an SCEState of its own,
    writes its own file there, and reads it when a run is resumed; in a hyper-parameter search they
    lie in the folders of the trials. Its running averages (coverage,
    relative error of Zhat, candidates and products per position) and the seconds that the loss took
    in a step are added to the training logs as ``sce/...``; to have a tracker such as TensorBoard
    see them too, put the callback before it:
    ``trainer.callback_handler.callbacks.insert(0, SCECallback())``.

    Args:
        resume_from: the checkpoint folder that ``trainer.train(resume_from_checkpoint=...)`` is
            given, needed only where that is not in ``output_dir`` (the Trainer does not tell its
            callbacks).
        probe_every: training losses from one comparison with exact cross-entropy to the next
            (:mod:`sce_lm.objectives.probe`), logged as ``sce/probe_...``; 0: none.

    With ``label_smoothing_factor`` in the Trainer's arguments the training loss stays the
    objective, smoothed, though the Trainer keeps the labels from the model; the positions that they
    mask are then computed too, since the Trainer does not tell which they are.

    It warns once where the relative error says that there are too few candidates.
    """

    def __init__(self, resume_from: str | Path | None = None, probe_every: int = 0) -> None:
        self.resume_from = resume_from
        self.probe_every = probe_every
        self.logged_seconds = 0.0
        self.logged_steps = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        objective = _objective(model)
        if objective is None:
            return
        smooth_labels(model, args.label_smoothing_factor)
        self.logged_seconds, self.logged_steps = loss_seconds(model), state.global_step
        if self.probe_every:
            probe_loss(model, self.probe_every)
        if objective.state is None:
            return
        objective.state.forget_calls()
        if state.global_step == 0:
            return
        file = state_file(self._resumed_checkpoint(args, state), args.process_index)
        if file.is_file():
            objective.state.load(file)
        else:
            accept_new_state(model)
            warnings.warn(
                f"resuming at step {state.global_step} without {file}; the SCEState starts anew, "
                "which is still unbiased. Give SCECallback(resume_from=...) the checkpoint folder "
                "if it lies elsewhere.",
                stacklevel=2,
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if _objective(model) is not None:
            smooth_labels(model, 0.0)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        objective = _objective(model)
        if objective is not None:
            objective.end_step(args.device)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        objective = _objective(model)
        if objective is None:
            return
        # Of two trials with the same history, or before another process has written it, the one
        # that was written to last is this one.
        folders = _checkpoints(args, state)
        folder = max(folders, key=lambda f: (_has_history(f, state), _last_written(f)))
        # A folder that is not there must not be made: the Trainer would resume from an empty one.
        if folder.is_dir():
            save_objective(objective, folder, args.process_index)
        else:
            warnings.warn(f"{folder} is gone; the objective was not saved there.", stacklevel=2)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if _objective(model) is None or logs is None or "loss" not in logs:
            return
        figures = objective_figures(model)
        seconds, steps = loss_seconds(model), state.global_step
        if steps > self.logged_steps:
            figures["loss_seconds"] = (seconds - self.logged_seconds) / (steps - self.logged_steps)
        self.logged_seconds, self.logged_steps = seconds, steps
        figures = {f"sce/{name}": value for name, value in figures.items()}
        logs.update(figures)
        if state.log_history:  # a copy of logs, made before the callbacks were called
            state.log_history[-1].update(figures)

    def _resumed_checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        if self.resume_from is not None:
            return Path(self.resume_from)
        named = args.resume_from_checkpoint
        if isinstance(named, str) and Path(named).is_dir():
            return Path(named)
        folders = _checkpoints(args, state)
        return next((f for f in folders if _has_history(f, state)), folders[0])


def _checkpoints(args: TrainingArguments, state: TrainerState) -> list[Path]:
    """Folders of this step's checkpoint: the one in ``output_dir``, or in a hyper-parameter search
    those of all trials. They lie in folders whose names the Trainer does not tell its callbacks."""
    root, name = Path(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    folders = [root / name]
    if state.is_hyper_param_search:
        folders += root.glob(f"*/{name}")
        if state.trial_name is not None:  # with slashes, perhaps
            folders.append(root / state.trial_name / name)
    return folders


def _has_history(folder: Path, state: TrainerState) -> bool:
    """Whether the Trainer's own state in ``folder`` tells of the run so far."""
    try:
        saved = json.loads((folder / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return json.dumps(saved.get("log_history")) == json.dumps(state.log_history)


def _last_written(folder: Path) -> int:
    return max((file.stat().st_mtime_ns for file in folder.glob("*")), default=0)


def _objective(model: Any) -> Objective | None:
    return None if model is None else objective_of(model)
