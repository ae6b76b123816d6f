"""The configuration of a run: one flat frozen dataclass, each field documented and checked once.

A run is described by a YAML file, and each field can be set again on the command line
(`--field value`), which wins. A value is read there as in the file; a mapping is given as JSON or
YAML and replaces the one of the file: `--objective_options '{"tail_candidates": 2048}'`.
"""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_origin, get_type_hints

from sce_lm.requirements import require

require("sce_lm.training", "accelerate", "datasets", "polars", "psutil", "rich", "tqdm", "yaml")


from sce_lm import objectives
from sce_lm.recsys.events import Duplicates
from sce_lm.recsys.splits import ColdItems, Past
from sce_lm.training.kinds import FieldError, as_written, checked
from sce_lm.training.yaml12 import Plain, read_yaml

EMBEDDED = "embedded"


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, with which objective and for how long.

    Raises FieldError, a ValueError of one sentence, for a field of the wrong type or out of range.
    """

    task: Literal["lm", "items"] = field(
        default="lm",
        metadata={
            "help": "lm: causal language model on packed text; items: next-item recommender "
            "whose tokens are items."
        },
    )
    output_dir: str = field(
        default="runs/default",
        metadata={"help": "Folder of the run: metrics, report, checkpoints and the final model."},
    )

    # The model.
    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder of a causal language model to start from; unset: "
            "from scratch by model_config."
        },
    )
    model_config: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "A model from scratch: model_type and any field of that configuration, e.g. "
            "{model_type: llama, ...}."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local folder of the tokenizer; unset: the model's own, or that "
            "of the embedded data."
        },
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Type in which the parameters are held."}
    )
    lora_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of LoRA adapters on the linear layers of a pretrained model, which is "
            "frozen; the model that is saved has them merged. 0: all parameters are trained."
        },
    )

    # The data.
    data: str = field(
        default=EMBEDDED,
        metadata={
            "help": "embedded (made from the installed packages), a local csv, parquet, json or "
            "text path, or a hub id."
        },
    )
    data_name: str | None = field(
        default=None,
        metadata={"help": "Configuration name of a hub data set, e.g. wikitext-2-raw-v1."},
    )
    data_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Options of the embedded data: keyword arguments of its builder."},
    )
    held_out: str | None = field(
        default=None,
        metadata={
            "help": "Held-out text: a local path, or the name of a split of the hub data set; "
            "unset: held_out_fraction."
        },
    )
    held_out_fraction: float = field(
        default=0.02, metadata={"help": "Share of the documents held out where held_out is unset."}
    )
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    user_column: str = field(
        default="user_id", metadata={"help": "Column of the interaction log that says who."}
    )
    item_column: str = field(
        default="item_id", metadata={"help": "Column of the interaction log that says what."}
    )
    time_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the interaction log that says when; unset: rows of a user are in "
            "the order of the file."
        },
    )
    time_format: str | None = field(
        default=None,
        metadata={
            "help": "How times that are text are written, in the directives of strptime; unset: as "
            "numbers or in ISO 8601."
        },
    )
    cache_dir: str = field(
        default="~/.cache/sce_lm",
        metadata={"help": "Folder where embedded data and tokenised text are kept between runs."},
    )
    sequence_length: int = field(
        default=512,
        metadata={
            "help": "Tokens of a training sequence; of a recommender, the latest items of a user "
            "that are trained on and read."
        },
    )

    # The data of a recommender.
    duplicates: Duplicates = field(
        default="keep",
        metadata={
            "help": "What becomes of a user's events with the same item: all are kept, the first, "
            "the last, or all but those right after an event with the same item."
        },
    )
    min_user_events: int = field(
        default=1, metadata={"help": "Users with fewer events are left out."}
    )
    min_item_events: int = field(
        default=1, metadata={"help": "Items with fewer events are left out."}
    )
    iterate_filters: bool = field(
        default=True,
        metadata={
            "help": "Filter until all that are left have enough events (a k-core); false: once."
        },
    )
    split: Literal["leave_one_out", "last_n", "temporal"] = field(
        default="leave_one_out",
        metadata={
            "help": "What is held out: each user's last item for the test and the one before for "
            "validation; the last split_n for each; or all users with events after a cut in time."
        },
    )
    split_n: int = field(
        default=1, metadata={"help": "Items a user in each held-out set of split last_n."}
    )
    split_quantile: float = field(
        default=0.95,
        metadata={"help": "The cut of split temporal as a quantile of all events' times."},
    )
    split_time: str | None = field(
        default=None,
        metadata={
            "help": "The cut of split temporal as a time: ISO 8601, or a number where the log has "
            "numbers; unset: split_quantile."
        },
    )
    split_past: Past = field(
        default="after",
        metadata={"help": "Events in the histories of split temporal: after the cut, or all."},
    )
    split_cold_items: ColdItems = field(
        default="drop",
        metadata={
            "help": "Events after the cut of split temporal whose items do not occur in training."
        },
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Put several users into a row, told apart by position_ids, so that short "
            "histories cost what they hold; false: a user a row, padded. The same loss either way."
        },
    )

    # The objective.
    objective: str = field(
        default="sce",
        metadata={
            "help": "Name of the training objective in sce_lm.objectives, e.g. sce or exact."
        },
    )
    objective_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Options of the objective, e.g. {tail_candidates: 2048} or {published: true}."
        },
    )

    # Optimisation.
    max_steps: int = field(default=1000, metadata={"help": "Optimiser steps."})
    per_device_batch_size: int = field(
        default=8, metadata={"help": "Sequences of one forward pass on one process."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Forward and backward passes of one optimiser step."}
    )
    optimizer: Literal["adamw", "sparse_adam", "rowwise_adagrad"] = field(
        default="adamw",
        metadata={
            "help": "adamw: everything by AdamW. The others train the item matrix (input embedding "
            "and head) by the rows that a step meets, and the rest by AdamW; they need an "
            "objective with sparse_grad. Optimiser state of the item matrix: adamw and sparse_adam "
            "8 bytes a parameter, 2*V*d floats; rowwise_adagrad 4 bytes an item, V floats."
        },
    )
    learning_rate: float = field(default=0.0003, metadata={"help": "Peak learning rate of AdamW."})
    sparse_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of the item matrix where it is trained by rows, on the "
            "same schedule; unset: learning_rate."
        },
    )
    weight_decay: float = field(
        default=0.1,
        metadata={
            "help": "Decoupled weight decay of matrices; vectors (norms, biases) and an item "
            "matrix that is trained by rows have none."
        },
    )
    betas: list[float] = field(
        default_factory=lambda: [0.9, 0.95],
        metadata={"help": "The two decay rates of AdamW and sparse_adam."},
    )
    warmup_steps: int = field(
        default=100, metadata={"help": "Steps over which the learning rate rises linearly from 0."}
    )
    scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
    ] = field(
        default="cosine",
        metadata={"help": "Learning-rate schedule, by its name in transformers.get_scheduler."},
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata={"help": "Gradients are clipped to this norm; 0: they are not clipped."},
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = field(
        default="no", metadata={"help": "Autocast type of the forward pass."}
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations in the backward pass to save memory."},
    )
    seed: int = field(
        default=0,
        metadata={
            "help": "Seed of the initialisation, the data order, dropout and the objective's noise."
        },
    )

    # Evaluation and reports.
    eval_every: int = field(
        default=200, metadata={"help": "Steps between evaluations; 0: only at the end."}
    )
    eval_batches: int = field(
        default=0,
        metadata={
            "help": "Held-out batches of a language model's validation, over all processes; 0: "
            "all of them. The test takes all."
        },
    )
    eval_users: int = field(
        default=0,
        metadata={
            "help": "Users of a recommender's evaluation, a fixed random sample; 0: all of them."
        },
    )
    eval_k: list[int] = field(
        default_factory=lambda: [10],
        metadata={
            "help": "Lengths of a recommender's evaluated lists; NDCG at the first is what "
            "keep_best and patience go by."
        },
    )
    mask_seen: bool = field(
        default=True,
        metadata={"help": "Leave the items of a user's history out of the evaluated lists."},
    )
    keep_best: bool = field(
        default=False,
        metadata={
            "help": "Save and test the model of the best validation (lowest nll, highest NDCG), "
            "not the last."
        },
    )
    patience: int = field(
        default=0,
        metadata={
            "help": "Stop after so many evaluations in a row without a better one; 0: train for "
            "max_steps."
        },
    )
    log_every: int = field(
        default=10,
        metadata={"help": "Steps between records of the loss in metrics.jsonl and the trackers."},
    )
    probe_every: int = field(
        default=0,
        metadata={
            "help": "Batches from one comparison of the loss and its gradient with the exact ones, "
            "on 256 positions, to the next (objective/probe_... in metrics.jsonl); 0: none."
        },
    )
    trackers: list[str] = field(
        default_factory=list,
        metadata={"help": "Trackers that accelerate knows, e.g. tensorboard or wandb."},
    )

    process_timeout: float = field(
        default=1800.0,
        metadata={
            "help": "Seconds that a process waits for another one, which may be preparing the "
            "data, before the run ends with an error; half an hour, as transformers' ddp_timeout."
        },
    )

    # Checkpoints.
    checkpoint_every: int = field(
        default=500,
        metadata={"help": "Steps between checkpoints, with one at the end; 0: none at all."},
    )
    checkpoints_to_keep: int = field(
        default=2, metadata={"help": "The newest so many checkpoints are kept."}
    )
    resume: bool = field(
        default=True,
        metadata={
            "help": "Go on from the newest checkpoint in output_dir; false: refuse a folder in use."
        },
    )
    resume_with_changed_data: bool = field(
        default=False,
        metadata={
            "help": "Resume although the data are others than those that the run began with: a "
            "recommender goes on with the split that it stored, a language model trains on the "
            "text as it is now, without the documents that it holds out. False: refuse."
        },
    )

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, checked(name, kind, getattr(self, name)))
        for name in (
            "sequence_length",
            "max_steps",
            "per_device_batch_size",
            "gradient_accumulation_steps",
            "min_user_events",
            "min_item_events",
            "split_n",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require(
            "sequence_length", self.sequence_length >= 2, "at least 2, a token and the one after it"
        )
        for name in ("log_every", "checkpoints_to_keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "lora_rank",
            "warmup_steps",
            "probe_every",
            "eval_every",
            "eval_batches",
            "eval_users",
            "checkpoint_every",
            "patience",
            "seed",
        ):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("weight_decay", "max_grad_norm"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("learning_rate", "process_timeout"):
            self._require(name, getattr(self, name) > 0, "above 0")
        rate = self.sparse_learning_rate
        self._require("sparse_learning_rate", rate is None or rate > 0, "above 0")
        self._require(
            "betas",
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "two numbers in [0, 1)",
        )
        self._require("held_out_fraction", 0 < self.held_out_fraction < 1, "between 0 and 1")
        self._require("split_quantile", 0 < self.split_quantile < 1, "between 0 and 1")
        self._require("eval_k", bool(self.eval_k) and min(self.eval_k) >= 1, "numbers from 1 up")
        if self.patience and not self.eval_every:
            raise FieldError(
                f"patience is {self.patience} and eval_every 0, so nothing is evaluated before the "
                "end; set eval_every to a number of steps.",
                *("patience", "eval_every"),
            )
        if self.optimizer == "adamw" and rate is not None:
            raise FieldError(
                f"sparse_learning_rate is {rate} and the optimizer is adamw, which has one rate "
                "for all; leave it out, or choose optimizer sparse_adam or rowwise_adagrad.",
                *("sparse_learning_rate", "optimizer"),
            )
        if self.optimizer != "adamw" and self.dtype != "float32":
            raise FieldError(
                f"dtype is {self.dtype!r} and the optimizer {self.optimizer}, whose small steps "
                'that precision rounds away; use dtype "float32", with mixed_precision "bf16" for '
                "speed.",
                *("dtype", "optimizer"),
            )
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
        if self.lora_rank and (self.model is None or self.optimizer != "adamw"):
            raise FieldError(
                f"lora_rank is {self.lora_rank}, which freezes a pretrained model and its head; it "
                "goes with model and optimizer adamw; give both, or leave lora_rank out.",
                *("lora_rank", "model", "optimizer"),
            )
        self._check_objective()

    def _check_objective(self) -> None:
        known = objectives.names()
        self._require("objective", self.objective in known, "one of " + ", ".join(known))
        options = dict(self.objective_options)
        published = checked("objective_options.published", bool, options.get("published", False))
        try:
            of_objective = type(objectives.get(self.objective, published=published).config)
        except ValueError as error:
            raise FieldError(
                f"objective_options.published is {published}: {error}",
                *("objective_options", "objective"),
            ) from None
        kinds = {**get_type_hints(of_objective), "published": bool}
        for name, value in options.items():
            if name not in kinds:
                raise FieldError(
                    f"objective_options.{name} is no option of objective {self.objective!r}; did "
                    f"you mean {_nearest(name, kinds)!r}?",
                    *("objective_options", "objective"),
                )
            options[name] = checked(f"objective_options.{name}", kinds[name], value)
        object.__setattr__(self, "objective_options", options)
        try:
            objectives.get(self.objective, **options)
        except ValueError as error:
            rest = str(error).removeprefix(of_objective.__name__)
            message = f"objective_options{'' if rest != str(error) else ': '}{rest}"
            raise FieldError(message, "objective_options", "objective") from None

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise FieldError(
                f"{name} is {getattr(self, name)!r}; expected {expected}; change it.", name
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values, from which `TrainConfig(**values)` is built again."""
        return dataclasses.asdict(self)


