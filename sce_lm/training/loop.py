"""The training loop behind scripts/train.py, on one process or several.

A run lives in its folder:

    config.json, objective.json     what was asked for; a later start must ask for the same, but for
                                    the fields that `resuming` names
    metrics.jsonl                   records of training and validation, each with its step
    report.png                      what they say: curves, errors of the objective, where time went
    checkpoints/                    complete states to go on from
    best/                           with keep_best, the best weights, while there are checkpoints
    data.json                       sizes of the data and how they were split
    stored_data/                    what was derived from them: split, tokenizer, held-out text
    model/                          the trained model and tokenizer, for from_pretrained
    summary.json                    the figures at the end; it is there when the run is finished
    .lock, .lock.json               while a process trains here

An optimiser step sums the losses of all its positions, over accumulated batches and processes, and
divides by their number, as transformers' Trainer does: `num_items_in_batch`.
"""

import math
import statistics
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, set_seed
from tqdm.auto import tqdm
from transformers import get_scheduler

from sce_lm import objectives
from sce_lm.files import read_json, write_json
from sce_lm.hf.adapter import (
    apply_sce,
    loss_seconds,
    objective_figures,
    probe_loss,
    remove_sce,
)
from sce_lm.objectives.probe import Probe
from sce_lm.training.best import BestModel
from sce_lm.training.checkpoint import Checkpoints
from sce_lm.training.lock import RunLock
from sce_lm.training.memory_prediction import estimate_memory
from sce_lm.training.metrics_file import CHANGED, MetricsLog, read_metrics
from sce_lm.training.models import add_lora, build_model
from sce_lm.training.optimizers import (
    average_rows,
    build_optimizer,
    check_optimizer,
    clip_grad_norm_,
    make_row_sparse,
)
from sce_lm.training.plots import draw_report
from sce_lm.training.processes import check_processes
from sce_lm.training.resuming import changed_fields, comparable, describe_changes, stored_fields
from sce_lm.training.stored_data import store
from sce_lm.training.task import DataOrder, HeldOut, on_device, sum_over_processes
from sce_lm.training.task_sources import build_task, resume_task
from sce_lm.training.train_config import TrainConfig

VALIDATION_POSITIONS = 1024
"""Positions on which the objective is compared with exact cross-entropy at the end."""


