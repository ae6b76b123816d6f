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

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad

from sce_lm import objectives
from sce_lm.candidates.state import SCEState
from sce_lm.config import SCEConfig
from sce_lm.objectives.base import Objective, Reduction, Statistics
from sce_lm.objectives.call import Call
from sce_lm.objectives.compile_operator import outside_graphs
from sce_lm.objectives.exact import Exact
from sce_lm.objectives.published_sce import PublishedSCE
from sce_lm.objectives.sce import SCE
from sce_lm.ops.candidate_cross_entropy import CandidatePass
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.exact_cross_entropy import ExactScores, Taken, exact_gradients
from sce_lm.ops.head import Head, Needs
from sce_lm.ops.head_loss import Found, Gradients, OfInputs, Pass, head_loss
from sce_lm.ops.logit_stream import LogitStream, Top
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import Positions


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
    token_weights: torch.Tensor | None = None,
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
    own, shard = _own_part(Head(weight, low_rank, bias, post), vocab_size, group)
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
        token_weights=token_weights,
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
    own, shard = _own_part(Head(weight, low_rank, bias, post), vocab_size, group)
    own_labels = shard.own_labels(labels)
    found = LogitStream(own, hidden).scan(ids=own_labels[:, None], top_k=top_k)
    own_sums = found.log_partition, found.logits_at.squeeze(1)
    log_partition, label_logit = shard.add_up(*own_sums, own_labels >= 0)
    values, classes = found.top.values, found.top.indices + shard.rows.start
    missing = (0, top_k - values.shape[1])  # a rank may have fewer rows than top_k
    values = torch.cat(shard.gather(pad(values, missing, value=-torch.inf)), dim=1)
    classes = torch.cat(shard.gather(pad(classes, missing)), dim=1)
    best = torch.topk(values, min(top_k, shard.vocab_size), dim=1).indices
    return ExactScores(
        label_logit - log_partition,
        shard.winner(found.top)[1] == labels,
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

    def add_up(
        self, log_partition: torch.Tensor, label_logit: torch.Tensor, is_own: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N]`` log Z and label logits over all ranks.

        Args:
            log_partition, label_logit: ``[N]`` this rank's; 0 for a label that is not.
            is_own: ``[N]`` whether it holds the label's row.

        Raises:
            ValueError: a label belongs to several ranks or to none.
        """
        largest = self.reduce(log_partition.clone(), dist.ReduceOp.MAX)
        share = (log_partition - largest).exp()
        parts = torch.stack([share, label_logit, is_own.to(share.dtype)])
        total, label_logit, owners = self.reduce(parts)
        if (owners != 1).any():
            raise ValueError(
                "ranks that share a head got different labels; give every rank of the group the "
                "same hidden states and labels."
            )
        return largest + total.log(), label_logit

    def winner(self, top: Top) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N]`` the largest logits of all, and their classes in ``[0, V)`` (the first one, if
        several tie).

        Args:
            top: the best of this rank's rows, counted from its first.
        """
        best, best_class = (x[:, 0] for x in top)
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
        if isinstance(objective, PublishedSCE):
            lacks = "published SCE"
        elif isinstance(objective, SCE):
            lacks = _not_by_rank(objective.config)
        if objective.config.terms():
            lacks = "a loss with z_loss or label_smoothing"
        if lacks is not None:
            raise ValueError(
                f"{lacks} has no vocabulary-parallel form; use SCE (default), SCEConfig(), or "
                'objectives.get("exact") with a head that is sharded by rows.'
            )
        if isinstance(objective, SCE):  # each rank chooses from its own rows alone
            by_rank = replace(objective.config, bucket_sampling="top", row_control_variate=False)
            objective = SCE(by_rank, objective.state)
        self.name, self.config, self.state = objective.name, objective.config, objective.state
        self.objective, self.shard = objective, shard
        self.vocab_size = shard.vocab_size

    def largest_of(self, x: torch.Tensor) -> torch.Tensor:
        return self.shard.reduce(x, dist.ReduceOp.MAX)

    def begin(
        self, call: Call, head: Head, positions: Positions, generator: torch.Generator | None
    ) -> Call:
        if self.state is None:
            return call
        own = self.shard.own_labels(positions.labels)
        return call.begin(self.state, own[own >= 0], head.vocab_size, generator)

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        own = replace(positions, labels=self.shard.own_labels(positions.labels))
        if isinstance(self.objective, SCE):
            return self._sce(self.objective, head, own, call)
        return self._exact(head, own, positions.labels, call)

    def nothing(self, head: Head, positions: Positions, call: Call) -> torch.Tensor:
        """Empty tensors go through the collectives of any other call."""
        none = positions.hidden.new_empty(0, dtype=compute_dtype(positions.hidden, head.weight))
        run = _ExactOverRanks(self.shard)
        loss, _ = head_loss(run, head, positions)
        if call.want_statistics and isinstance(self.objective, SCE):
            self.shard.reduce(none)
        elif call.want_statistics:
            self.shard.winner(Top(none[:, None], positions.labels[:, None]))
        return loss.sum() + super().nothing(head, positions, call)

    def _sce(
        self, objective: SCE, head: Head, own: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        chosen = objective.choose(head, own, call, self.shard.vocab_size)
        run = _CandidatesOverRanks(self.shard, chosen.candidates)
        loss, (log_partition,) = head_loss(run, head, own)
        statistics = objective.observe(head, own, call, chosen, log_partition)
        if call.want_statistics:  # the variances of independent samples add up
            assert statistics.candidates is not None
            ids = statistics.candidates + self.shard.rows.start
            error = statistics.relative_error
            variance = torch.zeros_like(log_partition) if error is None else error.square()
            statistics = replace(
                statistics, relative_error=self.shard.reduce(variance).sqrt(), candidates=ids
            )
        return loss, statistics

    def _exact(
        self, head: Head, own: Positions, labels: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        run = _ExactOverRanks(self.shard)
        loss, (log_partition,) = head_loss(run, head, own)
        statistics = Statistics(len(labels), products_per_position=float(head.vocab_size))
        if call.want_statistics:
            assert run.top is not None
            best, winner = self.shard.winner(run.top)
            confidence = (best - log_partition).exp()
            statistics = replace(statistics, correct=winner == labels, confidence=confidence)
        return loss, statistics


def _not_by_rank(config: SCEConfig) -> str | None:
    """What a rank cannot choose by itself, or from its own labels alone."""
    if config.bucket_sampling == "priority":
        return f"bucket_sampling={config.bucket_sampling!r}"
    if config.target_relative_error is not None:
        return "target_relative_error"
    if config.row_control_variate is True:
        return "row_control_variate"
    others = sorted(set(config.prior_shares()) - {"labels", "uniform"})
    return f"prior {others[0]!r}" if others else None


class _OverRanks(Pass):
    """``log Z - s_y`` from each rank's sums; the gradients are taken once log Z is known."""

    def __init__(self, shard: VocabShard) -> None:
        self.shard = shard

    @abstractmethod
    def sums(self, head: Head, positions: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N]`` log Z and label logits of this rank's rows."""

    @abstractmethod
    def gradients(
        self, head: Head, positions: Positions, needs: Needs, log_partition: torch.Tensor
    ) -> OfInputs:
        """Of this rank's rows, and its part of the hidden states'."""

    def forward(self, head: Head, positions: Positions, needs: Needs) -> Found:
        is_own = positions.labels >= 0
        log_partition, label_logit = self.shard.add_up(*self.sums(head, positions), is_own)
        return Found(log_partition - label_logit, (log_partition,), kept=log_partition)

    def backward(
        self, head: Head, positions: Positions, needs: Needs, kept: torch.Tensor | None
    ) -> Gradients:
        assert kept is not None
        assert positions.weight is not None
        positions = replace(positions, weight=positions.weight.expand(len(positions)))
        if len(positions):
            hidden, *of_head = self.gradients(head, positions, needs, kept)
        else:
            hidden, of_head = kept.new_empty(positions.hidden.shape), [None] * 3
        if not needs.hidden or hidden is None:
            return Taken((None, *of_head))
        # In the dtype of the computation: what is rounded to that of the hidden states is the
        # whole gradient, once.
        hidden = hidden[:, : positions.hidden.shape[1]].contiguous()
        return Taken((self.shard.reduce(hidden), *of_head))


class _CandidatesOverRanks(_OverRanks):
    def __init__(self, shard: VocabShard, candidates: Candidates) -> None:
        super().__init__(shard)
        self.own = CandidatePass(candidates)

    def sums(self, head: Head, positions: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.own.run(head, positions)[0]
        return found.log_partition, found.label_logit

    def gradients(
        self, head: Head, positions: Positions, needs: Needs, log_partition: torch.Tensor
    ) -> OfInputs:
        return self.own.run(head, positions, needs, log_partition)[1].of_inputs()


class _ExactOverRanks(_OverRanks):
    top: Top | None = None
    """The best class of this rank's rows."""

    def sums(self, head: Head, positions: Positions) -> tuple[torch.Tensor, torch.Tensor]:
        found = LogitStream(head, positions.hidden).scan(ids=positions.labels[:, None], top_k=1)
        self.top = found.top
        return found.log_partition, found.logits_at.squeeze(1)

    def gradients(
        self, head: Head, positions: Positions, needs: Needs, log_partition: torch.Tensor
    ) -> OfInputs:
        return exact_gradients(head, positions, log_partition, needs)


def _own_part(
    head: Head, vocab_size: int | None, group: dist.ProcessGroup | None
) -> tuple[Head, VocabShard]:
    """This rank's rows as plain tensors, and which they are."""
    weight = head.weight
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
    low_rank, bias = (t.to_local() if isinstance(t, DTensor) else t for t in head.tensors[1:])
    rows = own_rows(vocab_size, group)
    if len(weight) != rows.stop - rows.start:
        raise ValueError(
            f"weight has {len(weight)} rows, but this rank holds rows {rows.start} to "
            f"{rows.stop} of {vocab_size}; pass W[own_rows(vocab_size, group)]."
        )
    own = head._replace(weight=weight, low_rank=low_rank, bias=bias)
    return own, VocabShard(vocab_size, rows, group)
