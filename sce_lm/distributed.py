"""A head whose rows are spread over the ranks of a process group: vocabulary parallel.

Rank r holds ``W_r [V_r, d]``, rows of W cut as torch.chunk and DTensor's ``Shard(0)`` cut them. All
ranks of the group have the same hidden states and labels. The sums over classes are sums over
ranks,

    Z_t = sum_r Z_tr,     Z_tr = sum_{j in rows of r} exp s_tj        (or an unbiased Zhat_tr)
    loss_t = log Z_t - s_ty
    dL/dh_t = sum_r (dL/dh_t through the rows of r);   dL/dW_r needs no other rank

so that a rank is a stratum of the sampler: it chooses candidates among its own rows by its own
label counts, noise, buckets and mean (lists are cut in proportion to its rows), and tells nobody.
Whatever is unbiased for each ``Z_tr`` is unbiased for their sum.

What a call communicates does not depend on its data:

    forward    all-reduce (max) of log Z_tr, [N]; all-reduce (sum) of exp(log Z_tr - max), of the
               label's logit, and of a 1 where the label's row is, [3, N]; with a bias that a
               sampler must know the masks of, all-reduce (max) of the largest bias
    backward   all-reduce (sum) of dL/dh, [N, d]; logits are computed again, now with Z_t known
    statistics, if asked for: one more (relative error) or two (accuracy), [N]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad

from sce_lm import objectives
from sce_lm.candidates.noise import draw_seed
from sce_lm.candidates.state import SCEState
from sce_lm.config import SCEConfig
from sce_lm.objectives.base import HeadInputs, Objective, Reduction, Statistics
from sce_lm.objectives.compiled import outside_graphs
from sce_lm.objectives.exact import Exact
from sce_lm.objectives.sce import SCE
from sce_lm.ops.candidate_cross_entropy import CandidatePasses, Sums
from sce_lm.ops.exact_cross_entropy import ExactPasses, ExactScores, Scan, compute_dtype
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.rows import HeadColumns, Needs

MakePasses = Callable[[torch.Tensor, HeadColumns], CandidatePasses | ExactPasses]
"""Of hidden states and the columns of this rank's rows."""


@outside_graphs
def vocab_parallel_loss(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    bias: torch.Tensor | None = None,
    low_rank: torch.Tensor | None = None,
    post: LogitTransform = LogitTransform(),
    config: SCEConfig | Objective = SCEConfig(),
    state: SCEState | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    num_items_in_batch: torch.Tensor | int | None = None,
    return_stats: bool = False,
) -> Any:
    """The loss of a head whose rows are spread over ranks, which call this together.

    Args:
        hidden_states: ``[..., d]``, the same on every rank of the group.
        weight: ``[V_r, d]``, this rank's rows ``W[own_rows(vocab_size, group)]``; or a DTensor
            ``[V, d]`` with placement ``Shard(0)``, as the head of a tensor-parallel plan has.
        labels: ``[...]`` int64 in ``[0, V)``, the same on every rank, aligned with
            ``hidden_states``: no shift is made here.
        vocab_size: V. A DTensor knows it.
        group: the ranks that share the head; None: all there are. A DTensor knows it.
        bias: ``[V_r]``, or a DTensor as ``weight`` is, or None.
        low_rank: ``[V_r, r]``, or a DTensor as ``weight`` is, or None.
        config: an :class:`~sce_lm.SCEConfig` of the corrected form, whose list sizes are those of
            the whole head; or an objective, "exact" or "sce", the latter with a state of its own.
        state: with an SCEConfig, what this rank keeps between calls: label counts of its rows.
        generator: CPU generator of this rank's seed; ranks need not agree on it.

    The other arguments and the result are those of :meth:`sce_lm.objectives.Objective.__call__`.
    The loss is the same on every rank, and so is the gradient of ``hidden_states``, which is whole;
    that of ``weight`` is this rank's rows'. Statistics count this rank's products
    and name its own candidates.

    Raises:
        ValueError: ``weight`` is not this rank's rows, there are more ranks than rows, a DTensor is
            not sharded by rows alone, labels differ between ranks, the objective is another one;
            and what :meth:`sce_lm.objectives.Objective.__call__` raises.
    """
    objective = objectives.from_config(config)
    if state is not None:
        if objective is config:
            raise ValueError("an objective has a state of its own; give state with an SCEConfig.")
        objective.state = state
    own, shard = _own_part(HeadColumns(weight, low_rank, bias), vocab_size, group)
    return VocabParallel(objective, shard)(
        hidden_states,
        own.weight,
        labels,
        bias=own.bias,
        low_rank=own.low_rank,
        post=post,
        generator=generator,
        reduction=reduction,
        ignore_index=ignore_index,
        num_items_in_batch=num_items_in_batch,
        return_stats=return_stats,
    )