class Run:
    """A training run, ready to go: everything that can be refused has been checked.

    Raises ValueError, OSError or TypeError, in one sentence, for a configuration, data, model or
    run folder that cannot be used.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.output_dir)
        self.lock = RunLock(self.folder)
        try:
            self._prepare(config)
        except BaseException:
            self.lock.release()
            raise

    def _prepare(self, config: TrainConfig) -> None:
        missing = set(config.trackers) - {str(t) for t in get_available_trackers()}
        if missing:
            raise ValueError(
                f"The tracker {missing.pop()!r} is not known to accelerate or not installed; "
                "install it, or leave it out of trackers."
            )
        self.objective = objectives.get(config.objective, **config.objective_options)
        trackers: list[Any] = [*config.trackers]
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=trackers or None,
            project_dir=config.output_dir,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=config.process_timeout))
            ],
        )
        check_processes(self.accelerator)
        check_optimizer(config.optimizer, self.objective, self.accelerator.distributed_type)
        self.is_main = self.accelerator.is_main_process
        self.processes = self.accelerator.num_processes
        if self.is_main:
            self.lock.acquire()
        changed = self._check_folder()

        set_seed(config.seed)
        data_note, has_begun = None, (self.folder / "config.json").exists()
        with self.accelerator.main_process_first():
            if has_begun:
                self.task, data_note = resume_task(config, self.folder)
            else:
                self.task = build_task(config)
        model = build_model(config, self.task.tokenizer)
        self.task.check_model(model)
        self.num_parameters = model.num_parameters()
        if config.lora_rank:
            model = add_lora(model, config.lora_rank)
        apply_sce(model, self.objective)
        if config.probe_every:
            probe_loss(model, config.probe_every)
        self.by_rows = [] if config.optimizer == "adamw" else make_row_sparse(model)
        optimizer = build_optimizer(model, config, self.by_rows)
        if self.by_rows and self.objective.state is not None:
            self.objective.state.row_sum.follow(optimizer, self.by_rows[-1])
        self.order = DataOrder(
            self.task.num_rows,
            config.per_device_batch_size,
            config.gradient_accumulation_steps,
            config.seed,
        )
        self.memory = estimate_memory(
            model.to(self.accelerator.device),
            self.objective,
            self.task.batch(next(self.order.step_batches(0, 0, 1))),
            config.optimizer,
            self.by_rows,
        )
        if not self.memory.fits:
            warnings.warn(
                f"This run will probably not fit. {self.memory} Lower per_device_batch_size (with "
                "gradient_accumulation_steps), or choose an objective that holds less.",
                stacklevel=2,
            )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.scheduler = get_scheduler(
            config.scheduler,
            self.optimizer.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        )
        # From here on each process draws its own dropout and its own candidates.
        set_seed(config.seed, device_specific=True)

        self.metrics = MetricsLog(self.folder / "metrics.jsonl")
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints",
            self.accelerator,
            self.model,
            self.optimizer,
            self.scheduler,
            self.objective,
            config.checkpoints_to_keep,
        )
        newest = self.checkpoints.newest()
        self.step = self._finished_step()
        self.best = self._best_so_far()
        self.is_finished = self.step > 0 and self._is_over()
        if self.is_finished:
            if changed and self.is_main:
                tqdm.write(
                    f"{self.folder} is finished, so what it holds stays as it is; "
                    f"{', '.join(changed)} would change what is to come."
                )
            return
        if newest is None and self.step:
            raise ValueError(
                f"{self.folder} holds a run that ended after {self.step} steps and kept no "
                "checkpoint to go on from; choose another output_dir, or start over in an empty "
                "folder with a checkpoint_every above 0."
            )
        self.step = 0
        if newest is not None:
            found = self.checkpoints.load(newest)
            self.step = found["step"]
            self.order.accumulation = found["batches"] // self.processes
            if found["processes"] != self.processes:
                set_seed(config.seed + self.step, device_specific=True)
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What was derived from the data comes first: a run is there when its config.json is.
            if not has_begun:
                store(self.task, self.folder)
            self.metrics.keep_until(self.step)
            if changed:
                for sentence in describe_changes(changed, config, self.step):
                    tqdm.write(sentence)
                self.metrics.append({"step": self.step, CHANGED: changed})
            if data_note:
                warnings.warn(data_note, stacklevel=3)
                self.metrics.append({"step": self.step, "data": data_note})
            write_json(self.folder / "data.json", self.task.describe())
            write_json(self.folder / "objective.json", self.objective.to_dict())
            write_json(self.folder / "config.json", config.to_dict())
        self.accelerator.wait_for_everyone()
        self.best = self._best_so_far()
        if config.keep_best and self.best.is_missing():
            if self.is_main:
                tqdm.write(
                    f"The weights of the best evaluation, of step {self.best.step}, were not kept, "
                    f"so the best is looked for from step {self.step} on."
                )
            self.best = self._best_among([])

    def _finished_step(self) -> int:
        """The step at which the folder's run was finished before; 0: it was not."""
        path = self.folder / "summary.json"
        return read_json(path)["steps"] if path.exists() else 0

    def _best_so_far(self) -> BestModel:
        return self._best_among(comparable(read_metrics(self.metrics.path)))

    def _best_among(self, records: Sequence[dict[str, Any]]) -> BestModel:
        figure, higher = f"validation/{self.task.headline[0]}", self.task.higher_is_better
        return BestModel(self.folder / "best", figure, higher, records)

    def _check_folder(self) -> dict[str, list[Any]]:
        """Refuse a folder that holds another run, and return what may differ and does."""
        if not (self.folder / "config.json").exists():
            return {}
        if not self.config.resume:
            raise ValueError(
                f"{self.folder} already holds a run and resume is off; choose another "
                "output_dir, or delete the folder."
            )
        return changed_fields(stored_fields(self.folder), self.config, self.folder)

    def train(self) -> dict[str, Any]:
        """Train from where the run stands to its end, and return the summary.

        A finished run is not trained again. Raises FloatingPointError if the loss is not finite,
        and OSError or SafetensorError if something cannot be written; `how_to_go_on` says what is
        left then, as after a KeyboardInterrupt.
        """
        with ExitStack() as at_the_end:
            at_the_end.callback(self.lock.release)
            return self._train(at_the_end)

    def how_to_go_on(self) -> str:
        """What has been kept of a run that was stopped, and how it goes on, in one sentence."""
        newest = self.checkpoints.newest()
        if newest is None:
            return (
                f"{self.folder} has no checkpoint yet; the same command starts again from the "
                "first step."
            )
        return f"{newest} is complete; the same command goes on from there."

    def _train(self, at_the_end: ExitStack) -> dict[str, Any]:
        config = self.config
        if self.is_finished:
            return read_json(self.folder / "summary.json")
        if config.trackers:
            settings = {
                k: v if isinstance(v, (int, float)) else str(v) for k, v in config.to_dict().items()
            }
            # TensorBoard hides what was logged after the checkpoint; the others start a run anew.
            options = {"tensorboard": {"purge_step": self.step + 1}}
            self.accelerator.init_trackers("sce_lm", config=settings, init_kwargs=options)
        bar = tqdm(
            total=config.max_steps,
            initial=self.step,
            desc=f"{config.task} {config.objective}",
            unit="step",
            disable=not self.is_main,
        )
        at_the_end.callback(bar.close)
        shown: dict[str, str] = {}
        window_seconds, window_steps, in_loss = 0.0, 0, loss_seconds(self.model)
        if self._is_over() and self.best.last_step != self.step:
            self._evaluate_now()  # what was evaluated here before was evaluated in another way
        while not self._is_over():
            started = time.perf_counter()
            figures = self._optimizer_step()
            self.step += 1
            is_last = self.step == config.max_steps
            is_logged = is_last or self.step % config.log_every == 0
            values = {name: value.item() for name, value in figures.items()} if is_logged else {}
            window_seconds += time.perf_counter() - started
            window_steps += 1
            if is_logged:
                spent = loss_seconds(self.model)
                seconds = {
                    "seconds_per_step": window_seconds / window_steps,
                    "loss_seconds_per_step": (spent - in_loss) / window_steps,
                }
                self._log_training(values, seconds, shown)
                window_seconds, window_steps, in_loss = 0.0, 0, spent
            if is_last or (config.eval_every and self.step % config.eval_every == 0):
                found = self._evaluate_now()
                shown |= {f"validation {n}": f"{found[n]:.4f}" for n in self.task.headline}
            if config.checkpoint_every and (
                self._is_over() or self.step % config.checkpoint_every == 0
            ):
                if self.is_main:
                    self.metrics.sync()
                self.checkpoints.save(self.step, self.order.accumulation * self.processes)
                if self.is_main:
                    self.best.remove_earlier()
            bar.set_postfix(shown, refresh=False)
            bar.update()
        bar.close()
        summary = self._finish()
        self.accelerator.end_training()
        return summary

    def _is_over(self) -> bool:
        patience = self.config.patience
        out_of_patience = 0 < patience <= self.best.evaluations_since
        return self.step >= self.config.max_steps or out_of_patience

    def _evaluate_now(self) -> dict[str, Any]:
        """Validate, record it, and keep the weights if they are the best."""
        found = self.evaluate("validation")
        # Without what belongs to the figures, their protocol for instance.
        self._record({f"validation/{k}": v for k, v in found.items() if type(v) is float})
        is_best = self.best.update(self.step, found[self.task.headline[0]])
        if is_best and self.config.keep_best and self.is_main:
            self.best.save(self.accelerator.unwrap_model(self.model))
            if not self.config.checkpoint_every:
                self.best.remove_earlier()
        return found

    def _optimizer_step(self) -> dict[str, torch.Tensor]:
        """One optimiser step; the figures are on the device, so nothing has waited for it."""
        rank, device = self.accelerator.process_index, self.accelerator.device
        rows = self.order.step_batches(self.step, rank, self.processes)
        batches = [self.task.batch(chosen) for chosen in rows]
        # The first position of a sequence has no label: labels are shifted inside the model.
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        num_items = sum_over_processes(self.accelerator, torch.tensor(count))

        self.model.train()
        total = torch.zeros((), device=device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                loss = self.model(
                    **on_device(batch, device),
                    num_items_in_batch=num_items.clamp(min=1),
                    use_cache=False,
                ).loss
                # Gradients are averaged over the processes, and a sum is wanted.
                self.accelerator.backward(loss * self.processes)
            total += loss.detach()
        norm = self._clip_gradients()
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.objective.end_step(device)
        return {
            "loss": sum_over_processes(self.accelerator, total),
            "grad_norm": torch.as_tensor(norm),
            "learning_rate": torch.tensor(learning_rate, dtype=torch.float64),
            "num_items": num_items,
        }

    def _clip_gradients(self) -> Any:
        """Clip the gradients, averaged over the processes, and return their norm before that."""
        limit = self.config.max_grad_norm or math.inf
        if not self.by_rows:
            return self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        average_rows(self.by_rows, self.accelerator)
        self.accelerator.unscale_gradients()
        return clip_grad_norm_(self.model.parameters(), limit)

    def _log_training(
        self, values: dict[str, float], seconds: dict[str, float], shown: dict[str, str]
    ) -> None:
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"The loss is {values['loss']} at step {self.step}; lower the learning rate, or "
                "use bf16 or no mixed precision; checkpoints written so far are kept."
            )
        speed = values.pop("num_items") / seconds["seconds_per_step"]
        of_objective = objective_figures(self.model) if self.is_main else {}
        self._record(
            {
                "epoch": self.order.epoch(self.step, self.processes),
                **values,
                **seconds,
                "tokens_per_second": speed,
                **{f"objective/{k}": v for k, v in of_objective.items()},
            }
        )
        shown |= {"loss": f"{values['loss']:.4f}", "tokens/s": f"{speed:,.0f}"}

    def _record(self, figures: dict[str, Any]) -> None:
        """Write figures of this step to metrics.jsonl and the trackers; JSON knows no infinity."""
        if self.is_main:
            finite = {k: v if math.isfinite(v) else None for k, v in figures.items()}
            self.metrics.append({"step": self.step, **finite})
        if self.config.trackers:
            self.accelerator.log(figures, step=self.step)

    def evaluate(self, on: HeldOut) -> dict[str, Any]:
        """Figures of the model as it is; see the task."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        return self.task.evaluate(model, self.accelerator, on)

    def probe_validation(self) -> Probe:
        """What the objective's draws make of a validation batch, against exact cross-entropy."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        probe = probe_loss(model, every=1, positions=VALIDATION_POSITIONS, training=False)
        batch = on_device(self.task.validation_batch(), self.accelerator.device)
        with torch.no_grad():
            model(**batch, use_cache=False)
        return probe

    def _finish(self) -> dict[str, Any]:
        """Evaluate, save the model, draw the report and write the summary."""
        reported = self.step
        if self.config.keep_best:
            self.accelerator.wait_for_everyone()
            self.best.load(self.accelerator.unwrap_model(self.model))
            reported = self.best.step
        test = self.evaluate("test") if self.task.separate_test else None
        probe = self.probe_validation()
        summary: dict[str, Any] = {}
        if self.is_main:
            records = read_metrics(self.metrics.path)
            training = [record for record in records if "loss" in record]
            figure = self.task.headline[0]
            validation = _validation(records, figure, reported)
            summary = {
                "task": self.config.task,
                "objective": self.objective.to_dict(),
                "steps": self.step,
                "model_of_step": reported,
                "processes": self.processes,
                "device": str(self.accelerator.device),
                "parameters": self.num_parameters,
                "vocabulary": len(self.task.tokenizer),
                "training_rows": self.task.num_rows,
                "loss": training[-1]["loss"],
                **{
                    name: statistics.median(r[name] for r in training)
                    for name in ("seconds_per_step", "loss_seconds_per_step")
                },
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in training),
                "memory_estimate_mib": self.memory.to_mib(),
                "data": self.task.describe(),
                "validation": validation,
                "test": test or validation,
                "objective_error": _error_figures(probe),
                "classes_by_frequency": probe.by_frequency,
            }
            model = remove_sce(self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False))
            if self.config.lora_rank:
                model = model.merge_and_unload()
            model.save_pretrained(self.folder / "model")
            self.task.tokenizer.save_pretrained(self.folder / "model")
            try:
                draw_report(self.folder, figure, probe.errors.tolist(), probe.by_frequency)
            except ImportError:
                tqdm.write("matplotlib is not installed, so no report is drawn.")
            write_json(self.folder / "summary.json", summary)
            if self.checkpoints.newest() is None:
                self.best.remove()
        self.accelerator.wait_for_everyone()
        return summary


def _validation(records: list[dict[str, Any]], figure: str, step: int) -> dict[str, float]:
    """The figures of the validation at a step."""
    prefix = "validation/"
    found = next(r for r in reversed(records) if prefix + figure in r and r["step"] == step)
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def _error_figures(probe: Probe) -> dict[str, float]:
    """Mean (``log_z_bias``, nats) and standard deviation of the loss's error at a position, which
    for a softmax is log Zhat - log Z, and the gradient's cosine; nothing for an objective that
    draws nothing."""
    if not probe.figures:
        return {}
    return {
        "log_z_bias": probe.figures["probe_bias"],
        "log_z_sd": float(probe.errors.std(correction=0)),
        "cos_hidden": probe.figures["probe_cos_hidden"],
        "positions": len(probe.errors),
    }
