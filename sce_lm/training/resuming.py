"""What may differ between a run and the configuration that it is resumed with.

A field of the configuration is of one of three kinds:

- no step and no figure depends on it (`FREE`): it may change;
- steps that are to come, or figures, depend on it (`NOTED`): it may change, which is printed and
  recorded in metrics.jsonl;
- any other defines the run: a folder goes on with the same one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import get_scheduler

from sce_lm.training.metrics_file import CHANGED
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.task_sources import SOURCE_FIELDS
from sce_lm.training.train_config import TrainConfig

FREE = (
    "output_dir",
    "cache_dir",
    "resume",
    "resume_with_changed_data",
    "process_timeout",
    "checkpoint_every",
    "checkpoints_to_keep",
    *SOURCE_FIELDS,  # the fingerprint of the data decides
)

EVALUATION = ("eval_k", "eval_batches", "eval_users", "mask_seen")
"""Fields whose change makes held-out figures that cannot be compared with those before."""

NOTED = (
    "max_steps",
    "num_epochs",
    "eval_every",
    "log_every",
    "patience",
    "probe_every",
    "trackers",
    "keep_best",
    *EVALUATION,
)


def changed_fields(
    before: dict[str, Any], config: TrainConfig, folder: RunFolder
) -> dict[str, list[Any]]:
    """What a run was started with, and what it is to go on with, by the field's name.

    A field that an older version did not have was at its default.

    Args:
        before: what `RunFolder.fields` found.

    Raises ValueError if a field that defines the run differs.
    """
    before = TrainConfig.defaults() | before
    differing = {
        name: [before[name], now]
        for name, now in config.to_dict().items()
        if name not in FREE and before[name] != now
    }
    refused = [name for name in differing if name not in NOTED]
    if refused:
        changes = ", ".join("{} {!r} -> {!r}".format(n, *differing[n]) for n in sorted(refused))
        raise ValueError(
            f"{folder} holds a run with another configuration ({changes}); go on "
            "with the same one, or choose another output_dir."
        )
    return differing


def describe_changes(changed: dict[str, list[Any]], config: TrainConfig, step: int) -> list[str]:
    """A sentence about each changed field of a run that goes on from `step`."""
    sentences = []
    for name, (old, new) in changed.items():
        sentence = f"{name} was {old!r} and is {new!r} from step {step} on"
        if name == "max_steps":
            before, now = (_learning_rate(config, step, steps) for steps in (old, new))
            sentence += (
                f": the {config.scheduler} schedule is that of {new} steps now, so the learning "
                f"rate there is {now:.4g} where it was {before:.4g}"
                if now != before
                else ", with the same learning rate"
            )
            if new <= step:
                sentence += "; the run is past its end, so it is not trained further"
        if name in EVALUATION:
            sentence += (
                "; figures before and after cannot be compared, so the best evaluation (keep_best, "
                "patience) is looked for anew"
            )
        sentences.append(f"{sentence}.")
    return sentences


def comparable(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records since evaluations have been made as they are now."""
    start = 0
    for index, record in enumerate(records):
        if not set(EVALUATION).isdisjoint(record.get(CHANGED, ())):
            start = index + 1
    return list(records[start:])


def _learning_rate(config: TrainConfig, step: int, max_steps: int) -> float:
    schedule: Any = get_scheduler(
        config.scheduler,
        torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate),
        num_warmup_steps=config.warmup_steps,
        num_training_steps=max_steps,
    )
    return config.learning_rate * schedule.lr_lambdas[0](step)