@torch.no_grad()
def vocab_parallel_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    top_k: int,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    bias: torch.Tensor | None = None,
    low_rank: torch.Tensor | None = None,
    post: LogitTransform = LogitTransform(),
) -> ExactScores:
    """Log-probabilities of the labels and the ``top_k >= 1`` best classes of the whole head, in one
    pass over each rank's rows and without gradient; the same on every rank.

    Args:
        hidden: ``[N, d]``, N >= 1, the same on every rank.
        labels: ``[N]`` int64 in ``[0, V)``, the same on every rank.

    The other arguments are those of :func:`vocab_parallel_loss`, and it raises what that raises.
    Collectives: two for the loss, two for accuracy, and two that gather scores and classes.
    """
    own, shard = _own_part(HeadColumns(weight, low_rank, bias), vocab_size, group)
    own_labels = shard.own_labels(labels)
    found = ExactPasses(hidden, own, own_labels, post).scan(top_k=top_k)
    log_partition, label_logit = shard.add_up(found, own_labels >= 0)
    values, classes = found.top.values, found.top.indices + shard.rows.start
    missing = (0, top_k - values.shape[1])  # a rank may have fewer rows than top_k
    values = torch.cat(shard.gather(pad(values, missing, value=-torch.inf)), dim=1)
    classes = torch.cat(shard.gather(pad(classes, missing)), dim=1)
    best = torch.topk(values, min(top_k, shard.vocab_size), dim=1).indices
    return ExactScores(
        label_logit - log_partition,
        shard.winner(found.best, found.best_class)[1] == labels,
        classes.gather(1, best),
    )


def own_rows(vocab_size: int, group: dist.ProcessGroup | None = None) -> slice:
    """The rows of a head of ``vocab_size`` that this rank of the group (None: of all) holds.

    Raises:
        ValueError: some rank would have none.
    """
    ranks = dist.get_world_size(group)
    part = -(-vocab_size // ranks)
    if part * (ranks - 1) >= vocab_size:
        raise ValueError(
            f"{vocab_size} rows cut into parts of {part} leave nothing for the last of {ranks} "
            "ranks; share this head among fewer."
        )
    start = dist.get_rank(group) * part
    return slice(start, min(start + part, vocab_size))


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of a head, and what it does together with the group's other ranks."""

    vocab_size: int
    rows: slice
    group: dist.ProcessGroup | None

    def own_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels counted from this rank's first row, -1 where they are another rank's."""
        is_own = (labels >= self.rows.start) & (labels < self.rows.stop)
        return torch.where(is_own, labels - self.rows.start, -1)

    def add_up(self, found: Sums | Scan, is_own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N]`` log Z and label logits over all ranks.

        Args:
            found: this rank's.
            is_own: ``[N]`` whether it holds the label's row.

        Raises:
            ValueError: a label belongs to several ranks or to none.
        """
        own = found.log_partition
        largest = self.reduce(own.clone(), dist.ReduceOp.MAX)
        parts = torch.stack([(own - largest).exp(), found.label_logit, is_own.to(own.dtype)])
        total, label_logit, owners = self.reduce(parts)
        if (owners != 1).any():
            raise ValueError(
                "ranks that share a head got different labels; give every rank of the group the "
                "same hidden states and labels."
            )
        return largest + total.log(), label_logit

    def winner(
        self, best: torch.Tensor, best_class: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N]`` the largest logits of all, and their classes in ``[0, V)`` (the first one, if
        several tie).

        Args:
            best: ``[N]`` this rank's largest logits.
            best_class: ``[N]`` and their rows, counted from its first.
        """
        largest = self.reduce(best.clone(), dist.ReduceOp.MAX)
        first = torch.where(best == largest, best_class + self.rows.start, self.vocab_size)
        return largest, self.reduce(first, dist.ReduceOp.MIN)

    def reduce(self, x: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """All-reduce in place."""
        dist.all_reduce(x, op, group=self.group)
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's ``x``, which has the same shape everywhere."""
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, x, group=self.group)
        return parts


