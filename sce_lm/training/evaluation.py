"""The final evaluation of a run, made again from its folder."""

import json
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM

from sce_lm import objectives
from sce_lm.hf.adapter import apply_sce
from sce_lm.training.config import TrainConfig
from sce_lm.training.sources import build_task


def evaluate_run(folder: Path, accelerator: Accelerator) -> dict[str, float]:
    """Exact likelihood on all held-out text, or full-catalogue metrics on the test items.

    Args:
        folder: a finished run.
        accelerator: evaluation is shared by its processes, in its precision.

    Raises ValueError if the folder holds no finished run; see `build_task` for its data.
    """
    for needed in ("config.json", "model"):
        if not (folder / needed).exists():
            raise ValueError(
                f"{folder} has no {needed}; expected the folder of a finished run of "
                "scripts/train.py; check the path, or let the run come to its end."
            )
    config = TrainConfig(**json.loads((folder / "config.json").read_text()))
    set_seed(config.seed)
    with accelerator.main_process_first():
        task = build_task(config)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=config.dtype)
    apply_sce(model, objectives.get("exact"))
    model = accelerator.prepare_model(model, evaluation_mode=True)
    return task.evaluate(accelerator.unwrap_model(model).eval(), accelerator, final=True)
