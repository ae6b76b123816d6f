r"""Distillation: a student's softmax is drawn to a teacher's, without the logits of either.

    loss_t = D(softmax(s_t / T), softmax(x_t / T)),      s = g(h W' + b), x = g'(h' W'' + b')

D is the forward or reverse KL divergence or GKD's generalised Jensen-Shannon divergence
(:mod:`sce_lm.ops.divergence`), T the temperature. There is no factor of T² (Hinton et al. 2015
multiply by it so that gradients keep their size beside another loss; TRL's GKD does not).

Exact, both heads are streamed together and neither's ``[N, V]`` is formed. Sampled, both sum over
the same few thousand classes: what SCE keeps with certainty, the teacher's best classes, and a tail
whose weights make every sum unbiased (:mod:`sce_lm.ops.candidate_divergence`). A stored teacher is
its k best classes and their log-probabilities (:mod:`sce_lm.ops.teachers`; files of them:
:mod:`sce_lm.teacher_files`). The best k alone are a biased picture of the teacher (Anshumann et al.
2025, arXiv 2503.16870), and ``rest`` says how it is completed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sce_lm.candidates.state import SCEState
from sce_lm.config import SCEConfig
from sce_lm.objectives.base import (
    Reduction,
    check_inputs,
    connected_zero,
    scatter_to,
    weight_of_each,
)
from sce_lm.objectives.call import Call
from sce_lm.objectives.compile_operator import outside_graphs
from sce_lm.objectives.distilled_candidates import distilled_candidates, refuse_unsuited
from sce_lm.objectives.labels import valid_positions
from sce_lm.ops.candidate_divergence import candidate_divergence
from sce_lm.ops.divergence import Divergence, Kind
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.exact_divergence import exact_divergence
from sce_lm.ops.head import Head
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import Positions
from sce_lm.ops.row_reductions import row_reductions
from sce_lm.ops.teachers import HeadTeacher, Rest, Teacher, TopKTeacher

__all__ = ["HeadScores", "StoredTopK", "distillation_loss"]

STORED_COLUMNS = ("teacher_ids", "teacher_log_probs")
"""Columns of a batch that stand for a teacher: what a :class:`StoredTopK` is made of."""


@dataclass(frozen=True)
class HeadScores:
    """Logits ``post(hidden_states @ weight.T + bias)`` that are not formed."""

    hidden_states: Tensor
    """``[..., d]``; fp16, bf16, fp32 or fp64. ``[..., d + r]`` with ``low_rank``."""
    weight: Tensor
    """``[V, d]``."""
    bias: Tensor | None = None
    """``[V]`` or None."""
    low_rank: Tensor | None = None
    """``[V, r]`` or None: B of a head ``weight + scale·B @ A``, as in
    :meth:`sce_lm.objectives.Objective.__call__`."""
    post: LogitTransform = LogitTransform()
    """What the model does to its raw logits."""

    @classmethod
    def of(cls, logits: Any) -> HeadScores:
        """Those of lazy logits, which :func:`sce_lm.hf.adapter.lazy_logits` has a model return.

        Raises:
            TypeError: the logits are formed already.
            ValueError: the model did something to them that is no :class:`LogitTransform`.
        """
        if not hasattr(logits, "parts"):
            raise TypeError(
                f"HeadScores.of got a {type(logits).__name__}; pass lazy logits, which a model "
                "that apply_sce patched returns inside sce_lm.hf.adapter.lazy_logits(model)."
            )
        hidden, head = logits.parts()
        return cls(hidden, head.weight, head.bias, head.low_rank, head.post)

    @torch.no_grad()
    def top_k(self, k: int, *, temperature: float = 1.0, rest: Rest = "ghost") -> StoredTopK:
        """The k best classes of each position, to be stored; streamed, without gradient.

        Raises:
            ValueError: k is outside ``[1, V]``, there are no positions, or shapes do not fit.
        """
        if not self.hidden_states.numel():
            raise ValueError("there are no hidden states to store a teacher of; pass some.")
        if not 1 <= k <= len(self.weight):
            raise ValueError(f"k is {k}; give a number of classes in [1, {len(self.weight)}].")
        _check_scores("the teacher", self)
        head = _head(self, temperature)
        hidden = self.hidden_states.reshape(-1, self.hidden_states.shape[-1])
        shape = (*self.hidden_states.shape[:-1], k)
        with torch.no_grad():
            found = row_reductions(head, hidden, top_k=k)
        top = found.top
        assert top is not None
        log_probs = top.values - found.log_partition.unsqueeze(1)
        return StoredTopK(top.indices.reshape(shape), log_probs.reshape(shape), rest, temperature)


@dataclass(frozen=True)
class StoredTopK:
    """A teacher's best classes of each position and their log-probabilities."""

    ids: Tensor
    """``[..., k]`` integers in ``[0, V)``, distinct at each position."""
    log_probs: Tensor
    """``[..., k]``; their probabilities sum to at most 1."""
    rest: Rest = "ghost"
    """What becomes of the teacher's mass outside the k. "ghost": one class, which stands for all
    others together, so that the student is told how much they hold and not which; "uniform": spread
    evenly over them; "drop": nothing, the k are normalised to 1 ("reverse_kl" is infinite then)."""
    temperature: float = 1.0
    """The temperature at which they were computed."""


