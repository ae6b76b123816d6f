"""Scalable Cross-Entropy as published (arXiv 2409.18721, algorithm 1).

Random directions B pick ``b_x`` positions and ``b_y`` classes each by inner product; the softmax
runs inside the bucket, and a position in several buckets takes its largest loss. Positions in no
bucket are not trained, and the partition function is a lower bound: the loss is no likelihood.
:mod:`sce_lm.objectives.sce` is the corrected form.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sce_lm.candidates.buckets import random_centers
from sce_lm.config import PublishedSCEConfig
from sce_lm.objectives.base import Statistics
from sce_lm.objectives.call import Call
from sce_lm.objectives.sampled_objective import SampledObjective
from sce_lm.ops.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.catalogue_scan import catalogue_topk
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.static_shapes import needs_static_shapes


class PublishedSCE(SampledObjective):
    """Scalable Cross-Entropy as published, by a :class:`~sce_lm.config.PublishedSCEConfig`."""

    name = "sce"
    config_class = PublishedSCEConfig
    config: PublishedSCEConfig

    def to_dict(self) -> dict[str, Any]:
        name, *fields = super().to_dict().items()
        return dict([name, ("published", True), *fields])

    def has_static_shapes(self, head: Head) -> bool:
        return True

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        config, num_positions = self.config, len(positions)
        sizes = config.resolve(num_positions, head.num_classes)
        device = positions.labels.device
        with torch.no_grad():
            hidden = positions.hidden.to(compute_dtype(positions.hidden))
            centers = random_centers(
                hidden, sizes.num_buckets, call.stream("centers"), mix=config.mix
            )
            scores = centers @ hidden.T
            if positions.is_valid is not None:
                scores = scores.masked_fill(~positions.is_valid, -torch.inf)
            position = torch.topk(scores, sizes.bucket_positions, sorted=False).indices.reshape(-1)
            items = catalogue_topk(
                centers,
                head,
                sizes.bucket_candidates,
                excluded=head.masked,
                backend=call.backend,
            )
            bucket = torch.arange(len(items), device=device)
            bucket = bucket.repeat_interleave(sizes.bucket_positions)
            visits = torch.zeros_like(positions.labels)
            visits.index_add_(0, position, torch.ones_like(position))
            covered = positions.valid(visits) > 0
            is_static = needs_static_shapes(device)
            if config.reduce == "max":
                # The losses of all (bucket, position) pairs first; only the largest of each
                # position is then computed again with its gradient.
                pairs = Positions(positions.hidden[position], positions.labels[position])
                pair_loss = self._loss(head, pairs, bucket, items, call)
                best = torch.full_like(pair_loss[:1], -torch.inf).repeat(num_positions)
                best.scatter_reduce_(0, position, pair_loss, "amax")
                is_best = pair_loss == best[position]
                none, every = len(position), torch.arange(len(position), device=device)
                pair = torch.full_like(visits, none)
                pair.scatter_reduce_(0, position, every.masked_fill(~is_best, none), "amin")
                if is_static:  # a pair for every position, any where it is not covered
                    position = torch.arange(num_positions, device=device)
                    bucket = bucket[pair.clamp_max_(none - 1)]
                else:
                    pair = pair[covered]
                    position, bucket = position[pair], bucket[pair]
                visits = covered.long()
            num_valid, num_covered = positions.num_valid, covered.sum()
            if is_static:
                num_covered = num_covered.clamp_min(1)
                visits = visits.clamp_min(1)
            else:
                num_covered = int(num_covered)

        # mean over covered positions = sum over them / N · (N / covered)
        dtype = compute_dtype(positions.hidden, head.weight)
        share = (num_valid / num_covered) / visits[position].to(dtype)
        weight = positions.weight
        if weight is not None:
            weight = (weight if weight.dim() == 0 else weight[position]) * share
        hidden, labels = positions.hidden[position], positions.labels[position]
        is_pair = covered[position] if is_static else None
        pairs = Positions(hidden, labels, weight, positions.terms, is_pair)
        if weight is not None:
            pairs = replace(pairs, weight=pairs.valid(weight))
        loss = self._loss(head, pairs, bucket, items, call)
        if weight is None:
            of_pairs = loss / visits[position].to(dtype)
            loss = loss.new_zeros(num_positions).index_add(0, position, of_pairs)
        if torch.is_tensor(num_valid):
            num_valid = num_valid.clamp_min(1)
        coverage = num_covered / num_valid
        visited = sizes.num_buckets * sizes.bucket_positions
        met = sizes.bucket_candidates * visited / num_positions
        chosen = sizes.num_buckets * (1 + config.mix + head.vocab_size / num_positions)
        if call.counted:
            self.state.average(
                coverage=coverage,
                candidates_per_position=met,
                products_per_position=chosen + met,
            )
        return loss, Statistics(
            num_valid=num_positions,
            coverage=float(coverage) if call.want_statistics else 1.0,
            products_per_position=chosen + met,
            covered=covered,
            candidates=torch.unique(items) if call.want_statistics else None,
        )

    def _loss(self, head: Head, pairs: Positions, bucket, items, call: Call) -> torch.Tensor:
        """Candidate cross-entropy of (bucket, position) pairs."""
        none = bucket.new_empty(0)
        candidates = Candidates(
            none,
            none,
            torch.zeros(0, dtype=torch.float64, device=bucket.device),
            items,
            bucket,
            sparse_grad=self.config.sparse_grad,
        )
        return candidate_cross_entropy(head, pairs, candidates, backend=call.backend).loss