class VocabParallel(Objective):
    """``objective`` over a head of which this rank holds the rows of ``shard``."""

    def __init__(self, objective: Objective, shard: VocabShard) -> None:
        lacks = None if isinstance(objective, Exact) else f"objective {objective.name!r}"
        if isinstance(objective, SCE):
            lacks = _not_by_rank(objective.config)
        if lacks is not None:
            raise ValueError(
                f"{lacks} has no vocabulary-parallel form; use corrected SCE (SCEConfig()) or "
                'objectives.get("exact") with a head that is sharded by rows.'
            )
        self.name, self.config, self.state = objective.name, objective.config, objective.state
        self.objective, self.shard = objective, shard
        self.vocab_size = shard.vocab_size

    def largest_of(self, x: torch.Tensor) -> torch.Tensor:
        return self.shard.reduce(x, dist.ReduceOp.MAX)

    def compute(self, inputs: HeadInputs) -> tuple[torch.Tensor, Statistics]:
        own = replace(inputs, labels=self.shard.own_labels(inputs.labels))
        if isinstance(self.objective, SCE):
            loss, statistics = self._sce(self.objective, own)
        else:
            loss, statistics = self._exact(own, inputs.labels)
        if inputs.position_weight is not None:
            loss = (loss * inputs.position_weight).sum()
        return loss, statistics

    def nothing(self, inputs: HeadInputs) -> torch.Tensor:
        """Empty tensors go through the collectives of any other call."""
        none = inputs.hidden.new_empty(0, dtype=compute_dtype(inputs.hidden, inputs.weight))
        loss, _ = self._over_ranks(inputs, None, Sums(none, none, inputs.labels))
        if inputs.want_statistics and isinstance(self.objective, SCE):
            self.shard.reduce(none)
        elif inputs.want_statistics:
            self.shard.winner(none, inputs.labels)
        return loss.sum() + super().nothing(inputs)

    def _sce(self, objective: SCE, own: HeadInputs) -> tuple[torch.Tensor, Statistics]:
        seed = draw_seed(own.generator)
        listed = replace(own, labels=own.labels[own.labels >= 0])
        chosen = objective.choose(listed, seed, self.shard.vocab_size)
        make = partial(
            CandidatePasses, labels=own.labels, candidates=chosen.candidates, post=own.post
        )
        with torch.no_grad():
            found = make(own.hidden, own.columns).scan()
        loss, log_partition = self._over_ranks(own, make, found)
        statistics = objective.observe(own, chosen, log_partition)
        if own.want_statistics:  # the variances of independent samples add up
            assert statistics.candidates is not None
            ids = statistics.candidates + self.shard.rows.start
            error = statistics.relative_error
            variance = torch.zeros_like(log_partition) if error is None else error.square()
            statistics = replace(
                statistics, relative_error=self.shard.reduce(variance).sqrt(), candidates=ids
            )
        return loss, statistics

    def _exact(self, own: HeadInputs, labels: torch.Tensor) -> tuple[torch.Tensor, Statistics]:
        make = partial(ExactPasses, labels=own.labels, post=own.post)
        with torch.no_grad():
            found = make(own.hidden, own.columns).scan()
        loss, log_partition = self._over_ranks(own, make, found)
        statistics = Statistics(len(labels), products_per_position=float(len(own.weight)))
        if own.want_statistics:
            best, winner = self.shard.winner(found.best, found.best_class)
            confidence = (best - log_partition).exp()
            statistics = replace(statistics, correct=winner == labels, confidence=confidence)
        return loss, statistics

    def _over_ranks(
        self, own: HeadInputs, make: MakePasses | None, found: Sums | Scan
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N]`` losses, and log Z without gradient."""
        return _LossOverRanks.apply(own.hidden, *own.columns, own.labels, make, found, self.shard)


def _not_by_rank(config: SCEConfig) -> str | None:
    """What a rank cannot choose by itself, or from its own labels alone."""
    if config.assignment == "topk":
        return "published SCE"
    if config.bucket_sampling != "top":
        return f"bucket_sampling={config.bucket_sampling!r}"
    if config.target_relative_error is not None:
        return "target_relative_error"
    if config.row_control_variate:
        return "row_control_variate"
    others = sorted(set(config.prior_shares()) - {"labels", "uniform"})
    return f"prior {others[0]!r}" if others else None


class _LossOverRanks(torch.autograd.Function):
    """``log Z - s_y`` from each rank's sums; ``make`` builds the passes again for the gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, low_rank, bias, labels, make, found, shard):
        log_partition, label_logit = shard.add_up(found, labels >= 0)
        ctx.make, ctx.shard = make, shard
        ctx.save_for_backward(hidden, weight, low_rank, bias, log_partition)
        ctx.mark_non_differentiable(log_partition)
        return log_partition - label_logit, log_partition

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        hidden, *head, log_partition = ctx.saved_tensors
        columns, needs = HeadColumns(*head), Needs.of(ctx, True)
        if len(hidden):
            passes = ctx.make(hidden, columns)
            grad_hidden, *of_head = passes.gradients(log_partition, grad_outputs[0], needs)
        else:
            grad_hidden, of_head = log_partition.new_empty(hidden.shape), [None] * 3
        if needs.hidden:
            # In the dtype of the computation: what is rounded to that of the hidden states is the
            # whole gradient, once.
            grad_hidden = grad_hidden[:, : hidden.shape[1]].contiguous()
            grad_hidden = ctx.shard.reduce(grad_hidden).to(hidden.dtype)
        else:
            grad_hidden = None
        of_head = [None if g is None else g.to(part.dtype) for g, part in zip(of_head, columns)]
        return grad_hidden, *of_head, None, None, None, None


