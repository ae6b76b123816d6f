"""Train a causal language model or a recommender on item tokens.

    sce-lm train CONFIG.yaml [--field value ...]
    accelerate launch --num_processes 2 -m sce_lm train CONFIG.yaml [--field value ...]

A run that was stopped goes on when the same command is given again. `--help` lists the fields.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended: 128 and the number of the signal."""


def main(prog: str, arguments: Sequence[str]) -> int | None:
    """Train as the arguments say."""
    try:
        from safetensors import SafetensorError

        from sce_lm.training.command_line import parse_config
        from sce_lm.training.processes import start_missing_processes
        from sce_lm.training.run_building import build_run

        start_missing_processes()
        run = build_run(parse_config(arguments, prog))
    except KeyboardInterrupt:
        print(f"{prog}: Interrupted before the first step; nothing is lost.", file=sys.stderr)
        return INTERRUPTED
    if run.is_main:
        print("Data:", json.dumps(run.task.describe(), indent=2))
        print(run.memory)
    try:
        summary = run.train()
    except FloatingPointError as error:
        raise ValueError(error) from error
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"Stopped after step {run.step}, as a file could not be written ({error}); "
            f"make room or correct that; {run.how_to_go_on()}"
        ) from error
    except KeyboardInterrupt:
        if run.is_main:
            print(
                f"{prog}: Interrupted after step {run.step}; {run.how_to_go_on()}",
                file=sys.stderr,
            )
        return INTERRUPTED
    if run.is_main:
        for line in ending(summary):
            print(line)
        print(f"The run is in {run.folder}; all figures in {run.folder.summary}")
    return None


def ending(summary: Mapping[str, Any]) -> list[str]:
    """The figures of a run that one looks at first; the others are in its summary."""
    lines = [f"Steps: {summary['steps']}, the last loss {summary['loss']:.4f}"]
    for name in ("validation", "test", "objective_error"):
        figures = {n: v for n, v in summary[name].items() if isinstance(v, float)}
        shown = ", ".join(f"{figure} {value:.4f}" for figure, value in figures.items())
        lines += [f"{name.replace('_', ' ').capitalize()}: {shown}"] * bool(shown)
    seconds, in_loss = summary["seconds_per_step"], summary["loss_seconds_per_step"]
    return [*lines, f"Seconds a step: {seconds:.3f}, in the loss {in_loss:.3f}"]
