"""The best model by a validation figure, kept on disk, and when to stop waiting for a better one.

    RUN/best/step-00000500/model.safetensors     weights of the best evaluation

What has been evaluated is in metrics.jsonl, so a resumed run knows it from there. The weights of an
earlier best go only when a checkpoint is written after its successor: a run that goes back to its
last checkpoint still finds the best of the steps before. As long as there are checkpoints to go on
from, the best weights stay beside them.
"""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel

from sce_lm.files import in_one_line, replacing

WEIGHTS = "model.safetensors"


class BestModel:
    """Follows the validations of a run; every process sees the same ones."""

    def __init__(
        self,
        folder: Path,
        figure: str,
        higher_is_better: bool,
        records: Iterable[dict[str, Any]] = (),
    ):
        """What `records` of metrics.jsonl say of a figure; weights of its best are in `folder`."""
        self.folder = folder
        self.sign = 1.0 if higher_is_better else -1.0
        self.step = self.last_step = self.evaluations_since = 0
        self._score = -math.inf
        for record in records:
            if record.get(figure) is not None:
                self.update(record["step"], record[figure])

    def update(self, step: int, value: float) -> bool:
        """Take note of an evaluation; whether it is the best so far (the first of equal ones)."""
        self.last_step = step
        is_best = self.sign * value > self._score
        if is_best:
            self.step, self._score, self.evaluations_since = step, self.sign * value, 0
        else:
            self.evaluations_since += 1
        return is_best

    def save(self, model: PreTrainedModel) -> None:
        """Keep the weights as those of the best step."""
        path = self._weights(self.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_model(model, str(partial))

    def load(self, model: PreTrainedModel) -> None:
        """Give a model the weights of the best step.

        Raises ValueError if their file is damaged.
        """
        path = self._weights(self.step)
        try:
            load_model(model, path)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{path} does not hold the weights of the best evaluation "
                f"({in_one_line(error)}); delete it, and the best is looked for from the newest "
                "checkpoint on."
            ) from error

    def is_missing(self) -> bool:
        """True if there was a best evaluation and its weights were not kept."""
        return self.step > 0 and not self._weights(self.step).exists()

    def remove_earlier(self) -> None:
        """Drop the weights of all but the best step."""
        for folder in self.folder.glob("step-*"):
            if folder != self._weights(self.step).parent:
                shutil.rmtree(folder)

    def remove(self) -> None:
        """Drop all weights, when the run has saved its model."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _weights(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}" / WEIGHTS
