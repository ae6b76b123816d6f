"""From a configuration to a run that is ready to go: checked, built, and restored if it had begun.

Everything that can be refused is refused here, what takes no time first, and before anything is
written.
"""

import dataclasses
import math
import warnings
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_scheduler

from sce_lm import objectives
from sce_lm.files import replacing
from sce_lm.hf.adapter import apply_sce, probe_loss
from sce_lm.objectives import Objective
from sce_lm.teacher_folder import TeacherFolder
from sce_lm.training.best import BestModel
from sce_lm.training.checkpoint import Checkpoints
from sce_lm.training.data_card import data_card
from sce_lm.training.distilling import Distillation, load_teacher, stored_teacher
from sce_lm.training.language_model import LanguageModelTask
from sce_lm.training.learner import Learner
from sce_lm.training.lock import RunLock
from sce_lm.training.loop import Run
from sce_lm.training.memory_prediction import estimate_memory
from sce_lm.training.metrics_file import CHANGED, MetricsLog
from sce_lm.training.models import add_lora, build_model
from sce_lm.training.optimizers import build_optimizer, check_optimizer, make_row_sparse
from sce_lm.training.processes import build_accelerator
from sce_lm.training.resuming import changed_fields, comparable, describe_changes
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.stored_data import store
from sce_lm.training.task import DataOrder, Task
from sce_lm.training.task_sources import build_task, resume_task
from sce_lm.training.train_config import DENSE, TrainConfig

Changes = dict[str, list[Any]]
"""What a field was and what it is, by its name."""


def build_run(config: TrainConfig) -> Run:
    """A run whose `train()` begins, goes on, or gives the summary of a run that is finished.

    Raises ValueError, OSError or TypeError, in one sentence, for a configuration, data, model or
    run folder that cannot be used. The folder is free again then.
    """
    folder = RunFolder(config.output_dir)
    lock = RunLock(folder)
    try:
        objective = objectives.get(config.objective, **config.objective_options)
        accelerator = _start_processes(config, objective)
        if accelerator.is_main_process:
            lock.acquire()
        _check_folder(config, folder)
        set_seed(config.seed)
        task, data_note = _read_data(config, folder, accelerator)
        config = _with_steps(config, folder, task, accelerator.num_processes)
        changes = _check_folder(config, folder)
        run = _assemble(config, folder, lock, accelerator, task, objective)
        if not run.is_finished:
            _take_up(run, changes, data_note)
        elif changes and run.is_main:
            tqdm.write(
                f"{folder} is finished, so what it holds stays as it is; {', '.join(changes)} "
                "would change what is to come."
            )
        return run
    except BaseException:
        lock.release()
        raise


def _start_processes(config: TrainConfig, objective: Objective) -> Accelerator:
    """Refuse trackers, processes and optimisers that do not work here."""
    missing = set(config.trackers) - {str(t) for t in get_available_trackers()}
    if missing:
        raise ValueError(
            f"The tracker {missing.pop()!r} is not known to accelerate or not installed; "
            "install it, or leave it out of trackers."
        )
    trackers: list[Any] = [*config.trackers]
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=config.process_timeout))
    accelerator = build_accelerator(
        mixed_precision=config.mixed_precision,
        log_with=trackers or None,
        project_dir=config.output_dir,
        kwargs_handlers=[timeout],
    )
    check_optimizer(config.optimizer, objective, accelerator.distributed_type)
    return accelerator


def _check_folder(config: TrainConfig, folder: RunFolder) -> Changes:
    """Refuse a folder that holds another run, and return what may differ and does."""
    if not folder.has_begun():
        return {}
    if not config.resume:
        raise ValueError(
            f"{folder} already holds a run and resume is off; choose another output_dir, or delete "
            "the folder."
        )
    return changed_fields(folder.fields(), config, folder)


def _read_data(
    config: TrainConfig, folder: RunFolder, accelerator: Accelerator
) -> tuple[Task, str | None]:
    """The task, and what to tell about the data of a run that had begun."""
    has_begun = folder.has_begun()
    with accelerator.main_process_first():
        return resume_task(config, folder) if has_begun else (build_task(config), None)


def _with_steps(config: TrainConfig, folder: RunFolder, task: Task, processes: int) -> TrainConfig:
    """With the steps of the epochs, if those are given; a run that goes on keeps its own."""
    if config.num_epochs is None:
        return config
    before = folder.fields() if folder.has_begun() else {}
    if before.get("num_epochs") == config.num_epochs:
        return dataclasses.replace(config, max_steps=before["max_steps"])
    rows = config.per_device_batch_size * config.gradient_accumulation_steps * processes
    steps = math.ceil(config.num_epochs * task.num_rows / rows)
    return dataclasses.replace(config, max_steps=steps)


