"""The configuration of a run: a flat frozen dataclass, made of sections.

A section has the fields of one subject, each with its help and its range, and checks what goes
together in it; what goes together across sections is checked by `TrainConfig` itself. A file, the
command line (`command_line`) and a run's config.json all have the fields side by side.
"""

# ruff: noqa: RUF009 (an `option` is a field)

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_type_hints

from sce_lm.requirements import require
from sce_lm.training import NEEDED

require("sce_lm.training", *NEEDED)

from sce_lm import objectives
from sce_lm.ops.divergence import Kind
from sce_lm.recsys.events import Duplicates
from sce_lm.recsys.splits import ColdItems, Past
from sce_lm.training.kinds import FieldError, checked, nearest

EMBEDDED = "embedded"
DENSE = ("adamw", "adam")
"""Optimisers that move every row at every step."""

Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial",
    "constant", "constant_with_warmup", "inverse_sqrt",
]  # fmt: skip

Range = tuple[str, Callable[[Any], bool]]
"""What a message says is expected, and whether a value is."""

AT_LEAST_1: Range = ("at least 1", lambda value: value >= 1)
A_PAIR: Range = ("at least 2, a token and the one after it", lambda value: value >= 2)
NOT_NEGATIVE: Range = ("0 or more", lambda value: value >= 0)
ABOVE_0: Range = ("above 0", lambda value: value is None or value > 0)
A_SHARE: Range = ("between 0 and 1", lambda value: 0 < value < 1)
DECAY_RATES: Range = (
    "two numbers in [0, 1)",
    lambda rates: len(rates) == 2 and all(0 <= rate < 1 for rate in rates),
)
LENGTHS: Range = ("numbers from 1 up", lambda lengths: bool(lengths) and min(lengths) >= 1)
KNOWN_OBJECTIVE: Range = (
    "one of " + ", ".join(objectives.names()),
    lambda name: name in objectives.names(),
)