COMMAND_LINE = "the command line"
"""What messages call it."""


class _Parser(argparse.ArgumentParser):
    """Takes `--field value ...` as text; what it means is decided where the file's values are."""

    def __init__(self) -> None:
        super().__init__(
            usage="train.py CONFIG.yaml [--field value ...]",
            description="Values on the command line go over those of the file.",
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        for name, kind in get_type_hints(TrainConfig).items():
            described = TrainConfig.__dataclass_fields__[name]
            default = getattr(TrainConfig, name, None)
            if described.default_factory is not dataclasses.MISSING:
                default = described.default_factory()
            more: dict[str, Any] = {}
            if get_origin(kind) is list:
                more = {"nargs": "+"}
            elif get_origin(kind) is Literal:
                more = {"metavar": "{" + ",".join(kind.__args__) + "}"}
            elif kind is bool:
                more = {"nargs": "?", "const": "true"}
            about = f"{described.metadata['help']} (default: {default})".replace("%", "%%")
            self.add_argument(*_flags(name), help=about, **more)
            if default is True:
                self.add_argument(
                    *_flags(f"no_{name}"), dest=name, action="store_const", const="false"
                )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"The command line is not understood: {message}; see --help.")


def _flags(name: str) -> list[str]:
    return [f"--{spelling}" for spelling in dict.fromkeys((name, name.replace("_", "-")))]


