"""Scalable Cross-Entropy: as published, and corrected.

Published (arXiv 2409.18721, algorithm 1): random directions B pick ``b_x`` positions and ``b_y``
classes each by inner product; the softmax runs inside the bucket, and a position in several
buckets takes its largest loss. Positions in no bucket are not trained, and the partition function
is a lower bound.

Corrected: three disjoint strata for each position, whose sums add up to an unbiased Zhat.

* shared: the batch's labels and the most frequent classes, with certainty;
* bucket: the top classes at the centre of the position's k-means bucket, with certainty;
* tail: a priority sample (Duffield, Lund, Thorup 2007) of everything else, one for all positions;
  of large catalogues a Poisson sample with the same inclusion probabilities. What it is drawn from
  is :mod:`sce_lm.objectives.tail_proposal`.

With ``bucket_sampling="priority"`` the last two are one: each bucket has a priority sample of its
own, by the softmax at its centre, of everything outside the shared list.

The tail's control variate is Jensen's tangent. With m the mean raw logit over the rest R, known
from the mean of W's rows, ``sum_{j in R} (x_j - m) = 0``, so

    sum_{j in R} exp s_j  =  exp(g(m)) · (|R| + sum_{j in R} phi_j)
    phi = exp(g(x) - g(m)) - 1 - g'(m)(x - m)

and only phi is sampled. It is exactly unbiased for every g, and for strata of R with a tangent each
(``tail_strata``: octaves of the label count). Unbiased means Zhat and its gradient;
``log Zhat`` carries a bias of about half its relative variance, which the statistics report.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import NamedTuple

import torch

from sce_lm.candidates.buckets import (
    KMEANS_POSITIONS_PER_BUCKET,
    KMEANS_STEPS,
    kmeans_buckets,
    random_centers,
)
from sce_lm.candidates.cache import merge_occurrences
from sce_lm.candidates.center_softmax import CenterSoftmax, center_softmax
from sce_lm.candidates.noise import draw_seed, stream
from sce_lm.candidates.priority import priority_sample
from sce_lm.config import SCEConfig, SCESizes
from sce_lm.objectives.base import HeadInputs, Statistics
from sce_lm.objectives.row_control import with_expected_rows
from sce_lm.objectives.sampled import SampledObjective
from sce_lm.objectives.tail_proposal import TailProposal, record_softmax
from sce_lm.ops.candidate_cross_entropy import (
    Candidates,
    candidate_cross_entropy,
    candidate_variance,
)
from sce_lm.ops.catalogue_scan import catalogue_topk
from sce_lm.ops.exact_cross_entropy import compute_dtype

LARGE_CATALOGUE = 2**18
"""Classes above which a tail by labels, or uniform, is a Poisson sample, drawn in time that does
not depend on V."""
BUCKET_PRIOR_SHARE = 0.5
"""Share of the tail's proposal in that of a bucket's own sample, for positions far from its
centre."""
SCORES = 2**23
"""Scores of centres held at a time (32 MiB in fp32)."""
MONITOR_EVERY = 8
"""Calls between two measurements of the tail's variance."""
MONITOR_POSITIONS = 256
"""Positions that each of them looks at, spread evenly over the batch."""
MIN_TAIL = 64
"""Least size of a tail that a target sets."""
MAX_TAIL_SHARE = 0.25
"""Its largest share of the catalogue; beyond it the exact loss is the better choice."""


HIGH_ERROR, GOOD_ERROR = 0.3, 0.1
"""Relative error above which more candidates are advised, and the one they are to bring."""


class Chosen(NamedTuple):
    """What one call of corrected SCE sums over."""

    candidates: Candidates
    sizes: SCESizes
    counted: bool
    """Whether the state counts the call."""
    expected: CenterSoftmax | None = None
    """For the row control variate, if it is wanted."""


