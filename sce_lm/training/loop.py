"""The training loop behind sce-lm train, on one process or several."""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from sce_lm.files import read_json, write_json
from sce_lm.hf.adapter import loss_seconds, objective_figures, probe_loss, remove_sce
from sce_lm.objectives.probe import Probe
from sce_lm.training.best import BestModel
from sce_lm.training.checkpoint import Checkpoints
from sce_lm.training.learner import Learner
from sce_lm.training.lock import RunLock
from sce_lm.training.memory_prediction import MemoryEstimate
from sce_lm.training.metrics_file import MetricsLog
from sce_lm.training.plots import draw_report
from sce_lm.training.run_folder import RunFolder
from sce_lm.training.task import DataOrder, HeldOut, Task, on_device
from sce_lm.training.train_config import TrainConfig

VALIDATION_POSITIONS = 1024
"""Positions on which the objective is compared with exact cross-entropy at the end."""


@dataclass(eq=False, repr=False)
class Run:
    """A training run of parts that `run_building.build_run` made."""

    config: TrainConfig
    folder: RunFolder
    lock: RunLock
    """Held from the start to the end of `train`."""
    accelerator: Accelerator
    task: Task
    order: DataOrder
    learner: Learner
    memory: MemoryEstimate
    metrics: MetricsLog
    checkpoints: Checkpoints
    best: BestModel
    """Of the evaluations so far."""
    step: int
    """Steps that have been done."""
    is_finished: bool = False
    """Whether it was when it was built: its summary is there, and nothing is left to do."""

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    def is_over(self) -> bool:
        """Whether no further step is wanted."""
        out_of_patience = 0 < self.config.patience <= self.best.evaluations_since
        return self.step >= self.config.max_steps or out_of_patience

    def how_to_go_on(self) -> str:
        """What has been kept of a run that was stopped, and how it goes on, in one sentence."""
        newest = self.checkpoints.newest()
        if newest is None:
            return (
                f"{self.folder} has no checkpoint yet; the same command starts again from the "
                "first step."
            )
        return f"{newest} is complete; the same command goes on from there."

    def train(self) -> dict[str, Any]:
        """Train from where the run stands to its end, and return the summary.

        A finished run is not trained again. Raises FloatingPointError if the loss is not finite,
        and OSError or SafetensorError if something cannot be written; `how_to_go_on` says what is
        left then, as after a KeyboardInterrupt.
        """
        try:
            if self.is_finished:
                return read_json(self.folder.summary)
            self._start_trackers()
            self._take_steps()
            summary = self._finish()
            self.accelerator.end_training()
            return summary
        finally:
            self.lock.release()

    def _start_trackers(self) -> None:
        if not self.config.trackers:
            return
        fields = self.config.to_dict().items()
        settings = {k: v if isinstance(v, (int, float)) else str(v) for k, v in fields}
        # TensorBoard hides what was logged after the checkpoint; the others start a run anew.
        options = {"tensorboard": {"purge_step": self.step + 1}}
        self.accelerator.init_trackers("sce_lm", config=settings, init_kwargs=options)

    def _take_steps(self) -> None:
        """Steps, with what is due after each: a record, an evaluation, a checkpoint."""
        config, model = self.config, self.learner.model
        if self.is_over() and self.best.last_step != self.step:
            self._evaluate_now()  # what was evaluated here before was evaluated in another way
        bar = tqdm(
            total=config.max_steps,
            initial=self.step,
            desc=f"{config.task} {config.objective}",
            unit="step",
            disable=not self.is_main,
        )
        shown: dict[str, str] = {}
        window_seconds, window_steps, in_loss = 0.0, 0, loss_seconds(model)
        with bar:
            while not self.is_over():
                started = time.perf_counter()
                figures = self.learner.step(self._next_batches())
                self.step += 1
                is_logged = self._is_due(config.log_every)
                # To read a figure waits for the device.
                values = {n: figure.item() for n, figure in figures.items()} if is_logged else {}
                window_seconds += time.perf_counter() - started
                window_steps += 1
                if is_logged:
                    spent = loss_seconds(model)
                    seconds = {
                        "seconds_per_step": window_seconds / window_steps,
                        "loss_seconds_per_step": (spent - in_loss) / window_steps,
                    }
                    shown |= self._log_training(values, seconds)
                    window_seconds, window_steps, in_loss = 0.0, 0, spent
                if self._is_due(config.eval_every):
                    found = self._evaluate_now()
                    shown |= {f"validation {n}": f"{found[n]:.4f}" for n in self.task.headline}
                if config.checkpoint_every and (
                    self.is_over() or self._is_due(config.checkpoint_every)
                ):
                    self._save_checkpoint()
                bar.set_postfix(shown, refresh=False)
                bar.update()

    def _next_batches(self) -> list[dict[str, torch.Tensor]]:
        """This process's share of the next step."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        rows = self.order.step_batches(self.step, rank, processes)
        distillation = self.learner.distillation
        if distillation is None:
            return [self.task.batch(chosen) for chosen in rows]
        return [self.task.batch(chosen) | distillation.targets(chosen) for chosen in rows]

    def _is_due(self, every: int) -> bool:
        """Whether what is done so often, and at the end, is done after this step."""
        return self.step == self.config.max_steps or (every > 0 and self.step % every == 0)

    def _log_training(self, values: dict[str, float], seconds: dict[str, float]) -> dict[str, str]:
        """Record a step's figures, and return what the progress bar shows of them."""
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"The loss is {values['loss']} at step {self.step}; lower the learning rate, or "
                "use bf16 or no mixed precision; checkpoints written so far are kept."
            )
        speed = values.pop("num_items") / seconds["seconds_per_step"]
        of_objective = objective_figures(self.learner.model) if self.is_main else {}
        self._record(
            {
                "epoch": self.order.epoch(self.step, self.accelerator.num_processes),
                **values,
                **seconds,
                "tokens_per_second": speed,
                **{f"objective/{k}": v for k, v in of_objective.items()},
            }
        )
        return {"loss": f"{values['loss']:.4f}", "tokens/s": f"{speed:,.0f}"}

    def _record(self, figures: dict[str, Any]) -> None:
        """Write figures of this step to metrics.jsonl and the trackers; JSON knows no infinity."""
        if self.is_main:
            finite = {k: v if math.isfinite(v) else None for k, v in figures.items()}
            self.metrics.append({"step": self.step, **finite})
        if self.config.trackers:
            self.accelerator.log(figures, step=self.step)

    def _evaluate_now(self) -> dict[str, Any]:
        """Validate, record it, and keep the weights if they are the best."""
        found = self.evaluate("validation")
        # Without what belongs to the figures, their protocol for instance.
        self._record({f"validation/{k}": v for k, v in found.items() if type(v) is float})
        is_best = self.best.update(self.step, found[self.task.headline[0]])
        if is_best and self.config.keep_best and self.is_main:
            self.best.save(self.learner.plain_model)
            if not self.config.checkpoint_every:
                self.best.remove_earlier()
        return found

    def _save_checkpoint(self) -> None:
        if self.is_main:
            self.metrics.sync()
        self.checkpoints.save(self.step, self.order.accumulation * self.accelerator.num_processes)
        if self.is_main:
            self.best.remove_earlier()

    def evaluate(self, on: HeldOut) -> dict[str, Any]:
        """Figures of the model as it is; see the task."""
        return self.task.evaluate(self.learner.plain_model.eval(), self.accelerator, on)

    def probe_validation(self) -> Probe:
        """What the objective's draws make of a validation batch, against exact cross-entropy."""
        model = self.learner.plain_model.eval()
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
            self.best.load(self.learner.plain_model)
            reported = self.best.step
        test = self.evaluate("test") if self.task.separate_test else None
        probe = self.probe_validation()
        summary: dict[str, Any] = {}
        if self.is_main:
            model = self._save_model()
            records = self.folder.records()
            validation = _validation(records, self.task.headline[0], reported)
            summary = {
                "task": self.config.task,
                "objective": self.learner.objective.to_dict(),
                "objective_sizes": self.learner.objective.sizes_chosen(),
                "steps": self.step,
                "model_of_step": reported,
                "processes": self.accelerator.num_processes,
                "device": str(self.accelerator.device),
                "parameters": model.num_parameters(),
                "vocabulary": len(self.task.tokenizer),
                "training_rows": self.task.num_rows,
                **_training_figures(records),
                "memory_estimate_mib": self.memory.to_mib(),
                "data": self.task.describe(),
                "validation": validation,
                "test": test or validation,
                "objective_error": _error_figures(probe),
                "classes_by_frequency": probe.by_frequency,
            }
            try:
                draw_report(self.folder, records, self.task.headline[0], probe)
            except ImportError:
                tqdm.write("matplotlib is not installed, so no report is drawn.")
            write_json(self.folder.summary, summary)
            if self.checkpoints.newest() is None:
                self.best.remove()
        self.accelerator.wait_for_everyone()
        return summary

    def _save_model(self) -> Any:
        """Save the trained model, a stock one with adapters merged, and its tokenizer."""
        unwrapped = self.accelerator.unwrap_model(self.learner.model, keep_fp32_wrapper=False)
        model = remove_sce(unwrapped)
        if self.config.lora_rank:
            model = model.merge_and_unload()
        model.save_pretrained(self.folder.model)
        self.task.tokenizer.save_pretrained(self.folder.model)
        return model


def _training_figures(records: list[dict[str, Any]]) -> dict[str, float]:
    """The last loss, and medians of what a step took."""
    training = [record for record in records if "loss" in record]
    names = ("seconds_per_step", "loss_seconds_per_step", "tokens_per_second")
    medians = {name: statistics.median(record[name] for record in training) for name in names}
    return {"loss": training[-1]["loss"], **medians}


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
