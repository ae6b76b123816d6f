"""`apply_sce`: any language model of transformers trains with another loss; the rest stays stock.

Two things are put on the model instance, and `remove_sce` takes them away again.

1. Hooks around ``forward``. When labels are passed, and only until that forward ends, the attribute
   of the output head is shadowed in its owner's ``__dict__`` by a stand-in that answers with
   :class:`LazyLogits`. The head itself stays in ``_modules``; between forwards there is no
   stand-in, so saving, tying, resizing, copying and PEFT (which looks for the head by identity)
   meet the stock model, and a head that was replaced since is found at the next forward.
   ``generate`` passes no labels and gets the head's own result.
2. ``model.loss_function``, where that is the causal one. It reads the recorded bias, scale and soft
   cap off the lazy logits, shifts labels as the stock loss does, and runs the objective inside the
   head's own ``__call__``, so that hooks which gather or cast the weight apply. Real logits go to
   the stock loss.

Masked, encoder-decoder and older models compute their loss themselves. They meet the objective
where they call ``torch.nn.functional.cross_entropy`` on the lazy logits during their forward.

Under ``torch.compile`` a model whose forward asks ``loss_function``, and whose head is its weight
and bias and nothing else, is one graph: the stand-in answers with :class:`TracedLogits` and the
loss is one operator. Anything else breaks the graph at the head and goes on as above.
``torch.export`` takes a patched model without labels.

In training mode the loss is the objective. In ``eval()`` it is always exact cross-entropy,
streamed, so an ``eval_loss`` is a likelihood whatever was trained.
"""

from __future__ import annotations

import inspect
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from sce_lm import objectives
from sce_lm.config import SCEConfig
from sce_lm.distributed import vocab_parallel_loss
from sce_lm.hf.head import (
    call_inside,
    check_linear,
    merged_adapters,
    other_adapter,
    vocab_size,
)
from sce_lm.hf.lazy_logits import LazyLogits
from sce_lm.hf.recorded_logits import CrossEntropy, RecordedLogits
from sce_lm.hf.traced_logits import TracedLogits, is_traceable
from sce_lm.objectives import Objective, Statistics
from sce_lm.objectives.compiled import (
    can_trace,
    head_loss,
    outside_graphs,
    refuse_export,
    register,
)
from sce_lm.objectives.probe import Probe
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform

ModelT = TypeVar("ModelT", bound=nn.Module)

_KEY = "_sce_attachment"
"""Where a patched model keeps its :class:`_Attachment` (a plain attribute, not a submodule)."""


def apply_sce(model: ModelT, config: SCEConfig | Objective) -> ModelT:
    """Train a language model of transformers with ``config``'s loss.

    Args:
        model: a ``PreTrainedModel`` whose output head is linear (causal, masked, encoder-decoder,
            vision-language), or a wrapper around one (PEFT, DistributedDataParallel). PEFT and
            accelerate may also be applied afterwards. While the head carries an adapter other than
            LoRA and trainable tokens (DoRA, IA3, ...) the loss is the stock one, with a warning.
        config: an :class:`~sce_lm.SCEConfig`, or an objective from ``objectives.get(...)``. On a
            patched model it replaces the objective.

    Returns:
        The same model.

    Raises:
        TypeError: not a transformers model, or ``config`` is neither of the two.
        ValueError: the model takes no labels, has no output head, a head that is not linear, or a
            loss of the user's own.
    """
    objective = objectives.from_config(config)
    attachment = _attachment_of(model)
    if attachment is not None:
        attachment.use(objective)
        return model
    target = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if target is None:
        raise TypeError(
            f"apply_sce got a {type(model).__name__}, which is no transformers model and holds "
            "none; pass a PreTrainedModel with an output head, or use sce_loss in your own loop."
        )
    check_linear(_find_head(target).module)
    if "labels" not in inspect.signature(target.forward).parameters:
        raise ValueError(
            f"the forward of {type(target).__name__} takes no labels, so it computes no loss to "
            "stand in for; call sce_loss on its hidden states yourself."
        )
    stock_loss = target.loss_function
    if stock_loss not in (ForCausalLMLoss, ForMaskedLMLoss):
        name = getattr(stock_loss, "__name__", type(stock_loss).__name__)
        raise ValueError(
            f"the loss of {type(target).__name__} is {name}, and apply_sce only stands in for "
            "ForCausalLMLoss and ForMaskedLMLoss; set model.loss_function back or call sce_loss "
            "yourself."
        )
    target.__dict__[_KEY] = _Attachment(target, objective)
    return model