def _assemble(
    config: TrainConfig,
    folder: RunFolder,
    lock: RunLock,
    accelerator: Accelerator,
    task: Task,
    objective: Objective,
) -> Run:
    """A run before its first step; one that was finished before stands at its last."""
    model, by_rows = _build_model(config, task, objective)
    model.to(accelerator.device)
    batch_size, accumulation = config.per_device_batch_size, config.gradient_accumulation_steps
    order = DataOrder(task.num_rows, batch_size, accumulation, config.seed)
    first_batch = task.batch(next(order.step_batches(0, 0, 1)))
    distillation = _build_distillation(config, accelerator, task, objective)
    teacher_bytes = distillation and distillation.teacher.num_bytes
    memory = estimate_memory(
        model, objective, first_batch, config.optimizer, by_rows, teacher_bytes
    )
    if not memory.fits:
        warnings.warn(
            f"This run will probably not fit. {memory} Lower per_device_batch_size (with "
            "gradient_accumulation_steps), or choose an objective that holds less.",
            stacklevel=3,
        )
    learner = _build_learner(config, accelerator, objective, model, by_rows)
    learner.distillation = distillation
    # From here on each process draws its own dropout and its own candidates.
    set_seed(config.seed, device_specific=True)
    run = Run(
        config=config,
        folder=folder,
        lock=lock,
        accelerator=accelerator,
        task=task,
        order=order,
        learner=learner,
        memory=memory,
        metrics=MetricsLog(folder.metrics),
        checkpoints=Checkpoints(folder.checkpoints, learner, config.checkpoints_to_keep),
        best=_best_of(folder, task, comparable(folder.records())),
        step=folder.finished_steps(),
    )
    run.is_finished = run.step > 0 and run.is_over()
    return run


def _build_model(
    config: TrainConfig, task: Task, objective: Objective
) -> tuple[PreTrainedModel, list[nn.Parameter]]:
    """The model with the objective applied, and what of it is trained by rows."""
    model = build_model(config, task.tokenizer, **task.model_fields())
    task.check_model(model)
    if config.lora_rank:
        model = add_lora(model, config.lora_rank)
    apply_sce(model, objective)
    if config.probe_every:
        probe_loss(model, config.probe_every)
    return model, [] if config.optimizer in DENSE else make_row_sparse(model)


def _build_distillation(
    config: TrainConfig, accelerator: Accelerator, task: Task, objective: Objective
) -> Distillation | None:
    if config.teacher is None:
        return None
    assert isinstance(task, LanguageModelTask)
    assert task.train is not None
    if TeacherFolder.is_at(config.teacher):
        teacher = stored_teacher(config.teacher, task.train, config)
    else:
        dtype = getattr(torch, config.dtype)
        teacher = load_teacher(config.teacher, task.tokenizer, dtype=dtype)
        teacher.model.to(accelerator.device)
    return Distillation(teacher, config, objective)


def _build_learner(
    config: TrainConfig,
    accelerator: Accelerator,
    objective: Objective,
    model: PreTrainedModel,
    by_rows: list[nn.Parameter],
) -> Learner:
    optimizer = build_optimizer(model, config, by_rows)
    if by_rows and objective.state is not None:
        objective.state.row_sum.follow(optimizer, by_rows[-1])
    prepared, accelerated = accelerator.prepare(model, optimizer)
    scheduler = get_scheduler(
        config.scheduler, accelerated.optimizer, config.warmup_steps, config.max_steps
    )
    return Learner(
        accelerator, objective, prepared, accelerated, scheduler, by_rows, config.max_grad_norm
    )


def _best_of(folder: RunFolder, task: Task, records: list[dict[str, Any]]) -> BestModel:
    figure = f"validation/{task.headline[0]}"
    return BestModel(folder.best, figure, task.higher_is_better, records)


def _take_up(run: Run, changes: Changes, data_note: str | None) -> None:
    """Put the run where its newest checkpoint is, or at its start, and record that."""
    run.checkpoints.remove_leftovers()
    _go_back_to_checkpoint(run)
    if run.is_main:
        _record_start(run, changes, data_note)
    run.accelerator.wait_for_everyone()
    run.best = _best_of(run.folder, run.task, comparable(run.folder.records()))
    if run.config.keep_best and run.best.is_missing():
        if run.is_main:
            tqdm.write(
                f"The weights of the best evaluation, of step {run.best.step}, were not kept, so "
                f"the best is looked for from step {run.step} on."
            )
        run.best = _best_of(run.folder, run.task, [])


def _go_back_to_checkpoint(run: Run) -> None:
    """Go back to the newest checkpoint, or to the first step of a run that has none yet."""
    newest = run.checkpoints.newest()
    if newest is None and run.step:
        raise ValueError(
            f"{run.folder} holds a run that ended after {run.step} steps and kept no checkpoint to "
            "go on from; choose another output_dir, or start over in an empty folder with a "
            "checkpoint_every above 0."
        )
    if newest is None:
        return
    found, processes = run.checkpoints.load(newest), run.accelerator.num_processes
    run.step = found["step"]
    run.order.accumulation = found["batches"] // processes
    if found["processes"] != processes:
        set_seed(run.config.seed + run.step, device_specific=True)


def _record_start(run: Run, changes: Changes, data_note: str | None) -> None:
    """Write what the run is made of and where it starts from."""
    if not run.folder.has_begun():
        store(run.task, run.folder)
    run.metrics.keep_until(run.step)
    for sentence in describe_changes(changes, run.config, run.step):
        tqdm.write(sentence)
    if changes:
        run.metrics.append({"step": run.step, CHANGED: changes})
    if data_note:
        warnings.warn(data_note, stacklevel=4)
        run.metrics.append({"step": run.step, "data": data_note})
    described = run.task.describe()
    if not run.folder.data_card.exists():  # people may have written in it
        card = data_card(run.config, described, run.task.source)
        with replacing(run.folder.data_card) as partial:
            partial.write_text(card, encoding="utf-8")
    run.folder.begin(run.config, run.learner.objective, described)
