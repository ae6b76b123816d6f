"""`SCECallback`: the objective's state beside each checkpoint of the Trainer, and in its logs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sce_lm.candidates.state import SCEState
from sce_lm.hf.adapter import objective_of


def state_file(checkpoint: Path, rank: int) -> Path:
    """Where one process keeps its state in a checkpoint folder."""
    return checkpoint / f"sce_state_rank{rank}.safetensors"


class SCECallback(TrainerCallback):
    """Saves, restores and logs the SCEState of the model that the Trainer trains.

    Every process has its own state, so each writes its own file into ``checkpoint-<step>`` and
    reads it when a run is resumed. The state's running averages are added to the training logs as
    ``sce/...``; to have a tracker such as TensorBoard see them too, put the callback before it:
    ``trainer.callback_handler.callbacks.insert(0, SCECallback())``.

    Args:
        resume_from: the checkpoint folder that ``trainer.train(resume_from_checkpoint=...)`` is
            given, needed only where that is not in ``output_dir`` (the Trainer does not tell its
            callbacks).
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = resume_from

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        sce_state = _sce_state(model)
        if sce_state is None or state.global_step == 0:
            return
        file = state_file(self._resumed_checkpoint(args, state), args.process_index)
        if file.is_file():
            sce_state.load(file)
        else:
            warnings.warn(
                f"resuming at step {state.global_step} without {file}; the SCEState starts anew, "
                "which is still unbiased. Give SCECallback(resume_from=...) the checkpoint folder "
                "if it lies elsewhere.",
                stacklevel=2,
            )

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        sce_state = _sce_state(model)
        if sce_state is None:
            return
        folder = _checkpoint(args, state)
        # A folder that is not there must not be made: the Trainer would resume from an empty one.
        if folder.is_dir():
            sce_state.save(state_file(folder, args.process_index))
        else:
            warnings.warn(f"{folder} is gone; this SCEState was not saved there.", stacklevel=2)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        sce_state = _sce_state(model)
        if sce_state is None or logs is None or "loss" not in logs:
            return
        figures = {f"sce/{name}": value for name, value in sce_state.summary().items()}
        logs.update(figures)
        if state.log_history:  # a copy of logs, made before the callbacks were called
            state.log_history[-1].update(figures)

    def _resumed_checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        if self.resume_from is not None:
            return Path(self.resume_from)
        named = args.resume_from_checkpoint
        if isinstance(named, str) and Path(named).is_dir():
            return Path(named)
        return _checkpoint(args, state)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _sce_state(model: Any) -> SCEState | None:
    objective = None if model is None else objective_of(model)
    return None if objective is None else objective.state
