"""Train a causal language model or a recommender on item tokens.

    python scripts/train.py CONFIG.yaml [--field value ...]
    accelerate launch --num_processes 2 scripts/train.py CONFIG.yaml [--field value ...]

A run that was stopped goes on when the same command is given again. `--help` lists the fields.
"""

import json
import sys

from safetensors import SafetensorError

INTERRUPTED = 130
"""Exit status of a program that Ctrl-C ended: 128 and the number of the signal."""


def main() -> None:
    try:
        from sce_lm.training.command_line import parse_config
        from sce_lm.training.processes import start_missing_processes
        from sce_lm.training.run_building import build_run

        start_missing_processes()
        run = build_run(parse_config(sys.argv[1:]))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        print("train.py: Interrupted before the first step; nothing is lost.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if run.is_main:
        print("Data:", json.dumps(run.task.describe(), indent=2))
        print(run.memory)
    try:
        summary = run.train()
    except (FloatingPointError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    except (OSError, SafetensorError) as error:
        sys.exit(
            f"train.py: Stopped after step {run.step}, as a file could not be written ({error}); "
            f"make room or correct that; {run.how_to_go_on()}"
        )
    except KeyboardInterrupt:
        if run.is_main:
            print(
                f"train.py: Interrupted after step {run.step}; {run.how_to_go_on()}",
                file=sys.stderr,
            )
        sys.exit(INTERRUPTED)
    if run.is_main:
        print(json.dumps(summary, indent=2))
        print(f"The run is in {run.folder}")


if __name__ == "__main__":
    main()