def parse_config(arguments: Sequence[str]) -> TrainConfig:
    """The configuration of `[CONFIG.yaml] [--field value ...]`.

    The command line goes over the file, and the file over the defaults. The last of several values
    that the command line gives to a field counts, as is usual there; a file may give one.

    Raises ValueError, in one sentence that names the file or the command line, for an unknown field
    (naming the nearest known one), a value of the wrong type or out of range, a field given twice,
    and a file that is missing or no mapping.
    """
    arguments = list(arguments)
    kinds = get_type_hints(TrainConfig)
    given: dict[str, Any] = {}
    places: dict[str, str] = {}
    file = COMMAND_LINE
    if arguments and not arguments[0].startswith("-"):
        file = arguments.pop(0)
        given = _read_file(Path(file))
        places = dict.fromkeys(given, file)
    found, unknown = _Parser().parse_known_args(arguments)
    if unknown:
        if unknown[0].startswith("--"):
            name = unknown[0].removeprefix("--").split("=")[0].replace("-", "_")
            raise _unknown_field(name, COMMAND_LINE)
        raise ValueError(
            f"The command line has {unknown[0]!r} where a --field was expected; the configuration "
            "file comes first, and a value behind its field."
        )
    for name, value in vars(found).items():
        texts = [Plain(text) for text in ([value] if isinstance(value, str) else value)]
        given[name], places[name] = texts if len(texts) > 1 else texts[0], COMMAND_LINE
        if get_origin(kinds[name]) is dict:
            given[name] = read_yaml(value, COMMAND_LINE, name)
    try:
        return TrainConfig(**{name: as_written(kinds[name], v) for name, v in given.items()})
    except FieldError as error:
        named = dict.fromkeys(places[name] for name in error.names if name in places)
        raise ValueError(f"{' and '.join(named) or file}: {error}") from None


def as_arguments(changes: Mapping[str, Any]) -> list[str]:
    """The command line that sets these fields, for :func:`parse_config` behind a file."""
    arguments = []
    for name, value in changes.items():
        entries = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(v if isinstance(v, str) else json.dumps(v) for v in entries)]
    return arguments


def _read_file(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of a YAML file.")
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"There is no configuration file {str(path)!r}; give the path of a YAML file."
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); correct it.") from None
    content = read_yaml(source, str(path))
    if content is None or content == "":
        return {}
    if not isinstance(content, dict):
        what = "list" if isinstance(content, list) else "single value"
        raise ValueError(f"{path} holds a {what}; expected a mapping of fields; correct it.")
    names = {f.name for f in fields(TrainConfig)}
    for name in content:
        if name not in names:
            raise _unknown_field(name, str(path))
    return content


def _unknown_field(name: str, where: str) -> ValueError:
    nearest = _nearest(name, (f.name for f in fields(TrainConfig)))
    return ValueError(
        f"{where} sets {name!r}, which is no field of the configuration; did you mean {nearest!r}?"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
