"""metrics.jsonl: one JSON object a line, each with its step, cut back when a run resumes.

A run that was resumed with another setting has a record of that: ``{"step": 500, "changed":
{"max_steps": [500, 1000]}}``, what it was and what it has been since.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sce_lm.files import replacing

CHANGED = "changed"
"""The entry of a record that says which fields of the configuration changed at its step."""


@dataclass(frozen=True)
class MetricsLog:
    """The records of a run, appended line by line by the one process that writes."""

    path: Path

    def append(self, record: dict[str, Any]) -> None:
        """Add a record, which has a "step"."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Push all records to disk, so that a checkpoint never outlives the records before it."""
        with self.path.open("a") as file:
            os.fsync(file.fileno())

    def keep_until(self, step: int) -> None:
        """Drop the records after `step`, which a resumed run writes again; a change of settings
        after it holds from there now."""
        kept = [
            record | {"step": min(record["step"], step)}
            for record in read_metrics(self.path)
            if record["step"] <= step or CHANGED in record
        ]
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics.jsonl, in order; none if there is no such file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # Text after the last line break is a line that a killed process did not finish.
    try:
        return [json.loads(line) for line in lines[:-1]]
    except ValueError as error:
        raise ValueError(
            f"{path} has a line that is not JSON ({error}); it was damaged or is another file; put "
            "the one back that was written."
        ) from None


def with_costs(records: Iterable[dict[str, Any]], vocabulary: int) -> list[dict[str, Any]]:
    """The records of a finished run, each with what training, evaluation left out, had taken up to
    its step: ``seconds``, and the ``inner products in the loss`` (of the hidden width, in its
    forward passes; an objective that draws nothing takes one with every class)."""
    seconds, products, step, found = 0.0, 0.0, 0, []
    for record in records:
        if "seconds_per_step" in record:
            spent = record["seconds_per_step"] * (record["step"] - step)
            seconds, step = seconds + spent, record["step"]
            positions = record["tokens_per_second"] * spent
            products += positions * record.get("objective/products_per_position", vocabulary)
        found.append(record | {"seconds": seconds, "inner products in the loss": products})
    return found