def option(default: Any, help: str, range: Range | None = None) -> Any:
    """A field with its default, what it is, and the values that it takes."""
    metadata = {"help": help, "range": range}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=partial(copy.copy, default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """Fields whose values have the type and the range that they are declared with."""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = checked(field.name, kinds[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            expected, holds = field.metadata["range"] or ("", lambda _: True)
            if not holds(value):
                raise FieldError(
                    f"{field.name} is {value!r}; expected {expected}; change it.", field.name
                )


@dataclass(frozen=True)
class TaskFields(Section):
    """What is trained, and where the run goes."""

    task: Literal["lm", "items"] = option(
        "lm", "lm: next tokens of packed text; items: the next item of a user."
    )
    output_dir: str = option("runs/default", "Folder of the run.")


@dataclass(frozen=True)
class ModelFields(Section):
    """The model, its tokenizer and how its parameters are held."""

    model: str | None = option(
        None, "Hub id or folder of a causal language model to start from; unset: model_config."
    )
    model_config: dict[str, Any] = option(
        {}, "A model from scratch: model_type and any fields of its configuration."
    )
    tokenizer: str | None = option(
        None, "Hub id or folder; unset: the model's own, or the embedded data's."
    )
    dtype: Literal["float32", "bfloat16"] = option("float32", "Type of the parameters.")
    lora_rank: int = option(
        0,
        "Rank of LoRA adapters on all linear layers of a pretrained, frozen model; they are merged "
        "into the saved one. 0: all parameters are trained.",
        NOT_NEGATIVE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and "model_type" not in self.model_config:
            raise FieldError(
                "Neither model nor model_config is given; expected a model to start from, or "
                "model_config with a model_type (e.g. {model_type: llama, hidden_size: 256}); "
                "add one of the two.",
                "model_config",
            )
        if self.model is not None and self.model_config:
            raise FieldError(
                f"Both model ({self.model!r}) and model_config are given; a model is either loaded "
                "or made from scratch; remove one of the two.",
                *("model", "model_config"),
            )


@dataclass(frozen=True)
class DataFields(Section):
    """Where the data are, and how they are read and cut into sequences."""

    data: str = option(
        EMBEDDED,
        "embedded (read from the installed packages), a local csv, parquet, json or text path, "
        "or a hub id.",
    )
    data_name: str | None = option(None, "Configuration of a hub data set, e.g. wikitext-2-raw-v1.")
    data_options: dict[str, Any] = option({}, "Keyword arguments of the embedded data's builder.")
    held_out: str | None = option(
        None, "Held-out text: a path, or a split of the hub data set; unset: held_out_fraction."
    )
    held_out_fraction: float = option(0.02, "Share of the documents that is held out.", A_SHARE)
    text_column: str = option("text", "Column with the text.")
    user_column: str = option("user_id", "Column of the log that says who.")
    item_column: str = option("item_id", "Column of the log that says what.")
    time_column: str | None = option(
        None, "Column of the log that says when; unset: a user's rows are in order."
    )
    time_format: str | None = option(
        None, "How times are written, as for strptime; unset: as numbers or in ISO 8601."
    )
    cache_dir: str = option("~/.cache/sce_lm", "Where embedded data and tokenised text are kept.")
    sequence_length: int = option(
        512,
        "Tokens of a training sequence; a recommender reads a user's latest so many items.",
        A_PAIR,
    )


@dataclass(frozen=True)
class ItemsFields(Section):
    """A recommender's log: what is left out, and what is held out."""

    duplicates: Duplicates = option(
        "keep",
        "Which of a user's events with the same item are kept: all, the first, the last, or all "
        "but those right after an event with the same item.",
    )
    min_user_events: int = option(1, "Users with fewer events are left out.", AT_LEAST_1)
    min_item_events: int = option(1, "Items with fewer events are left out.", AT_LEAST_1)
    iterate_filters: bool = option(
        True, "Filter until all that are left have enough events; false: once."
    )
    split: Literal["leave_one_out", "last_n", "temporal", "random"] = option(
        "leave_one_out",
        "What is held out: each user's last item for the test and the one before for validation; "
        "the last split_n for each; all users with events after a cut in time; or, for the "
        "model type two_tower, a random fifth of each user's items, drawn by seed, without any "
        "for validation.",
    )
    split_n: int = option(1, "Items a user in each held-out set of split last_n.", AT_LEAST_1)
    split_quantile: float = option(
        0.95, "Split temporal cuts at this quantile of all times.", A_SHARE
    )
    split_time: str | None = option(
        None, "Split temporal cuts at this time, in ISO 8601 or a number; unset: split_quantile."
    )
    split_past: Past = option("after", "Histories of split temporal: events after the cut, or all.")
    split_cold_items: ColdItems = option(
        "drop", "Events of split temporal after the cut whose items do not occur in training."
    )
    packing: bool = option(
        True,
        "Put several users into a row, told apart by position_ids; false: a user a row, padded, "
        "which costs more and gives the same loss.",
    )


@dataclass(frozen=True)
class ObjectiveFields(Section):
    """The loss and its options."""

    objective: str = option("sce", "Name in sce_lm.objectives, e.g. sce or exact.", KNOWN_OBJECTIVE)
    objective_options: dict[str, Any] = option(
        {}, "Its options, e.g. {tail_candidates: 2048} or {published: true}."
    )

    def __post_init__(self) -> None:
        """Check the options as the objective's own configuration does, without building a state."""
        super().__post_init__()
        options = dict(self.objective_options)
        published = checked("objective_options.published", bool, options.get("published", False))
        try:
            of_objective = type(objectives.get(self.objective, published=published).config)
        except ValueError as error:
            raise _option_error(f".published is {published}: {error}") from None
        kinds = {**get_type_hints(of_objective), "published": bool}
        for name, value in options.items():
            if name not in kinds:
                raise _option_error(
                    f".{name} is no option of objective {self.objective!r}; did you mean "
                    f"{nearest(name, kinds)!r}?"
                )
            options[name] = checked(f"objective_options.{name}", kinds[name], value)
        object.__setattr__(self, "objective_options", options)
        try:
            objectives.get(self.objective, **options)
        except ValueError as error:
            rest = str(error).removeprefix(of_objective.__name__)
            raise _option_error(rest if rest != str(error) else f": {rest}") from None


@dataclass(frozen=True)
class TeacherFields(Section):
    """A teacher of a language model, and its share of the loss."""

    teacher: str | None = option(
        None,
        "Hub id or folder of a causal language model with the run's tokenizer, or a folder that "
        "sce-lm teach wrote; its next-token distribution is learnt beside the text.",
    )
    teacher_share: float = option(
        0.5,
        "Share of the divergence from the teacher in the loss; the rest is the objective's.",
        ("above 0 and at most 1", lambda value: 0 < value <= 1),
    )
    teacher_divergence: Kind = option(
        "forward_kl",
        "KL(teacher, student), KL(student, teacher), or the Jensen-Shannon divergence of GKD.",
    )
    teacher_beta: float = option(
        0.5,
        "The teacher's share in the mixture of jsd.",
        ("between 0 and 1", lambda value: 0 <= value <= 1),
    )
    teacher_temperature: float = option(1.0, "What the logits of both are divided by.", ABOVE_0)
    teacher_sampled: bool = option(
        False,
        "Sum the divergence over sampled classes, by the options of objective sce (its defaults, "
        "if the objective is another); false: over all of them, streamed.",
    )


def _option_error(problem: str) -> FieldError:
    return FieldError(f"objective_options{problem}", "objective_options", "objective")


@dataclass(frozen=True)
class OptimisationFields(Section):
    """Steps, batches, the optimiser and its schedule, precision and seed."""

    max_steps: int = option(1000, "Optimiser steps; num_epochs goes before it.", AT_LEAST_1)
    num_epochs: float | None = option(
        None, "Passes over the training rows, whose steps are max_steps then.", ABOVE_0
    )
    per_device_batch_size: int = option(
        8, "Sequences of a forward pass of one process.", AT_LEAST_1
    )
    gradient_accumulation_steps: int = option(
        1, "Forward passes of one optimiser step.", AT_LEAST_1
    )
    optimizer: Literal["adamw", "adam", "sparse_adam", "rowwise_adagrad"] = option(
        "adamw",
        "adamw: everything by AdamW; adam: the same with weight_decay in the gradient (L2). The "
        "others train the item matrix (input embedding and head) by the rows that a step meets, "
        "and the rest by AdamW; they need an objective with sparse_grad. Optimiser state of the "
        "item matrix: of every Adam 8 bytes a parameter, 2*V*d floats; rowwise_adagrad 4 bytes an "
        "item, V floats.",
    )
    learning_rate: float = option(0.0003, "Peak learning rate of AdamW.", ABOVE_0)
    sparse_learning_rate: float | None = option(
        None,
        "Peak learning rate of a matrix that is trained by rows; unset: learning_rate.",
        ABOVE_0,
    )
    weight_decay: float = option(
        0.1,
        "Decay of matrices but for those that are trained by rows; decoupled, but of adam.",
        NOT_NEGATIVE,
    )
    betas: list[float] = option([0.9, 0.95], "Decay rates of AdamW and sparse_adam.", DECAY_RATES)
    warmup_steps: int = option(100, "Steps in which the learning rate rises from 0.", NOT_NEGATIVE)
    scheduler: Schedule = option(
        "cosine", "Of the learning rate, as in transformers.get_scheduler."
    )
    max_grad_norm: float = option(
        1.0, "Gradients are clipped to this norm; 0: never.", NOT_NEGATIVE
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "Autocast of the forward pass.")
    gradient_checkpointing: bool = option(False, "Compute activations again in backward.")
    seed: int = option(
        0, "Of initialisation, data order, dropout and the objective's noise.", NOT_NEGATIVE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer in DENSE and self.sparse_learning_rate is not None:
            raise FieldError(
                f"sparse_learning_rate is {self.sparse_learning_rate} and the optimizer is "
                f"{self.optimizer}, which has one rate for all; leave it out, or choose optimizer "
                "sparse_adam or rowwise_adagrad.",
                *("sparse_learning_rate", "optimizer"),
            )


@dataclass(frozen=True)
class EvaluationFields(Section):
    """What is evaluated and reported, and what follows from it."""

    eval_every: int = option(200, "Steps between evaluations; 0: only at the end.", NOT_NEGATIVE)
    eval_batches: int = option(
        0,
        "Batches of a language model's validation, over all processes; 0: all. The test has all.",
        NOT_NEGATIVE,
    )
    eval_users: int = option(
        0, "Users of a recommender's evaluation, drawn once; 0: all.", NOT_NEGATIVE
    )
    eval_k: list[int] = option(
        [10],
        "Lengths of a recommender's lists; NDCG at the first decides which model is best.",
        LENGTHS,
    )
    popularity_days: list[int] = option(
        [7, 30],
        "Split temporal: baselines of what was popular in so many last days of training.",
        LENGTHS,
    )
    mask_seen: bool = option(True, "Leave the items of a user's history out of the lists.")
    keep_best: bool = option(False, "Save and test the model of the best validation, not the last.")
    patience: int = option(
        0,
        "Evaluations in a row without a better one that end the run; 0: max_steps do.",
        NOT_NEGATIVE,
    )
    log_every: int = option(10, "Steps between records of the loss.", AT_LEAST_1)
    probe_every: int = option(
        0,
        "Batches between comparisons of the loss and its gradient with the exact ones "
        "(objective/probe_... in metrics.jsonl); 0: none.",
        NOT_NEGATIVE,
    )
    trackers: list[str] = option([], "Trackers that accelerate knows, e.g. tensorboard or wandb.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience and not self.eval_every:
            raise FieldError(
                f"patience is {self.patience} and eval_every 0, so nothing is evaluated before the "
                "end; set eval_every to a number of steps.",
                *("patience", "eval_every"),
            )


@dataclass(frozen=True)
class CheckpointFields(Section):
    """How a run survives: how long processes wait, checkpoints, and going on from them."""

    process_timeout: float = option(
        1800.0,
        "Seconds that a process waits for another, which may be preparing the data.",
        ABOVE_0,
    )
    checkpoint_every: int = option(
        500, "Steps between checkpoints, and one at the end; 0: none.", NOT_NEGATIVE
    )
    checkpoints_to_keep: int = option(2, "The newest so many are kept.", AT_LEAST_1)
    resume: bool = option(True, "Go on from the newest checkpoint; false: refuse a folder in use.")
    resume_with_changed_data: bool = option(
        False,
        "Go on although the data have changed: a recommender with the split that it stored, a "
        "language model on the text as it is now, without what it holds out. False: refuse.",
    )


@dataclass(frozen=True)
class TrainConfig(
    # A dataclass has the fields of its last base first.
    CheckpointFields,
    EvaluationFields,
    OptimisationFields,
    TeacherFields,
    ObjectiveFields,
    ItemsFields,
    DataFields,
    ModelFields,
    TaskFields,
):
    """What to train, on what, with which objective and for how long.

    Raises FieldError, a ValueError of one sentence, for a field of the wrong type or out of range,
    and for fields that do not go together.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in DENSE and self.dtype != "float32":
            raise FieldError(
                f"dtype is {self.dtype!r} and the optimizer {self.optimizer}, whose small steps "
                'that precision rounds away; use dtype "float32", with mixed_precision "bf16" for '
                "speed.",
                *("dtype", "optimizer"),
            )
        if self.lora_rank and (self.model is None or self.optimizer != "adamw"):
            raise FieldError(
                f"lora_rank is {self.lora_rank}, which freezes a pretrained model and its head; it "
                "goes with model and optimizer adamw; give both, or leave lora_rank out.",
                *("lora_rank", "model", "optimizer"),
            )

        is_random, model_type = self.split == "random", self.model_config.get("model_type")
        if self.model is None and is_random != (model_type == "two_tower"):
            raise FieldError(
                f"split is {self.split} and the model_type {model_type}; pairs without order are "
                "for two_tower alone, and it for them; set both or neither.",
                *("split", "model_config"),
            )
        if is_random and (self.keep_best or self.patience):
            raise FieldError(
                "split is random, which holds nothing out for validation, and keep_best or "
                "patience would choose by the test; leave them out.",
                *("split", "keep_best", "patience"),
            )

        if self.teacher is not None and (self.task != "lm" or self.optimizer != "adamw"):
            raise FieldError(
                f"teacher is {self.teacher!r}, task {self.task} and optimizer {self.optimizer}; a "
                "teacher goes with task lm and optimizer adamw; leave it out, or choose those.",
                *("teacher", "task", "optimizer"),
            )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The default of each field, in the order in which they are declared."""
        return {
            field.name: field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
            for field in dataclasses.fields(cls)
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values, from which `TrainConfig(**values)` is built again."""
        return dataclasses.asdict(self)
