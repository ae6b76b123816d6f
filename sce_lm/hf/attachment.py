"""What :func:`~sce_lm.hf.adapter.apply_sce` puts on one model: hooks, the stand-in of its head, and
the loss that takes the place of the stock one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from sce_lm.hf.head_call import (
    call_inside,
    check_linear,
    is_plain,
    other_adapter,
    vocab_size,
)
from sce_lm.hf.lazy_logits import LazyLogits
from sce_lm.hf.observed_loss import ObservedLoss, number_of_loss
from sce_lm.hf.recorded_logits import CrossEntropy, LabelTerms, RecordedLogits
from sce_lm.hf.traced_logits import TracedLogits
from sce_lm.objectives import Objective
from sce_lm.objectives.compile_operator import can_trace, head_loss, outside_graphs, refuse_export
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import Positions

LazyWhen = Literal["labels", "always"]
"""When a forward returns lazy logits: with labels, or also without."""


class PlacedHead(NamedTuple):
    """An output head and where the model looks for it."""

    module: Any  # nn.Linear, or what acts as one
    owner: str  # a name, since a reference to the model would keep it alive in a cycle
    attribute: str


class LazyHead:
    """Stands in the head's place during a forward that computes a loss."""

    def __init__(
        self,
        head: Any,
        cross_entropy: CrossEntropy,
        in_graph: bool,
        label_terms: LabelTerms | None,
    ) -> None:
        self.head = head
        self.cross_entropy = cross_entropy
        self.label_terms = label_terms
        self.in_graph = in_graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return self.head(*args, **kwargs)
        if torch.compiler.is_compiling() and self.in_graph:
            return TracedLogits.from_head(self.head, args[0], self.cross_entropy)
        return self.lazy(args[0])

    @outside_graphs
    def lazy(self, hidden_states: torch.Tensor) -> LazyLogits:
        options = self.cross_entropy, self.label_terms
        return LazyLogits.from_head(self.head, hidden_states, *options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)


