"""The folder of a run: what its files are called, and what is read and written as a whole.

    config.json, objective.json     what was asked for; a later start must ask for the same, but for
                                    the fields that `resuming` names
    metrics.jsonl                   records of training and validation, each with its step
    report.png                      what they say: curves, errors of the objective, where time went
    checkpoints/                    complete states to go on from (`checkpoint`)
    best/                           with keep_best, the best weights, while there are checkpoints
    data.json                       sizes of the data and how they were split
    data.md                         the same for people, with sources and choices (`data_card`)
    stored_data/                    what was derived from them: split, tokenizer, held-out text
    model/                          the trained model and tokenizer, for from_pretrained
    summary.json                    the figures at the end; it is there when the run is finished
    evaluation*.json                figures of `sce-lm evaluate`, and of a recommender
    popularity.png                  the popularity of what it recommends
    .lock, .lock.json               while a process trains here (`lock`)

A run is there when its config.json is, which is therefore written last.
"""

import warnings
from pathlib import Path
from typing import Any

from sce_lm import objectives
from sce_lm.files import read_json, write_json
from sce_lm.hf.saving import OBJECTIVE_FILE
from sce_lm.objectives import Objective
from sce_lm.training.metrics_file import read_metrics
from sce_lm.training.train_config import TrainConfig


class RunFolder:
    """Paths of a run's files, whether they are there or not; as text it is the folder's path."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.objective = self.path / OBJECTIVE_FILE
        self.metrics = self.path / "metrics.jsonl"
        self.report = self.path / "report.png"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.data = self.path / "data.json"
        self.data_card = self.path / "data.md"
        self.stored_data = self.path / "stored_data"
        self.model = self.path / "model"
        self.summary = self.path / "summary.json"
        self.popularity = self.path / "popularity.png"
        self.lock = self.path / ".lock"
        self.lock_holder = self.path / ".lock.json"

    def __str__(self) -> str:
        return str(self.path)

    def has_begun(self) -> bool:
        """Whether a run is there."""
        return self.config.exists()

    def begin(self, config: TrainConfig, objective: Objective, data: dict[str, Any]) -> None:
        """Write what a run is asked for and its `Task.describe()`."""
        write_json(self.data, data)
        write_json(self.objective, objective.to_dict())
        write_json(self.config, config.to_dict())

    def fields(self) -> dict[str, Any]:
        """The configuration that the run began with, as `TrainConfig(**fields)` takes it.

        A field that this version does not have is left out with a warning, and so are options of
        the objective.

        Raises ValueError or FileNotFoundError if there is no configuration to be read.
        """
        stored = read_json(self.config)
        if not isinstance(stored, dict):
            raise ValueError(
                f"{self.config} holds {stored!r:.60}; expected the configuration of a run; put the "
                "file back that was written."
            )
        known = TrainConfig.defaults()
        unknown = sorted(stored.keys() - known)
        if unknown:
            values = ", ".join(f"{name} {stored.pop(name)!r}" for name in unknown)
            warnings.warn(
                f"{self} was made by another version, whose configuration had {values}; this "
                "version has no such field and goes on without.",
                stacklevel=2,
            )
        if stored.get("objective_options"):
            name = stored.get("objective", known["objective"])
            options = objectives.current_options(name, stored["objective_options"])
            stored["objective_options"] = options
        return stored

    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds."""
        return read_metrics(self.metrics)

    def finished_steps(self) -> int:
        """The steps of the run when it was finished; 0: it is not."""
        return read_json(self.summary)["steps"] if self.summary.exists() else 0

    def evaluation(self, on: str = "test", data: str | None = None) -> Path:
        """Where the figures of an evaluation go: of the run's test or validation, or other data."""
        if data is not None:
            return self.path / f"evaluation-of-{Path(data).name}.json"
        return self.path / ("evaluation.json" if on == "test" else f"evaluation-{on}.json")

    def is_saved_model(self) -> bool:
        """Whether this is no run's folder but one that save_pretrained wrote."""
        return self.config.exists() and "model_type" in read_json(self.config)
