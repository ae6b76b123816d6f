"""A teacher's best classes of each block that a run trains on, stored as a
:class:`~sce_lm.teacher_folder.TeacherFolder`."""

from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from sce_lm.distillation import StoredTopK
from sce_lm.ops.teachers import Rest
from sce_lm.teacher_files import write_teacher
from sce_lm.teacher_folder import Stored, TeacherFolder
from sce_lm.training.distilling import RunTeacher, first_classes, load_teacher
from sce_lm.training.language_model import LanguageModelTask
from sce_lm.training.task_sources import build_task
from sce_lm.training.text_blocks import PackedText
from sce_lm.training.train_config import TrainConfig

ROWS_PER_PART = 256


def store_teacher(
    config: TrainConfig, folder: str | Path, accelerator: Accelerator, k: int, rest: Rest
) -> TeacherFolder:
    """Run `config.teacher` over the training blocks of `config`, `per_device_batch_size` at a time,
    and store its `k` best classes at `teacher_temperature`.

    A folder that was interrupted goes on; each process takes its share of the parts.

    Raises ValueError or FileNotFoundError, in one sentence, for data, a model or a folder that
    cannot be used, before the teacher runs.
    """
    if config.teacher is None:
        raise ValueError("No teacher is named; set teacher to a hub id or the folder of a model.")
    with accelerator.main_process_first():
        task = build_task(config)
    assert isinstance(task, LanguageModelTask)
    assert task.train is not None
    text, classes = task.train, len(task.tokenizer)
    if not 1 <= k <= classes:
        raise ValueError(f"k is {k}; give a number of classes in [1, {classes}].")
    dtype = getattr(torch, config.dtype)
    teacher = load_teacher(config.teacher, task.tokenizer, dtype=dtype)
    stored = Stored(
        teacher=config.teacher,
        text=text.key,
        rows=len(text),
        positions=text.length - 1,
        vocab_size=classes,
        k=k,
        rest=rest,
        temperature=config.teacher_temperature,
        rows_per_part=ROWS_PER_PART,
    )
    with accelerator.main_process_first():
        found = TeacherFolder.begin(folder, stored)
    teacher.model.to(accelerator.device)
    accelerator.wait_for_everyone()  # who looks later finds the parts of the others
    own = found.missing()[accelerator.process_index :: accelerator.num_processes]
    accelerator.wait_for_everyone()
    size = config.per_device_batch_size
    bar = tqdm(
        total=sum(len(stored.rows_of(part)) for part in own),
        desc="teach",
        unit="block",
        disable=not accelerator.is_main_process,
    )
    with bar:
        for part in own:
            rows, pieces = stored.rows_of(part), []
            for start in range(0, len(rows), size):
                chosen = rows[start : start + size]
                pieces.append(_best(teacher, text, chosen, accelerator.device, stored))
                bar.update(len(chosen))
            ids, log_probs = (torch.cat(tensors) for tensors in zip(*pieces))
            write_teacher(found.part(part), StoredTopK(ids, log_probs, rest, stored.temperature))
    accelerator.wait_for_everyone()
    return found


def _best(
    teacher: RunTeacher, text: PackedText, rows: range, device: torch.device, stored: Stored
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, positions, k]`` ids and log-probabilities, on the CPU. The latter in half precision:
    off by at most 1 part in 2,000."""
    tokens = torch.stack([torch.from_numpy(text[row]) for row in rows]).to(device)
    scores = first_classes(teacher.scores({"input_ids": tokens}), stored.vocab_size)
    found = scores.top_k(stored.k, temperature=stored.temperature)
    return found.ids.int().cpu(), found.log_probs.half().cpu()
