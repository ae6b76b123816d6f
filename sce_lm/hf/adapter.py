"""`apply_sce`: any language model of transformers trains with another loss; the rest stays stock.

Two things are put on the model instance (:mod:`sce_lm.hf.attachment`), and `remove_sce` takes them
away again.

1. Hooks around ``forward``. When labels are passed, or always if that was asked for, and only until
   that forward ends, the attribute of the output head is shadowed in its owner's ``__dict__`` by a
   stand-in that answers with :class:`LazyLogits`. The head itself stays in ``_modules``; between
   forwards there is no stand-in, so saving, tying, resizing, copying and PEFT (which looks for the
   head by identity) meet the stock model, and a head that was replaced since is found at the next
   forward.
   ``generate`` gets the head's own result.
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

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from sce_lm import objectives
from sce_lm.config import LikelihoodConfig, PublishedSCEConfig, SCEConfig
from sce_lm.hf.attachment import Attachment, LazyWhen, find_head
from sce_lm.hf.head_call import check_linear
from sce_lm.objectives import Objective, Statistics
from sce_lm.objectives.probe import Probe

ModelT = TypeVar("ModelT", bound=nn.Module)

_KEY = "_sce_attachment"
"""Where a patched model keeps its :class:`Attachment` (a plain attribute, not a submodule)."""


def apply_sce(
    model: ModelT,
    config: SCEConfig | PublishedSCEConfig | Objective,
    *,
    lazy_logits: LazyWhen = "labels",
) -> ModelT:
    """Train a language model of transformers with ``config``'s loss.

    Args:
        model: a ``PreTrainedModel`` whose output head is linear (causal, masked, encoder-decoder,
            vision-language), or a wrapper around one (PEFT, DistributedDataParallel). PEFT and
            accelerate may also be applied afterwards. While the head carries an adapter other than
            LoRA and trainable tokens (DoRA, IA3, ...) the loss is the stock one, with a warning.
        config: an :class:`~sce_lm.SCEConfig`, or an objective from ``objectives.get(...)``. On a
            patched model it replaces the objective.
        lazy_logits: "labels": a forward with labels returns lazy logits, the others the head's own
            result. "always": forwards without labels return them too, in training and evaluation,
            for losses and metrics that read log-probabilities, entropies or best classes off whole
            rows (:mod:`sce_lm.hf.lazy_answers`). Forwards that keep a cache, or the logits of one
            position, as ``generate`` makes them, never do. On a patched model it replaces the
            choice.

    Returns:
        The same model.

    Raises:
        TypeError: not a transformers model, or ``config`` is neither of the two.
        ValueError: the model takes no labels, has no output head, a head that is not linear, or a
            loss of the user's own.
    """
    objective = objectives.from_config(config)
    if lazy_logits not in ("labels", "always"):
        raise ValueError(f'lazy_logits is {lazy_logits!r}; "labels" or "always" is needed.')
    attachment = _attachment_of(model)
    if attachment is not None:
        attachment.observed.use(objective)
        attachment.lazy_logits = lazy_logits
        return model
    target = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if target is None:
        raise TypeError(
            f"apply_sce got a {type(model).__name__}, which is no transformers model and holds "
            "none; pass a PreTrainedModel with an output head, or use sce_loss in your own loop."
        )
    check_linear(find_head(target).module)
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
    target.__dict__[_KEY] = Attachment(target, objective, lazy_logits)
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
    return None if attachment is None else attachment.observed.objective


def last_statistics(model: nn.Module) -> Statistics | None:
    """Statistics of the latest loss if it was one in ``eval()`` (exact, so ``correct`` is there).

    None after a training loss, whose statistics would cost as much again as the loss: running
    averages of those are in ``objective_of(model).state.summary()``.
    """
    attachment = _attachment_of(model)
    return None if attachment is None else attachment.observed.statistics


def loss_seconds(model: nn.Module) -> float:
    """Seconds that this process has spent in the training losses of ``model`` so far, without
    probes.

    With it go the gradients of hidden states and weight, which are taken with the loss. On a GPU
    it is the time until the work is queued.
    """
    attachment = _attachment_of(model)
    return 0.0 if attachment is None else attachment.observed.seconds


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
    probe = Probe(every, positions, tell_classes=not training)
    attachment.observed.probes[training] = probe
    return probe


def accept_new_state(model: nn.Module) -> None:
    """Not warn that the state of ``model`` starts anew beside loaded weights: that was said."""
    attachment = _attachment_of(model)
    if attachment is not None:
        attachment.observed.weights_loaded = False


def smooth_labels(model: nn.Module, factor: float) -> None:
    """Keep the objective of ``model`` under the Trainer's ``label_smoothing_factor``; 0: no more.

    The Trainer takes the labels from the model and reads their log-probabilities and the sum over
    all classes off the logits. In training those logits stay lazy, and their log Z is the
    objective's. An objective that has no ``label_smoothing`` is left alone.

    Raises:
        ValueError: the objective smooths labels itself, or its options do not go with it.
    """
    attachment = _attachment_of(model)
    if attachment is None:
        return
    config = attachment.observed.objective.config
    attachment.smooths_labels = False
    if factor == 0.0 or not isinstance(config, LikelihoodConfig):
        return
    if config.label_smoothing:
        raise ValueError(
            f"label_smoothing is {config.label_smoothing} in the objective's configuration and "
            f"label_smoothing_factor is {factor} in the Trainer's arguments; set one of them to 0."
        )
    dataclasses.replace(config, label_smoothing=factor)  # which checks what goes with it
    attachment.smooths_labels = True


def objective_figures(model: nn.Module) -> dict[str, float]:
    """What logs show of the objective: running averages of its state and the probe's latest
    figures. Warns once where they say that something should be changed."""
    attachment = _attachment_of(model)
    return {} if attachment is None else attachment.observed.figures()


@contextmanager
def lazy_logits(model: nn.Module) -> Iterator[None]:
    """Inside, the model is as after ``apply_sce(model, ..., lazy_logits="always")``.

    Code that ranks a whole catalogue takes ``outputs.logits.parts()`` and streams the rest.
    """
    attachment = _attachment_of(model)
    if attachment is None:
        raise ValueError(
            f"this {type(model).__name__} has no lazy logits; call apply_sce(model, ...) first."
        )
    before, attachment.lazy_logits = attachment.lazy_logits, "always"
    try:
        yield
    finally:
        attachment.lazy_logits = before


def _patched(model: nn.Module) -> nn.Module | None:
    """The module inside ``model`` that apply_sce patched."""
    return next((m for m in model.modules() if _KEY in m.__dict__), None)


def _attachment_of(model: nn.Module) -> Attachment | None:
    target = _patched(model)
    return None if target is None else target.__dict__[_KEY]