def _own_part(
    columns: HeadColumns, vocab_size: int | None, group: dist.ProcessGroup | None
) -> tuple[HeadColumns, VocabShard]:
    """This rank's rows as plain tensors, and which they are."""
    weight = columns.weight
    if isinstance(weight, DTensor):
        if weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),):
            raise ValueError(
                f"weight is a DTensor with placements {weight.placements}; a head that is shared "
                "by rows has (Shard(0),) on a mesh of one dimension, as transformers' plan "
                '"colwise_gather_output" makes it.'
            )
        vocab_size, group = weight.shape[0], weight.device_mesh.get_group()
        weight = weight.to_local()
    if vocab_size is None:
        raise ValueError(
            "weight is one rank's rows and no DTensor; give vocab_size, the rows of the whole head."
        )
    low_rank, bias = (t.to_local() if isinstance(t, DTensor) else t for t in columns[1:])
    rows = own_rows(vocab_size, group)
    if len(weight) != rows.stop - rows.start:
        raise ValueError(
            f"weight has {len(weight)} rows, but this rank holds rows {rows.start} to "
            f"{rows.stop} of {vocab_size}; pass W[own_rows(vocab_size, group)]."
        )
    return HeadColumns(weight, low_rank, bias), VocabShard(vocab_size, rows, group)
