"""Scalable Cross-Entropy, corrected: the default.

SCE (arXiv 2409.18721) runs the softmax inside buckets of like positions and classes; its partition
function is a lower bound there (:mod:`sce_lm.objectives.published_sce`). Here three disjoint parts
of the catalogue, different for each position, have sums that add up to an unbiased Zhat.

* shared: the batch's labels and the most frequent classes, with certainty;
* bucket: the top classes at the centre of the position's k-means bucket, with certainty;
* tail: a priority sample (Duffield, Lund, Thorup 2007) of everything else, one for all positions;
  of large catalogues a Poisson sample with the same inclusion probabilities. What it is drawn from
  is :mod:`sce_lm.objectives.tail_proposal`.

With ``bucket_sampling="priority"``, the default of wide heads, the last two are one: each bucket
has a priority sample of its own, by the softmax at its centre, of everything outside the shared
list.

The tail's control variate is Jensen's tangent. With m the mean raw logit over the rest R, known
from the mean of W's rows, ``sum_{j in R} (x_j - m) = 0``, so

    sum_{j in R} exp s_j  =  exp(g(m)) · (|R| + sum_{j in R} phi_j)
    phi = exp(g(x) - g(m)) - 1 - g'(m)(x - m)

and only phi is sampled. It is exactly unbiased for every g. Unbiased means Zhat and its gradient;
``log Zhat`` carries a bias of about half its relative variance, which the statistics report.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from sce_lm.candidates.bucket_samples import bucket_samples
from sce_lm.candidates.buckets import (
    KMEANS_POSITIONS_PER_BUCKET,
    KMEANS_STEPS,
    kmeans_buckets,
)
from sce_lm.candidates.center_softmax import CenterSoftmax, center_softmax
from sce_lm.candidates.distinct import distinct
from sce_lm.candidates.priority import priority_sample
from sce_lm.config import SCEConfig, SCESizes
from sce_lm.objectives import monitor
from sce_lm.objectives.base import Statistics
from sce_lm.objectives.call import Call
from sce_lm.objectives.chosen_sizes import Choice, chosen_sizes
from sce_lm.objectives.row_control import expected_rows
from sce_lm.objectives.sampled_objective import SampledObjective
from sce_lm.objectives.tail_proposal import TailProposal
from sce_lm.ops.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.catalogue_scan import catalogue_topk
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions

LARGE_CATALOGUE = 2**18
"""Classes above which a tail by labels, or uniform, is a Poisson sample, drawn in time that does
not depend on V."""


class Chosen(NamedTuple):
    """What one call of SCE (default) sums over."""

    candidates: Candidates
    proposal: TailProposal
    """What its tail was drawn from."""


class SCE(SampledObjective):
    """Scalable Cross-Entropy by an :class:`SCEConfig`, with its state."""

    name = "sce"
    config_class = SCEConfig
    config: SCEConfig
    drawn = ("tail_candidates", 0)
    """The option that sets the size of the latest samples, and that size."""
    latest: tuple[SCESizes, int, int] | None = None
    """Sizes of the latest call, its number of positions and the head's width."""
    covered = 0
    """Classes of the latest call if its lists held them all, else 0."""

    def has_static_shapes(self, head: Head) -> bool:
        return self.config.target_relative_error is None

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        chosen = self.choose(head, positions, call)
        loss, log_partition, _ = candidate_cross_entropy(
            head, positions, chosen.candidates, backend=call.backend
        )
        return loss, self.observe(head, positions, call, chosen, log_partition)

    def choose(
        self, head: Head, positions: Positions, call: Call, num_classes: int | None = None
    ) -> Chosen:
        """Candidates of one call.

        Args:
            head: all rows of the head, or those of one rank.
            num_classes: of the whole head; None: it is all here.
        """
        sizes = self.sizes(head, positions, call, num_classes or head.num_classes)
        self.latest = sizes, len(positions), head.weight.shape[1]
        proposal = TailProposal(self.config, sizes, head, positions, call)
        wants_rows = sizes.row_control_variate and head.requires_grad()
        with torch.no_grad():
            shared, tail, log_weights = call.once("lists", lambda: self._lists(proposal))
            candidates, centers, softmax = self._candidates(proposal, shared, tail, log_weights)
            if wants_rows and (softmax is not None or len(tail)):
                softmax = softmax or _at_centers(proposal, centers, candidates)
                candidates = replace(candidates, expected=expected_rows(candidates, softmax))
        return Chosen(candidates, proposal)

    def sizes(self, head: Head, positions: Positions, call: Call, num_classes: int) -> SCESizes:
        """How long this call's lists are."""
        state = self.state
        # A rank's rows may all be masked.
        rows, num_labels = max(head.num_classes, 1), state.num_labels
        if torch.is_tensor(num_labels):
            num_labels = num_labels.double()
        sizes = self.config.resolve(
            len(positions),
            num_classes,
            call.prefer_control_variate,
            num_labels,
            rows,
            head.weight.shape[1],
        )
        before = call.once("calls before", lambda: state.step - call.counted)
        if before < self.config.labels_first:
            return sizes.labels_alone()
        if self.config.target_relative_error is not None and state.tail_candidates:
            return replace(sizes, tail_candidates=state.tail_candidates)
        return sizes

    def _lists(self, proposal: TailProposal) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The shared list, and the tail with its log-weights. A replay gets those of its first
        run."""
        config, sizes = self.config, proposal.sizes
        head, call = proposal.head, proposal.call
        is_static = call.is_valid is not None
        labels, listed = call.labels, [call.labels[:0]]
        if sizes.shared_frequent:
            frequent = self.state.most_frequent(
                call.counts, labels, sizes.shared_frequent, head.masked
            )
            listed.append(frequent)
        if config.shared_labels:
            listed.append(labels)
        shared = listed[0]
        if len(listed) > 1:
            is_there = None
            if config.shared_labels and call.is_valid is not None:
                num_frequent = sum(map(len, listed)) - len(labels)
                is_there = pad(call.is_valid, (num_frequent, 0), value=True)
            found = distinct(torch.cat(listed), head.vocab_size, is_there)
            shared = found.ids
            if found.is_spare is not None and is_static:
                last = torch.argsort(found.is_spare, stable=True)
                shared = shared.masked_fill(found.is_spare, -1)[last]
            elif found.is_spare is not None:  # on a device, for what takes no empty places
                shared = shared[~found.is_spare]
        if head.masked is not None:
            shared = shared[~torch.isin(shared, head.masked)]
        is_whole = len(shared) == head.num_classes and not is_static
        if not sizes.tail_candidates or is_whole:
            none = torch.zeros(0, dtype=torch.float64, device=labels.device)
            return shared, shared[:0], none
        noise = call.stream("tail")
        is_large = head.vocab_size > LARGE_CATALOGUE and not is_static
        if is_large and config.prior in ("labels", "uniform"):
            tail, log_weights = self.state.weight_classes(call.counts).sample(
                sizes.tail_candidates,
                call.counts,
                _with_masked(shared, head),
                noise,
                power=config.prior_power,
                uniform_floor=1.0 if config.prior == "uniform" else float(sizes.uniform_floor),
            )
            return shared, tail, log_weights
        density = proposal.log_density().index_fill_(0, _ids(shared, call), -torch.inf)
        tail, log_weights = priority_sample(
            density, sizes.tail_candidates, noise, backend=call.backend
        )
        return shared, tail, log_weights

    def _candidates(
        self, proposal: TailProposal, shared, tail, log_weights
    ) -> tuple[Candidates, torch.Tensor | None, CenterSoftmax | None]:
        """All lists; the buckets' centres ``[n_b, d]``, and the softmax there if it was needed."""
        config, sizes = self.config, proposal.sizes
        head, call, hidden = proposal.head, proposal.call, proposal.positions.hidden
        centers = items = bucket_of = bucket_weights = softmax = None
        is_sampled = sizes.bucket_sampling == "priority"
        rest = head.num_classes - len(shared)  # at least: places may be empty
        if is_sampled and call.is_valid is not None:
            rest = head.num_classes  # without a tail there must be buckets; slots may be empty
        own = min(sizes.bucket_candidates, rest)
        rest = rest if call.is_valid is None else head.num_classes
        self.covered = head.num_classes if max(own, sizes.tail_candidates) >= rest else 0
        if own > 0:
            centers, bucket_of = kmeans_buckets(
                hidden.to(compute_dtype(hidden)),
                sizes.num_buckets,
                call.stream("buckets"),
                proposal.positions.is_valid,
            )
            if is_sampled:
                prior = proposal.log_density().index_fill_(0, _ids(shared, call), -torch.inf)
                softmax = self.bucket_softmax(centers, bucket_of, head)
                noise = call.stream("tail")
                items, bucket_weights = bucket_samples(softmax.share, prior, own, noise)
            else:
                excluded = _with_masked(_ids(shared, call), head)
                items = catalogue_topk(centers, head, own, excluded=excluded, backend=call.backend)
        has_control = sizes.control_variate and len(tail) > 0
        candidates = Candidates(
            shared,
            tail,
            log_weights,
            items,
            bucket_of,
            bucket_log_weights=bucket_weights,
            row_sum=self.state.row_sum.of(head) if has_control else None,
            control_variate=sizes.control_variate,
            sparse_grad=config.sparse_grad,
        )
        return candidates, centers, softmax

    def bucket_softmax(
        self, centers: torch.Tensor, bucket_of: torch.Tensor, head: Head
    ) -> CenterSoftmax:
        """What each bucket's own sample is drawn by, for centres ``[n_b, d]``."""
        return center_softmax(centers, bucket_of, head, control_variate=False)

    def observe(
        self,
        head: Head,
        positions: Positions,
        call: Call,
        chosen: Chosen,
        log_partition: torch.Tensor,
    ) -> Statistics:
        """Statistics of a call; the state follows if it counted.

        Args:
            log_partition: ``[N]`` log Zhat.
        """
        candidates = chosen.candidates
        self.drawn = ("tail_candidates", len(candidates.tail))
        if candidates.bucket_items is not None and candidates.bucket_log_weights is not None:
            self.drawn = ("bucket_candidates", candidates.bucket_items.shape[1])
        error = monitor.relative_error(
            self.config, self.state, head, positions, call, candidates, log_partition
        )
        lists = [candidates.shared, candidates.tail]
        if candidates.bucket_items is not None:
            lists.append(candidates.bucket_items)
        return self.statistics(
            positions,
            call,
            self._products(chosen, len(positions), head.vocab_size),
            ids=lists,
            candidates=float(sum(ids.shape[-1] for ids in lists)),
            relative_error=error,
        )

    def _products(self, chosen: Chosen, num_positions: int, vocab_size: int) -> float:
        """Inner products a position: the lists, the catalogue scans and the k-means steps."""
        candidates, proposal = chosen
        products = proposal.products() + len(candidates.shared) + len(candidates.tail)
        if candidates.bucket_items is not None:
            buckets, own = candidates.bucket_items.shape
            fitted = min(1.0, KMEANS_POSITIONS_PER_BUCKET * buckets / num_positions)
            scan = buckets * vocab_size / num_positions
            products += own + scan + buckets * (KMEANS_STEPS * fitted + 1)
        has_scanned = candidates.bucket_log_weights is not None
        if candidates.bucket_items is None:
            has_scanned = "gradient" in self.config.prior_shares()
        if candidates.expected is not None and not has_scanned:
            products += len(candidates.expected.centers) * vocab_size / num_positions
        return products

    def sizes_chosen(self) -> dict[str, Choice]:
        return {} if self.latest is None else chosen_sizes(self.config, *self.latest)

    def advice(self) -> str | None:
        return monitor.advice(self.config, self.state, *self.drawn, self.covered)


def _at_centers(
    proposal: TailProposal, centers: torch.Tensor | None, candidates: Candidates
) -> CenterSoftmax:
    """The softmax at k-means centres; at those of the buckets, where there are any."""
    if centers is None or candidates.bucket_of is None:
        return proposal.at_centers()
    return center_softmax(
        centers,
        candidates.bucket_of,
        proposal.head,
        control_variate=candidates.control_variate,
    )


def _ids(shared: torch.Tensor, call: Call) -> torch.Tensor:
    """``[S]`` ids of a shared list, where some repeat if places are empty."""
    if len(shared) and call.is_valid is not None:
        return shared.cummax(dim=0).values.clamp_min_(0)
    return shared


def _with_masked(ids: torch.Tensor, head: Head) -> torch.Tensor:
    """These classes and the masked ones, which are not among them."""
    return ids if head.masked is None else torch.cat([ids, head.masked])