def remove_sce(model: ModelT) -> ModelT:
    """Undo :func:`apply_sce` fully; a model without it is returned as it is."""
    target = _patched(model)
    if target is not None:
        target.__dict__.pop(_KEY).detach(target)
    return model


def objective_of(model: nn.Module) -> Objective | None:
    """The objective that ``model``, or the model inside a wrapper, trains with."""
    attachment = _attachment_of(model)
    return None if attachment is None else attachment.objective


def last_statistics(model: nn.Module) -> Statistics | None:
    """Statistics of the latest loss if it was one in ``eval()`` (exact, so ``correct`` is there).

    None after a training loss, whose statistics would cost as much again as the loss: running
    averages of those are in ``objective_of(model).state.summary()``.
    """
    attachment = _attachment_of(model)
    return None if attachment is None else attachment.statistics


def loss_seconds(model: nn.Module) -> float:
    """Seconds that this process has spent in the training losses of ``model`` so far, without
    probes.

    With it go the gradients of hidden states and weight, which are taken with the loss. On a GPU
    it is the time until the work is queued.
    """
    attachment = _attachment_of(model)
    return 0.0 if attachment is None else attachment.seconds


def probe_loss(
    model: nn.Module, every: int, positions: int = 256, *, training: bool = True
) -> Probe:
    """Compare the objective with exact cross-entropy every ``every`` losses, on a few positions of
    the batch, until the objective is replaced.

    Args:
        model: patched by :func:`apply_sce`.
        every: losses from one comparison to the next.
        positions: of a comparison.
        training: losses in training mode; False: those in ``eval()``, which stay exact themselves
            and where a comparison also tells which classes it was at.

    Returns:
        The :class:`~sce_lm.objectives.probe.Probe`, whose ``figures`` are those of the latest look.

    Raises:
        ValueError: ``model`` was not patched.
    """
    attachment = _attachment_of(model)
    if attachment is None:
        raise ValueError(
            f"this {type(model).__name__} has no objective to probe; call apply_sce first."
        )
    probe = attachment.probes[training] = Probe(every, positions, tell_classes=not training)
    return probe


def accept_new_state(model: nn.Module) -> None:
    """Not warn that the state of ``model`` starts anew beside loaded weights: that was said."""
    attachment = _attachment_of(model)
    if attachment is not None:
        attachment.weights_loaded = False


def objective_figures(model: nn.Module) -> dict[str, float]:
    """What logs show of the objective: running averages of its state and the probe's latest
    figures. Warns once where they say that something should be changed."""
    attachment = _attachment_of(model)
    if attachment is None:
        return {}
    state, probe = attachment.objective.state, attachment.probes.get(True)
    figures = {} if state is None else state.summary()
    advice = attachment.objective.advice()
    if advice is not None and not attachment.advised:
        attachment.advised = True
        warnings.warn(advice, stacklevel=2)
    return figures if probe is None else figures | probe.figures


@contextmanager
def lazy_logits(model: nn.Module) -> Iterator[None]:
    """Inside, ``model(...)`` without labels also returns ``outputs.logits`` as LazyLogits.

    Code that ranks a whole catalogue takes ``outputs.logits.parts()`` and streams the rest.
    """
    attachment = _attachment_of(model)
    if attachment is None:
        raise ValueError(
            f"this {type(model).__name__} has no lazy logits; call apply_sce(model, ...) first."
        )
    before, attachment.always_lazy = attachment.always_lazy, True
    try:
        yield
    finally:
        attachment.always_lazy = before


class _Head(NamedTuple):
    """An output head and where the model looks for it."""

    module: Any  # nn.Linear, or what acts as one
    owner: str  # a name, since a reference to the model would keep it alive in a cycle
    attribute: str


class _LazyHead:
    """Stands in the head's place during a forward that computes a loss."""

    def __init__(self, head: Any, cross_entropy: CrossEntropy, in_graph: bool) -> None:
        self.head = head
        self.cross_entropy = cross_entropy
        self.in_graph = in_graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return self.head(*args, **kwargs)
        if torch.compiler.is_compiling() and self.in_graph:
            return TracedLogits.from_head(self.head, args[0], self.cross_entropy)
        return self.lazy(args[0])

    @outside_graphs
    def lazy(self, hidden_states: torch.Tensor) -> LazyLogits:
        return LazyLogits.from_head(self.head, hidden_states, self.cross_entropy)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)