@outside_graphs
def distillation_loss(
    student: HeadScores,
    teacher: HeadScores | StoredTopK,
    labels: Tensor | None = None,
    *,
    divergence: Kind = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    objective: Literal["exact"] | SCEConfig = "exact",
    state: SCEState | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """The divergence of the student's softmax from the teacher's.

    Gradients reach the student's hidden states, weight, low-rank operand and bias; none reaches the
    teacher.

    Args:
        student: hidden states and head.
        teacher: the same of another model over the same V classes and positions, or what was stored
            of it.
        labels: ``[...]`` int64, aligned with the hidden states. They say which positions count,
            and are among the candidates under an :class:`SCEConfig`; None: all positions count.
        divergence: "forward_kl", KL(teacher, student); "reverse_kl", KL(student, teacher); or
            "jsd", GKD's (arXiv 2306.13649).
        temperature: T > 0, of both. Stored log-probabilities must have been computed at it.
        beta: the teacher's share in the mixture of "jsd"; 0 is the forward KL and 1 the reverse, as
            in TRL's GKDTrainer.
        objective: "exact"; or an :class:`SCEConfig`, whose lists and tail stand in for the
            catalogue on both sides.
        state: label counts, kept between calls, that the tail is drawn from. None: this call's
            labels and the uniform floor. Under an SCEConfig only, as ``generator``.
        generator: CPU generator that gives the seed of this call's draws; None: torch's own.
        reduction: "mean" over the positions that count, "sum", or "none" (``[...]``, 0 elsewhere).
        ignore_index: label of positions that are left out.
        num_items_in_batch: the sum is divided by this instead.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs). If no position counts: zeros that are connected to
        the graph.

    Raises:
        ValueError: shapes or vocabularies that do not fit, a temperature that is not positive,
            stored probabilities that sum to more than 1, options that do not go together.
        TypeError: something else in the place of student, teacher or objective.
    """
    chosen = Divergence(divergence, beta)
    _check(student, teacher, temperature, objective, chosen)
    hidden_states, head = student.hidden_states, _head(student, temperature)
    shape = hidden_states.shape[:-1]
    if labels is None:
        labels = torch.zeros(shape, dtype=torch.int64, device=hidden_states.device)
        flat_labels, ignored = labels.reshape(-1), -1
    else:
        flat_labels, ignored = labels.reshape(-1).long(), ignore_index
    check_inputs(hidden_states, head, labels, reduction)
    dtype = compute_dtype(hidden_states, head.weight)
    valid = valid_positions(flat_labels, ignored, head.vocab_size)[0]
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    if valid.numel() == 0:
        sparse = objective != "exact" and objective.sparse_grad
        loss = connected_zero(head, hidden, sparse).to(dtype)
        return loss + hidden.new_zeros(shape, dtype=dtype) if reduction == "none" else loss

    positions = Positions(hidden[valid], flat_labels[valid])
    if reduction != "none":
        count = valid.numel() if reduction == "mean" else 1
        count = count if num_items_in_batch is None else num_items_in_batch
        positions = replace(positions, weight=weight_of_each(positions, count, None, dtype))
    theirs = _teacher(teacher, temperature, valid, dtype, head.vocab_size)
    # Autocast would round the logits; the losses choose their own dtype.
    with torch.autocast(hidden.device.type, enabled=False):
        if objective == "exact":
            loss = exact_divergence(head, positions, theirs, chosen)
        else:
            call = Call(objective.backend)
            candidates = distilled_candidates(
                objective, head, positions, theirs, call, state, generator
            )
            loss = candidate_divergence(head, positions, candidates, theirs, chosen)[0]
    return scatter_to(labels, valid, loss) if reduction == "none" else loss


def _head(scores: HeadScores, temperature: float) -> Head:
    """Its head with the temperature in the transform, and biases that keep a class out finite: the
    log of a probability of 0 must be a number here."""
    post, bias = scores.post, scores.bias
    cap = None if post.soft_cap is None else post.soft_cap / temperature
    if bias is not None:
        bias = bias.clamp_min(max(FINITE, torch.finfo(bias.dtype).min))
    post = LogitTransform(post.scale / temperature, cap)
    return Head(scores.weight, scores.low_rank, bias, post)


FINITE = -1e25
"""Least bias; a hundred thousandth of :data:`sce_lm.ops.divergence.FLOOR`, so that a temperature
can divide it."""


def _teacher(
    teacher: HeadScores | StoredTopK,
    temperature: float,
    valid: Tensor,
    dtype: torch.dtype,
    vocab_size: int,
) -> Teacher:
    """The teacher of the positions that count, in the dtype of the computation."""
    if isinstance(teacher, HeadScores):
        hidden = teacher.hidden_states.detach().flatten(0, -2)[valid]
        head = _head(teacher, temperature)
        tensors = [None if t is None else t.detach() for t in head.tensors]
        if dtype != torch.float64:  # the student says in what is computed
            tensors = [
                t.float() if t is not None and t.dtype == torch.float64 else t for t in tensors
            ]
            hidden = hidden.float() if hidden.dtype == torch.float64 else hidden
        weight, low_rank, bias = tensors
        assert weight is not None
        return HeadTeacher(Head(weight, low_rank, bias, head.post), hidden)
    ids = teacher.ids.flatten(0, -2)[valid].long()
    log_probs = teacher.log_probs.detach().flatten(0, -2)[valid].to(dtype)
    return TopKTeacher(ids, log_probs.clamp_min(FINITE), teacher.rest, vocab_size)


def _check(
    student: Any, teacher: Any, temperature: float, objective: Any, divergence: Divergence
) -> None:
    """Raise one sentence for a call that means nothing."""
    if not isinstance(student, HeadScores):
        raise TypeError(
            f"the student is a {type(student).__name__}; pass HeadScores(hidden_states, weight), "
            "or HeadScores.of(lazy_logits)."
        )
    if not isinstance(teacher, HeadScores | StoredTopK):
        raise TypeError(
            f"the teacher is a {type(teacher).__name__}; pass HeadScores(hidden_states, weight) of "
            "its own, or StoredTopK(ids, log_probs)."
        )
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise ValueError(f"temperature is {temperature!r}; give a positive, finite number.")
    if isinstance(objective, SCEConfig):
        refuse_unsuited(objective, isinstance(teacher, StoredTopK))
    elif not (isinstance(objective, str) and objective == "exact"):
        raise TypeError(f'objective is {objective!r}; pass "exact" or an SCEConfig.')
    _check_scores("the student", student)
    if isinstance(teacher, HeadScores):
        _check_scores("the teacher", teacher)
        if len(teacher.weight) != len(student.weight):
            raise ValueError(
                f"the teacher has {len(teacher.weight)} classes and the student "
                f"{len(student.weight)}; give the teacher the student's classes in the student's "
                "order, weight[ids] with the teacher's id of each, or weight[:V] where a "
                "vocabulary is only padded."
            )
        _check_aligned(student, teacher.hidden_states, "hidden states")
    else:
        _check_stored(student, teacher, temperature, divergence)


def _check_scores(name: str, scores: HeadScores) -> None:
    try:
        labels = scores.hidden_states.new_empty(scores.hidden_states.shape[:-1], dtype=torch.int64)
        check_inputs(scores.hidden_states, _head(scores, 1.0), labels, "mean")
    except ValueError as error:
        raise ValueError(f"of {name}: {error}") from None


def _check_aligned(student: HeadScores, theirs: Tensor, what: str) -> None:
    expected = student.hidden_states.shape[:-1]
    if theirs.shape[:-1] != expected:
        raise ValueError(
            f"the teacher's {what} have shape {tuple(theirs.shape)} and the student has positions "
            f"{tuple(expected)}; pass both for the same positions, shifted alike."
        )
    if theirs.device != student.hidden_states.device:
        raise ValueError(
            f"the teacher is on {theirs.device} and the student on "
            f"{student.hidden_states.device}; move them to one device."
        )


def _check_stored(
    student: HeadScores, teacher: StoredTopK, temperature: float, divergence: Divergence
) -> None:
    ids, log_probs = teacher.ids, teacher.log_probs
    vocab_size = len(student.weight)
    if ids.shape != log_probs.shape or not ids.shape[-1]:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)} and log_probs {tuple(log_probs.shape)}; pass the "
            "same [..., k] for both, k at least 1."
        )
    _check_aligned(student, ids, "ids")
    if ids.dtype not in (torch.int64, torch.int32) or not log_probs.is_floating_point():
        raise ValueError(
            f"ids has dtype {ids.dtype} and log_probs {log_probs.dtype}; pass integers (int64, "
            "int32) and floating-point numbers."
        )
    if teacher.rest not in ("ghost", "uniform", "drop"):
        raise ValueError(f'rest is {teacher.rest!r}; choose "ghost", "uniform" or "drop".')
    if temperature != teacher.temperature:
        raise ValueError(
            f"temperature is {temperature} and the teacher was stored at {teacher.temperature}; "
            "use that one, as log-probabilities of k classes cannot be brought to another."
        )
    is_reverse = divergence.kind == "reverse_kl" or (divergence.kind, divergence.beta) == ("jsd", 1)
    if teacher.rest == "drop" and is_reverse:
        raise ValueError(
            'the reverse KL from a teacher with rest="drop" is infinite, as the student gives mass '
            'to classes that it has none for; use rest="ghost" or "uniform".'
        )
    if not ids.numel():
        return
    low, high = ids.amin().item(), ids.amax().item()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"ids holds {low if low < 0 else high}, outside [0, {vocab_size}); bring the teacher's "
            "ids to the student's vocabulary first, id_map[ids] with the student's id of each."
        )
    ordered = ids.sort(dim=-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError("ids names a class twice at one position; give each class once.")
    most = log_probs.float().exp().sum(dim=-1).amax().item()
    slack = max(1e-4, 4 * torch.finfo(log_probs.dtype).eps)
    if not most <= 1.0 + slack:
        raise ValueError(
            f"log_probs add up to a probability of {most:.4g} at some position; give log-softmax "
            "values over the whole vocabulary, which sum to at most 1."
        )