class Attachment:
    """Hooks around ``forward``, the head's stand-in, and the loss function of one model."""

    def __init__(self, model: PreTrainedModel, objective: Objective, lazy_logits: LazyWhen) -> None:
        self.observed = ObservedLoss(objective, vocab_size(find_head(model).module))
        self.lazy_logits: LazyWhen = lazy_logits
        self.training = model.training
        self.was_called = False
        self.in_forward = False
        self.is_lazy = False
        self.smooths_labels = False
        """Whether the Trainer pops the labels and reads a smoothed loss off log-probabilities."""
        self.missing_loss = False
        self.missing_smoothing = False
        self.missing_weights = False
        self.other_adapter: str | None = None
        self.head: PlacedHead | None = None
        parameters = list(inspect.signature(model.forward).parameters)
        self.position = {name: i for i, name in enumerate(parameters)}
        # A loss that forward makes itself is inlined by compilers, past every hook of tensors.
        names = inspect.unwrap(type(model).forward).__code__.co_names
        self.asks_loss_function = "loss_function" in names and "CrossEntropyLoss" not in names
        self.had_own_loss = "_loss_function" in model.__dict__
        self.stock_loss: Callable = model.loss_function
        if self.stock_loss is ForCausalLMLoss:
            model.loss_function = self.loss  # pyright: ignore[reportAttributeAccessIssue]
        self.handles = [
            model.register_forward_pre_hook(self.before_forward, prepend=True, with_kwargs=True),
            model.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
            model.register_load_state_dict_post_hook(self.after_load),
        ]

    def detach(self, model: PreTrainedModel) -> None:
        """Take everything off ``model`` again."""
        for handle in self.handles:
            handle.remove()
        self.unshadow(model)
        if self.stock_loss is ForCausalLMLoss:
            del model._loss_function
        if self.had_own_loss:
            model.loss_function = self.stock_loss

    # -- hooks ---------------------------------------------------------------------------------

    def before_forward(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
        self.unshadow(model)  # a forward that was interrupted may have left it
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "apply_sce does not work under torch.nn.DataParallel; start one process for each "
                "GPU with accelerate launch or torchrun, or show this process a single GPU."
            )
        self.training = model.training
        self.was_called = self.in_forward = True
        self.missing_loss = self.given("labels", args, kwargs)
        self.missing_weights = self.given("loss_weights", args, kwargs)
        self.is_lazy = self.missing_loss or self.given("shift_labels", args, kwargs)
        is_smoothed = self.smooths_labels and not self.missing_loss
        if (self.lazy_logits == "always" or is_smoothed) and not torch.compiler.is_exporting():
            self.is_lazy |= not self.decodes(args, kwargs)
        if self.missing_smoothing:
            self.observed.warn_once(
                f"{type(model).__name__} was trained with label_smoothing_factor, and its loss was "
                f"the stock one, not {self.observed.objective.name!r}: its log-probabilities were "
                "not asked for. Leave label_smoothing_factor at 0 and set label_smoothing in the "
                "objective's configuration."
            )
        self.missing_smoothing = is_smoothed and self.training and torch.is_grad_enabled()
        if self.missing_loss:
            refuse_export()
        if self.is_lazy:
            self.shadow(model)

    def shadow(self, model: PreTrainedModel) -> None:
        if self.head is None or not _is_at_place(self.head, model):
            head = find_head(model)
            check_linear(head.module)
            self.head = head
        self.other_adapter = other_adapter(self.head.module)
        if self.other_adapter is not None:
            return
        owner = model.get_submodule(self.head.owner)
        observed = self.observed
        objective = observed.objective if self.training else observed.evaluation
        head = self.head.module
        in_graph = self.asks_loss_function and is_plain(head) and can_trace(objective.config)
        label_terms = self.label_terms if self.missing_smoothing else None
        owner.__dict__[self.head.attribute] = LazyHead(
            head, self.cross_entropy, in_graph, label_terms
        )

    def unshadow(self, model: PreTrainedModel) -> None:
        if self.head is not None:
            model.get_submodule(self.head.owner).__dict__.pop(self.head.attribute, None)

    def given(self, name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
        return self.argument(name, args, kwargs) is not None

    def argument(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        position = self.position.get(name, len(args))
        return args[position] if position < len(args) else kwargs.get(name)

    def decodes(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a forward continues a text, as ``generate`` makes it do: with a cache, or for the
        logits of one position. They are few, and all of them are looked at."""
        names = ("past_key_values", "use_cache")
        if any(self.argument(name, args, kwargs) not in (None, False) for name in names):
            return True
        kept = self.argument("logits_to_keep", args, kwargs)
        return isinstance(kept, int) and kept == 1

    def after_forward(self, model: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> None:
        self.unshadow(model)
        self.in_forward = False
        missing, self.missing_loss = self.missing_loss, False
        if output is not None and self.missing_weights:
            raise ValueError(
                f"loss_weights was given to {type(model).__name__}, whose forward computed no loss "
                "with it; give it together with labels, to a model whose forward hands further "
                "arguments on to loss_function."
            )
        if output is None or not self.training or not torch.is_grad_enabled():
            return
        if missing:
            why = (
                "its forward does something to the head's output that is no bias, scale or soft "
                "cap and needs full logits, or a trainer has put a forward with a loss of its own "
                "in place of it, as TRL's do."
            )
            if self.other_adapter is not None:
                why = (
                    f"its output head carries an adapter ({self.other_adapter}) whose result is no "
                    "product with the head's weight. LoRA without variants, trainable tokens and "
                    "modules_to_save work there; or leave the head out of target_modules."
                )
            self.observed.warn_once(
                f"{type(model).__name__} computed its loss without the objective "
                f"{self.observed.objective.name!r}: {why} The result is the stock loss."
            )
        elif not self.is_lazy:
            self.observed.warn_once(
                f"{type(model).__name__} is being trained without labels in its forward, so on a "
                "loss from elsewhere (the Trainer's label_smoothing_factor, compute_loss_func, a "
                f"loss of your own) and not on the objective {self.observed.objective.name!r}; for "
                "label smoothing add SCECallback() to the Trainer, or leave label_smoothing_factor "
                "at 0 and set label_smoothing in the objective's configuration."
            )

    def after_load(self, model: PreTrainedModel, incompatible_keys: Any) -> None:
        self.observed.weights_loaded = True

    # -- the loss ------------------------------------------------------------------------------

    def loss(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stands in for ``ForCausalLMLoss``, whose arguments and normalisation it has."""
        if isinstance(logits, LazyLogits):
            return self.loss_outside_graphs(logits, *args, **kwargs)
        return self.causal_loss(logits, *args, **kwargs)

    @outside_graphs
    def loss_outside_graphs(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.causal_loss(*args, **kwargs)

    def causal_loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Args: loss_weights: a factor on the loss of each token, in the shape of the labels that
        were given and shifted with them."""
        post = logits.transform if isinstance(logits, RecordedLogits) else None
        targets = shift_labels
        if targets is None and labels is not None:
            targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
            if loss_weights is not None and loss_weights.shape == labels.shape:
                loss_weights = nn.functional.pad(loss_weights, (0, 1))[..., 1:]
        positions = logits.shape[:-1]
        if (
            not isinstance(logits, RecordedLogits)
            or post is None
            or targets is None
            or targets.numel() != positions.numel()
            or vocab_size != logits.shape[-1]
        ):
            if not self.was_called and logits.requires_grad:
                self.observed.warn_once(
                    "the forward of this model was called past its hooks, as model.forward(...) "
                    "instead of model(...), which PEFT's AdaLoRA does; its loss is the stock loss "
                    f"of full logits and not the objective {self.observed.objective.name!r}."
                )
            # The stock loss is right for whatever this is, or says what is wrong with it.
            return self.stock_loss(
                logits,
                labels,
                vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
        self.missing_weights = False
        if loss_weights is not None and loss_weights.numel() == targets.numel():
            loss_weights = loss_weights.reshape(positions)
        return self.objective_loss(
            logits,
            post,
            targets.reshape(positions),
            ignore_index=ignore_index,
            num_items_in_batch=num_items_in_batch,
            token_weights=loss_weights,
        )

    def cross_entropy(
        self, logits: RecordedLogits, labels: torch.Tensor, ignore_index: int, reduction: str
    ) -> Any:
        """Stands in for ``torch.nn.functional.cross_entropy`` of the lazy logits in a forward."""
        post = logits.transform
        # After the forward: what a user computes from the model's outputs stays what it says.
        if not self.in_forward or post is None:
            return NotImplemented
        options = {"ignore_index": ignore_index, "reduction": reduction}
        return self.objective_loss(logits, post, labels, **options)

    def label_terms(
        self, hidden: torch.Tensor, head: Head, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of rows that have these labels: ``[n]`` losses by the objective and the mean logit."""
        self.missing_smoothing = False
        self.observed.note_merged(self.head.module if self.head else None)
        parts = {"bias": head.bias, "low_rank": head.low_rank, "post": head.post}
        with self.observed.timed(True):
            losses = self.observed(True, hidden, head.weight, labels, **parts, reduction="none")
            positions = Positions(hidden, labels)
            return losses, self.observed.objective.mean_logits(head, positions)

    def objective_loss(
        self,
        logits: RecordedLogits,
        post: LogitTransform,
        labels: torch.Tensor,
        token_weights: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """The objective, or in ``eval()`` exact cross-entropy, inside the head's own call."""
        self.missing_loss = False
        if token_weights is not None:
            options["token_weights"] = token_weights.to(logits.hidden_states.device)
        if isinstance(logits, TracedLogits):
            head, hidden_states = logits.head, logits.hidden_states
            return head_loss(
                number_of_loss(self.observed, self.training),
                hidden_states,
                head.weight,
                labels.to(hidden_states.device),
                bias=logits.with_added_bias(head.bias),
                post=post,
                **options,
            )

        def compute(hidden_states: torch.Tensor, head: Head) -> torch.Tensor:
            self.observed.note_merged(logits.head)
            return self.observed(
                self.training,
                hidden_states,
                head.weight,
                labels.to(hidden_states.device),
                bias=logits.with_added_bias(head.bias),
                low_rank=head.low_rank,
                post=post,
                **options,
            )

        with self.observed.timed(self.training):
            loss = call_inside(logits.head, compute, logits.hidden_states)
        return loss.to(logits.device)  # accelerate may have moved them since


def find_head(model: PreTrainedModel) -> PlacedHead:
    """Raises one sentence if there is none."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output head (get_output_embeddings() is None); load "
            "it with AutoModelForCausalLM or another class that has a language-model head."
        )
    for owner_name, owner in model.named_modules():
        for name, child in owner._modules.items():
            if child is head:
                return PlacedHead(head, owner_name, name)
    raise ValueError(
        f"the output head of {type(model).__name__} is not among its submodules; apply_sce needs "
        "a head that is an attribute of the model or of a part of it."
    )


def _is_at_place(head: PlacedHead, model: PreTrainedModel) -> bool:
    owner = model.get_submodule(head.owner)
    is_child = owner._modules.get(head.attribute) is head.module
    return is_child and model.get_output_embeddings() is head.module