class SCE(SampledObjective):
    """Scalable Cross-Entropy by an :class:`SCEConfig`, with its state."""

    name = "sce"
    config_class = SCEConfig
    config: SCEConfig
    tail = 0
    """Size of the latest tail."""
    covered = 0
    """Classes of the latest call if its lists held them all, else 0."""

    def compute(self, inputs: HeadInputs) -> tuple[torch.Tensor, Statistics]:
        seed = draw_seed(inputs.generator)
        if self.config.assignment == "topk":
            return self._published(inputs, seed)
        return self._corrected(inputs, seed)

    # -- corrected ---------------------------------------------------------------------------

    def _corrected(self, inputs: HeadInputs, seed: int) -> tuple[torch.Tensor, Statistics]:
        chosen = self.choose(inputs, seed, inputs.num_classes)
        result = candidate_cross_entropy(*inputs.head, chosen.candidates, **inputs.options)
        loss = result.loss
        if chosen.expected is not None:
            loss = with_expected_rows(loss, inputs, chosen.candidates, chosen.expected)
        return loss, self.observe(inputs, chosen, result.log_partition)

    def choose(self, inputs: HeadInputs, seed: int, vocab_size: int) -> Chosen:
        """Candidates of one call.

        Args:
            inputs: ``weight`` holds all rows of the head, or those of one rank; ``labels`` are the
                labels among them, in any number.
            seed: of this call.
            vocab_size: V, classes of the whole head.
        """
        counts, prefer, counted = self.state.begin_call(inputs.labels, len(inputs.weight), seed)
        # A rank's rows may all be masked.
        rows = max(inputs.num_classes, 1)
        sizes = self.config.resolve(
            len(inputs.hidden), vocab_size, prefer, self.state.num_labels, rows
        )
        before = self.state.once(seed, "calls before", lambda: self.state.step - counted)
        if before < self.config.labels_first:
            sizes = sizes.labels_alone()
        elif self.config.target_relative_error is not None and self.state.tail_candidates:
            sizes = replace(sizes, tail_candidates=self.state.tail_candidates)
        trains_head = torch.is_grad_enabled() and any(
            part is not None and part.requires_grad for part in inputs.columns
        )
        with torch.no_grad():
            candidates, expected = self._choose(
                inputs, sizes, counts, seed, counted=counted, trains_head=trains_head
            )
        return Chosen(candidates, sizes, counted, expected)

    def observe(
        self, inputs: HeadInputs, chosen: Chosen, log_partition: torch.Tensor
    ) -> Statistics:
        """Statistics of a call; the state follows if it counted.

        Args:
            log_partition: ``[N]`` log Zhat.
        """
        candidates, sizes, counted, expected = chosen
        num_positions, self.tail = len(inputs.hidden), len(candidates.tail)
        if counted and "cache" in self.config.prior_shares():
            record_softmax(self.state, inputs, candidates, log_partition)
        products = self._products(candidates, expected, num_positions, len(inputs.weight))
        products += TailProposal(self.config, self.state, inputs, sizes).products()
        relative_error = self._relative_error(inputs, candidates, log_partition, counted)
        lists = [candidates.shared, candidates.tail]
        if candidates.bucket_items is not None:
            lists.append(candidates.bucket_items)
        return self.statistics(
            inputs,
            products,
            counted=counted,
            ids=lists,
            candidates=float(sum(ids.shape[-1] for ids in lists)),
            relative_error=relative_error,
        )

    def _products(
        self,
        candidates: Candidates,
        expected: CenterSoftmax | None,
        num_positions: int,
        vocab_size: int,
    ) -> float:
        """Inner products a position: the lists, the catalogue scans and the k-means steps."""
        products = float(len(candidates.shared) + len(candidates.tail))
        if candidates.bucket_items is not None:
            buckets, own = candidates.bucket_items.shape
            fitted = min(1.0, KMEANS_POSITIONS_PER_BUCKET * buckets / num_positions)
            scan = buckets * vocab_size / num_positions
            products += own + scan + buckets * (KMEANS_STEPS * fitted + 1)
        has_scanned = candidates.bucket_items is None and "gradient" in self.config.prior_shares()
        if expected is not None and not has_scanned:
            products += len(expected.centers) * vocab_size / num_positions
        return products

    @torch.no_grad()
    def _relative_error(
        self, inputs: HeadInputs, candidates: Candidates, log_partition: torch.Tensor, counted: bool
    ) -> torch.Tensor | None:
        """The tail's relative error ``[N]`` if it was asked for; now and then the state's averages
        of the variance with and without control variate are brought up to date."""
        monitors = counted and (self.state.step - 1) % MONITOR_EVERY == 0
        wanted = inputs.want_statistics
        if not len(candidates.tail) or not (monitors or wanted):
            return None
        positions = None
        if not wanted:
            count = min(len(inputs.labels), MONITOR_POSITIONS)
            device = inputs.labels.device
            positions = torch.linspace(0, len(inputs.labels) - 1, count, device=device).long()
        plain, control = candidate_variance(
            inputs.hidden,
            inputs.weight,
            inputs.labels,
            candidates,
            log_partition,
            bias=inputs.bias,
            low_rank=inputs.low_rank,
            post=inputs.post,
            positions=positions,
        )
        own = control if candidates.control_variate else plain
        if monitors:
            self.state.average(
                variance_plain=float(plain.mean()),
                variance_control=float(control.mean()),
                relative_error_p95=float(own.quantile(0.95).sqrt()),
            )
            if self.config.target_relative_error is not None:
                self._set_tail(len(candidates.tail), float(own.mean()), inputs.num_classes)
        return own.sqrt() if wanted else None

    def _set_tail(self, size: int, variance: float, vocab_size: int) -> None:
        """The next tail's size: the variance falls as 1 / size, and half of the way there, in
        logarithms, keeps one noisy measurement from swinging it."""
        target = self.config.target_relative_error
        assert target is not None
        largest = max(MIN_TAIL, int(MAX_TAIL_SHARE * vocab_size))
        wanted = size * min(max(variance**0.5 / target, 0.5), 2.0)
        if wanted > largest and self.state.tail_candidates < largest:
            warnings.warn(
                f"target_relative_error={target} needs a tail of more than {largest} candidates; "
                f"it is capped there (relative error {variance**0.5:.3f} at {size}). Raise the "
                "target or the shared and bucket lists, or use the exact loss.",
                stacklevel=2,
            )
        self.state.tail_candidates = min(max(round(wanted), MIN_TAIL), largest)

    def _choose(
        self,
        inputs: HeadInputs,
        sizes: SCESizes,
        counts: torch.Tensor,
        seed: int,
        *,
        counted: bool,
        trains_head: bool,
    ) -> tuple[Candidates, CenterSoftmax | None]:
        """The three strata of one call, and what the row control variate needs; a replay gets the
        lists of its first run."""
        config = self.config
        proposal = TailProposal(config, self.state, inputs, sizes)
        shared, tail, log_weights = self.state.once(
            seed, "lists", lambda: self._draw(proposal, counts, seed, counted)
        )
        centers = items = bucket_of = bucket_weights = None
        rest = inputs.num_classes - len(shared)
        own = min(sizes.bucket_candidates, rest)
        self.covered = inputs.num_classes if max(own, sizes.tail_candidates) >= rest else 0
        if own > 0:
            centers, bucket_of = kmeans_buckets(
                inputs.hidden.to(compute_dtype(inputs.hidden)),
                sizes.num_buckets,
                stream(seed, "buckets", inputs.labels.device),
                balanced=config.assignment == "balanced",
            )
            if config.bucket_sampling == "priority":
                prior = proposal.log_density(counts, seed, counted=counted)
                prior[shared] = -torch.inf
                noise = stream(seed, "tail", inputs.labels.device)
                items, bucket_weights = bucket_samples(inputs, centers, prior, own, noise)
            else:
                items = catalogue_topk(
                    centers,
                    inputs.weight,
                    own,
                    bias=inputs.bias,
                    low_rank=inputs.low_rank,
                    excluded=_with_masked(shared, inputs),
                    backend=inputs.backend,
                )
        has_control = sizes.control_variate and len(tail) > 0
        has_strata = has_control and config.tail_strata > 1
        candidates = Candidates(
            shared,
            tail,
            log_weights,
            items,
            bucket_of,
            bucket_log_weights=bucket_weights,
            row_sum=(
                self.state.row_sum.of(inputs.columns, inputs.masked)
                if has_control and not has_strata
                else None
            ),
            left_out=inputs.masked,
            control_variate=sizes.control_variate,
            stratum_of=count_strata(counts, config.tail_strata) if has_strata else None,
            num_strata=config.tail_strata if has_strata else 1,
            sparse_grad=config.sparse_grad,
        )
        if not (config.row_control_variate and trains_head and len(tail)):
            return candidates, None
        if centers is None or bucket_of is None:
            return candidates, proposal.at_centers(seed)
        at_buckets = center_softmax(
            centers,
            bucket_of,
            inputs.columns,
            inputs.post,
            control_variate=sizes.control_variate,
            left_out=inputs.masked,
        )
        return candidates, at_buckets

    def _draw(
        self, proposal: TailProposal, counts: torch.Tensor, seed: int, counted: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The shared list, and the tail with its log-weights."""
        config, inputs, sizes = self.config, proposal.inputs, proposal.sizes
        labels, masked = inputs.labels, inputs.masked
        listed = [labels[:0]]
        if sizes.shared_frequent:
            size = sizes.shared_frequent
            listed.append(self.state.most_frequent(counts, labels, size, masked))
        if config.shared_labels:
            listed.append(labels)
        shared = torch.unique(torch.cat(listed)) if len(listed) > 1 else listed[0]
        if masked is not None:
            shared = shared[~torch.isin(shared, masked)]
        noise = stream(seed, "tail", labels.device)
        if not sizes.tail_candidates or len(shared) == inputs.num_classes:
            none = torch.zeros(0, dtype=torch.float64, device=labels.device)
            return shared, shared[:0], none
        if len(inputs.weight) > LARGE_CATALOGUE and config.prior in ("labels", "uniform"):
            tail, log_weights = self.state.weight_classes(counts).sample(
                sizes.tail_candidates,
                counts,
                _with_masked(shared, inputs),
                noise,
                power=config.prior_power,
                uniform_floor=1.0 if config.prior == "uniform" else sizes.uniform_floor,
            )
            return shared, tail, log_weights
        density = proposal.log_density(counts, seed, counted=counted)
        density.index_fill_(0, shared, -torch.inf)
        tail, log_weights = priority_sample(
            density, sizes.tail_candidates, noise, backend=inputs.backend
        )
        return shared, tail, log_weights

    def end_step(self, device: torch.device) -> None:
        """Once an optimiser step, on every process: one cache for all of them."""
        if "cache" in self.config.prior_shares():
            merge_occurrences(self.state, device)

    def advice(self) -> str | None:
        if self.covered:
            return (
                f"the lists of SCE hold all {self.covered} classes, so that its loss is the exact "
                'one at a higher cost; use objective "exact", or smaller shared_frequent, '
                "tail_candidates and bucket_candidates."
            )
        error = self.state.summary().get("relative_error", 0.0)
        if error <= HIGH_ERROR or self.config.target_relative_error is not None or not self.tail:
            return None
        wanted = self.tail * (error / GOOD_ERROR) ** 2
        return (
            f"the partition function's relative error is {error:.2f}, so the loss is biased by "
            f"about {error**2 / 2:.2f} nats: there are too few candidates. tail_candidates="
            f"{math.ceil(wanted / 1024) * 1024} instead of {self.tail} would bring it to about "
            f"{GOOD_ERROR}, and so would target_relative_error={GOOD_ERROR}; more buckets or "
            "shared candidates help as well."
        )

    # -- published ---------------------------------------------------------------------------

    def _published(self, inputs: HeadInputs, seed: int) -> tuple[torch.Tensor, Statistics]:
        num_positions, vocab_size = len(inputs.labels), len(inputs.weight)
        counted = self.state.begin_call(inputs.labels, vocab_size, seed)[2]
        sizes = self.config.resolve(num_positions, inputs.num_classes)
        device = inputs.labels.device
        with torch.no_grad():
            hidden = inputs.hidden.to(compute_dtype(inputs.hidden))
            centers = random_centers(
                hidden,
                sizes.num_buckets,
                stream(seed, "centers", device),
                mix=self.config.centers == "mix",
            )
            scores = centers @ hidden.T
            position = torch.topk(scores, sizes.bucket_positions, sorted=False).indices.reshape(-1)
            items = catalogue_topk(
                centers,
                inputs.weight,
                sizes.bucket_candidates,
                bias=inputs.bias,
                low_rank=inputs.low_rank,
                excluded=inputs.masked,
                backend=inputs.backend,
            )
            bucket = torch.arange(len(items), device=device)
            bucket = bucket.repeat_interleave(sizes.bucket_positions)
            visits = torch.zeros_like(inputs.labels)
            visits.index_add_(0, position, torch.ones_like(position))
            covered = visits > 0
            if self.config.reduce == "max":
                # The losses of all (bucket, position) pairs first; only the largest of each
                # position is then computed again with its gradient.
                pair_loss = self._pairs(inputs, position, bucket, items, share=None)
                best = torch.full_like(pair_loss[:1], -torch.inf).repeat(num_positions)
                best.scatter_reduce_(0, position, pair_loss, "amax")
                is_best = pair_loss == best[position]
                none, every = len(position), torch.arange(len(position), device=device)
                pair = torch.full_like(visits, none)
                pair.scatter_reduce_(0, position, every.masked_fill(~is_best, none), "amin")
                pair = pair[covered]
                position, bucket = position[pair], bucket[pair]
                visits, num_covered = covered.long(), len(pair)
            else:
                num_covered = int(covered.sum())

        # mean over covered positions = sum over them / N · (N / covered)
        dtype = compute_dtype(inputs.hidden, inputs.weight)
        share = (num_positions / num_covered) / visits[position].to(dtype)
        if inputs.position_weight is not None:
            loss = self._pairs(inputs, position, bucket, items, inputs.position_weight * share)
        else:
            pair_loss = self._pairs(inputs, position, bucket, items, None)
            loss = pair_loss.new_zeros(num_positions)
            loss = loss.index_add(0, position, pair_loss / visits[position].to(dtype))
        coverage = num_covered / num_positions
        pairs = sizes.num_buckets * sizes.bucket_positions
        met = sizes.bucket_candidates * pairs / num_positions
        chosen = sizes.num_buckets * (
            1 + (self.config.centers == "mix") + vocab_size / num_positions
        )
        products = chosen + met
        if counted:
            self.state.average(
                coverage=coverage, candidates_per_position=met, products_per_position=products
            )
        return loss, Statistics(
            num_valid=num_positions,
            coverage=coverage,
            products_per_position=products,
            covered=covered,
            candidates=torch.unique(items) if inputs.want_statistics else None,
        )

    def _pairs(self, inputs: HeadInputs, position, bucket, items, share) -> torch.Tensor:
        """Candidate cross-entropy of (bucket, position) pairs."""
        none = position.new_empty(0)
        candidates = Candidates(
            none,
            none,
            torch.zeros(0, dtype=torch.float64, device=position.device),
            items,
            bucket,
            sparse_grad=self.config.sparse_grad,
        )
        pairs = replace(
            inputs,
            hidden=inputs.hidden[position],
            labels=inputs.labels[position],
            position_weight=share,
        )
        return candidate_cross_entropy(*pairs.head, candidates, **pairs.options).loss


def _with_masked(ids: torch.Tensor, inputs: HeadInputs) -> torch.Tensor:
    """These classes and the masked ones, which are not among them."""
    return ids if inputs.masked is None else torch.cat([ids, inputs.masked])


def bucket_samples(
    inputs: HeadInputs,
    centers: torch.Tensor,
    log_prior: torch.Tensor,
    size: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A priority sample of the catalogue for each bucket.

        q_kj = (1 - share) · softmax_j(g(c_k·w_j + b_j)) + share · prior_j

    Args:
        centers: ``[n_b, d]``.
        log_prior: ``[V]`` fp64; -inf leaves a class out.
        size: K, at most the number of classes that are not left out.

    Returns:
        Ids ascending in each row and their log-weights, each ``[n_b, K]``.
    """
    columns, dtype = inputs.columns, centers.dtype
    rows = columns.rows(slice(None), dtype)
    left_out = log_prior == -torch.inf
    prior = log_prior + math.log(BUCKET_PRIOR_SHARE)
    ids, log_weights = [], []
    for part in columns.extend(centers, dtype).split(max(1, SCORES // len(rows))):
        scores = inputs.post((part @ rows.T).double())
        scores = torch.log_softmax(scores, dim=1) + math.log1p(-BUCKET_PRIOR_SHARE)
        for own in torch.logaddexp(scores, prior).masked_fill_(left_out, -torch.inf):
            drawn, c = priority_sample(own, size, generator, tile=len(own), backend="torch")
            order = torch.argsort(drawn)
            ids.append(drawn[order])
            log_weights.append(c[order])
    return torch.stack(ids), torch.stack(log_weights)


def count_strata(counts: torch.Tensor, num_strata: int) -> torch.Tensor:
    """``[V]`` int64: octaves of the label count, ``num_strata`` groups of them."""
    octave = (counts + 1).double().log2().floor().long()
    return octave * num_strata // (octave.amax() + 1)