class _Attachment:
    """What :func:`apply_sce` put on one model."""

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        self.use(objective)
        self.seconds = 0.0
        self.always_lazy = False
        self.training = model.training
        self.weights_loaded = False
        self.vocab_size = vocab_size(_find_head(model).module)
        self.was_called = False
        self.in_forward = False
        self.is_lazy = False
        self.missing_loss = False
        self.other_adapter: str | None = None
        self.warned: set[str] = set()
        self.head: _Head | None = None
        self.merged: tuple[Any, list[str]] = (None, [])
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

    def use(self, objective: Objective) -> None:
        """Train with ``objective``, and evaluate with exact cross-entropy by its backend."""
        self.objective = objective
        self.evaluation = objectives.get("exact", backend=objective.config.backend)
        self.statistics: Statistics | None = None
        self.probes: dict[bool, Probe] = {}  # of losses in training mode, and in eval()
        self.advised = False

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
        self.is_lazy = (
            self.missing_loss or self.always_lazy or self.given("shift_labels", args, kwargs)
        )
        if self.missing_loss:
            refuse_export()
        if self.is_lazy:
            self.shadow(model)

    def shadow(self, model: PreTrainedModel) -> None:
        if self.head is None or not _is_at_place(self.head, model):
            head = _find_head(model)
            check_linear(head.module)
            self.head = head
        self.other_adapter = other_adapter(self.head.module)
        if self.other_adapter is not None:
            return
        owner = model.get_submodule(self.head.owner)
        objective = self.objective if self.training else self.evaluation
        head = self.head.module
        in_graph = self.asks_loss_function and is_traceable(head) and can_trace(objective.config)
        owner.__dict__[self.head.attribute] = _LazyHead(head, self.cross_entropy, in_graph)

    def unshadow(self, model: PreTrainedModel) -> None:
        if self.head is not None:
            model.get_submodule(self.head.owner).__dict__.pop(self.head.attribute, None)

    def given(self, name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
        position = self.position.get(name, len(args))
        return kwargs.get(name) is not None or (position < len(args) and args[position] is not None)

    def after_forward(self, model: PreTrainedModel, args: tuple, kwargs: dict, output: Any) -> None:
        self.unshadow(model)
        self.in_forward = False
        missing, self.missing_loss = self.missing_loss, False
        if output is None or not self.training or not torch.is_grad_enabled():
            return
        if missing:
            why = (
                "its forward does something to the head's output that is no bias, scale or soft "
                "cap, or a trainer has replaced its forward."
            )
            if self.other_adapter is not None:
                why = (
                    f"its output head carries an adapter ({self.other_adapter}) whose result is no "
                    "product with the head's weight. LoRA without variants, trainable tokens and "
                    "modules_to_save work there; or leave the head out of target_modules."
                )
            self.warn_once(
                f"{type(model).__name__} computed its loss from full logits, without the objective "
                f"{self.objective.name!r}: {why} The result is the stock loss."
            )
        elif not self.is_lazy:
            self.warn_once(
                f"{type(model).__name__} is being trained without labels in its forward, so on a "
                "loss from elsewhere (label smoothing, compute_loss_func, a loss of your own) and "
                f"not on the objective {self.objective.name!r}."
            )

    def after_load(self, model: PreTrainedModel, incompatible_keys: Any) -> None:
        self.weights_loaded = True

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
        **kwargs: Any,
    ) -> torch.Tensor:
        post = logits.transform if isinstance(logits, RecordedLogits) else None
        targets = shift_labels
        if targets is None and labels is not None:
            targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        positions = logits.shape[:-1]
        if (
            not isinstance(logits, RecordedLogits)
            or post is None
            or targets is None
            or targets.numel() != positions.numel()
            or vocab_size != logits.shape[-1]
        ):
            if not self.was_called and logits.requires_grad:
                self.warn_once(
                    "the forward of this model was called past its hooks, as model.forward(...) "
                    "instead of model(...), which PEFT's AdaLoRA does; its loss is the stock loss "
                    f"of full logits and not the objective {self.objective.name!r}."
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
        return self.objective_loss(
            logits,
            post,
            targets.reshape(positions),
            ignore_index=ignore_index,
            num_items_in_batch=num_items_in_batch,
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

    def objective_loss(
        self, logits: RecordedLogits, post: LogitTransform, labels: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """The objective, or in ``eval()`` exact cross-entropy, inside the head's own call."""
        self.missing_loss = False
        if isinstance(logits, TracedLogits):
            head, hidden_states = logits.head, logits.hidden_states
            return head_loss(
                _number_of_loss(self, self.training),
                hidden_states,
                head.weight,
                labels.to(hidden_states.device),
                bias=logits.with_added_bias(head.bias),
                post=post,
                **options,
            )

        def compute(hidden_states: torch.Tensor, head: Head) -> torch.Tensor:
            self.note_merged(logits.head)
            return self.compute_loss(
                self.training,
                hidden_states,
                head.weight,
                labels.to(hidden_states.device),
                bias=logits.with_added_bias(head.bias),
                low_rank=head.low_rank,
                post=post,
                **options,
            )

        with self.timed(self.training):
            loss = call_inside(logits.head, compute, logits.hidden_states)
        return loss.to(logits.device)  # accelerate may have moved them since

    def compute_loss(self, training: bool, *inputs: Any, **options: Any) -> torch.Tensor:
        """A loss in one of the two modes, with what is noted about it."""
        if training:
            self.note_new_state()
            self.note_vocabulary(inputs[1])
        objective = self.objective if training else self.evaluation
        if isinstance(inputs[1], DTensor):  # the weight of a tensor-parallel plan's head
            objective = partial(vocab_parallel_loss, config=objective)
        elif training in self.probes and (torch.is_grad_enabled() or not training):
            started = time.perf_counter()
            self.probes[training](self.objective, *inputs, **options)
            if training:  # the time of the loss includes it
                self.seconds -= time.perf_counter() - started
        loss = objective(*inputs, return_stats=not training, **options)
        self.statistics = None
        if isinstance(loss, tuple):
            loss, self.statistics = loss
        if loss.requires_grad and not training:
            loss.register_hook(self.note_gradient_in_eval)
        return loss

    def compute_loss_in_graph(self, training: bool, *args: Any, **options: Any) -> torch.Tensor:
        with self.timed(training):
            return self.compute_loss(training, *args, **options)

    @contextmanager
    def timed(self, training: bool) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if training:
            self.seconds += time.perf_counter() - started

    def note_vocabulary(self, weight: torch.Tensor) -> None:
        """The state of this model alone follows a resizing of its embeddings; another model's
        state is refused where it is used."""
        before, self.vocab_size = self.vocab_size, len(weight)
        state = self.objective.state
        if before == self.vocab_size or state is None or state.counts is None:
            return
        if state.counts.numel() == before:
            state.resize(self.vocab_size)
            self.warn_once(
                f"the vocabulary of this model went from {before} to {self.vocab_size} classes; "
                "its SCEState keeps the counts of those that stayed, and what else it learned "
                "about them it learns again."
            )

    def note_new_state(self) -> None:
        state = self.objective.state
        if self.weights_loaded and state is not None and state.is_new and torch.is_grad_enabled():
            self.warn_once(
                "weights were loaded into this model but its SCEState starts anew, which is still "
                "unbiased; add SCECallback() to the Trainer, or call "
                "objective_of(model).state.load(path), to go on with a saved state."
            )

    def note_merged(self, head: Any) -> None:
        """What is known of a frozen weight is forgotten when adapters are merged into it."""
        merged = (head, merged_adapters(head))
        if merged != self.merged and self.objective.state is not None:
            self.objective.state.row_sum.forget()
        self.merged = merged

    def note_gradient_in_eval(self, gradient: torch.Tensor) -> None:
        self.warn_once(
            "this model is being trained in eval mode, where the loss is always exact "
            f"cross-entropy; call model.train() to train with {self.objective.name!r}."
        )

    def warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=2)


@torch.compiler.assume_constant_result
def _number_of_loss(attachment: _Attachment, training: bool) -> int:
    owner = weakref.proxy(attachment)
    return register(lambda: partial(owner.compute_loss_in_graph, training))


def _patched(model: nn.Module) -> nn.Module | None:
    """The module inside ``model`` that apply_sce patched."""
    return next((m for m in model.modules() if _KEY in m.__dict__), None)


def _attachment_of(model: nn.Module) -> _Attachment | None:
    target = _patched(model)
    return None if target is None else target.__dict__[_KEY]


def _find_head(model: PreTrainedModel) -> _Head:
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
                return _Head(head, owner_name, name)
    raise ValueError(
        f"the output head of {type(model).__name__} is not among its submodules; apply_sce needs "
        "a head that is an attribute of the model or of a part of it."
    )


def _is_at_place(head: _Head, model: PreTrainedModel) -> bool:
    owner = model.get_submodule(head.owner)
    is_child = owner._modules.get(head.attribute) is head.module
    return is_child and model.get_output_embeddings() is head.module
