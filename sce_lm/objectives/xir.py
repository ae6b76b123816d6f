"""BIR and XIR: in-batch importance resampling, and its cache (Chen et al., NeurIPS 2022, arXiv
2205.14859).

**BIR.** The labels of the batch are a pool of classes drawn from the popularity. Each position
draws R negatives from it, with replacement, in proportion to ``exp(s_tj) / pop_j``, which turns the
pool into a sample of the softmax, and trains on the raw scores:

    w_tj = softmax over the pool (s_tj + log n_j - log pop_j)        n_j times in the batch
    k_t  ~ Multinomial(R, w_t)
    loss_t = log(exp s_ty + sum_j k_tj exp s_tj) - s_ty

**XIR.** Half of the draws come from a cache of classes instead, drawn in proportion to how often
each class has been drawn before: ``loss = lambda · loss(cache) + (1 - lambda) · loss(batch)``.

The published loss has no normalised partition function: a class drawn in proportion to its softmax
probability p enters the sum with ``exp s`` once more, so negatives weigh as p². With
``correction="importance"`` there is one pool of batch and cache, each class in it weighed by how
often it was expected there, and the draws by how likely they were:

    f_j = (n_j + m_j) / ((N - 1) q_j + C o_j)        q label frequencies, o the cache's distribution
    w_tj = softmax over the pool, y left out (s_tj + log f_j)
    Zhat_t = exp s_ty + sum_j k_tj / (R w_tj) · f_j exp s_tj

whose expectation over labels drawn from q, cache and draws is Z; the draws decide only which
classes get a gradient. They are systematic then (:mod:`sce_lm.candidates.resampling`), which is as
unbiased.

Where the paper and its code differ, the default is the paper, or the code where the paper is
silent:

* the paper draws the next cache from all classes by occurrence; the code among the classes that the
  latest batch has drawn (``cache_from="drawn"``);
* lambda is 0.5 in the code and 0.2 in its script for Gowalla;
* the code can flatten the popularity, ``log(1 + n)`` or ``n^0.75``;
* the code draws as many negatives as the batch has rows, half of them from the cache, keeps a cache
  of that size, and lets a draw hit the position's own label. "auto" is that number, up to 2,048,
  the code's batch for its largest data.

Popularity is the number of labels seen so far, this batch included; a class never seen, which only
a cache can hold, counts as seen once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from sce_lm.candidates.cache import Cache, draw_cache, merge_occurrences, record_draws
from sce_lm.candidates.distinct import distinct
from sce_lm.candidates.resampling import multinomial_counts, systematic_counts
from sce_lm.config import SoftmaxConfig, check_choice, check_count, check_share
from sce_lm.objectives.base import Statistics
from sce_lm.objectives.call import Call
from sce_lm.objectives.sampled_objective import SampledObjective
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import Head
from sce_lm.ops.position_cross_entropy import PositionCandidates, position_cross_entropy
from sce_lm.ops.positions import Positions
from sce_lm.ops.static_shapes import needs_static_shapes

AUTO_SIZE = 2048
"""Most draws, and largest cache, that "auto" gives."""
BLOCK_ELEMENTS = 2**21
"""Draws or pool logits of a block of positions."""


@dataclass(frozen=True)
class BIRConfig(SoftmaxConfig):
    """Configuration of BIR. Raises ValueError for a value out of range."""

    num_negatives: int | Literal["auto"] = "auto"
    """R, draws of a position; "auto": the number of positions, up to 2,048."""

    correction: Literal["none", "importance"] = "none"
    """"none": the published loss on raw scores. "importance": an unbiased partition function."""

    resampling: Literal["auto", "independent", "systematic"] = "auto"
    """How negatives are drawn: independently, as published, or by one uniform number a position,
    with less variance and in less time; "auto": independently for correction "none" alone."""

    popularity: Literal["counts", "log", "power"] = "counts"
    """n, log(1 + n) or n^0.75 of the labels seen so far; correction "none" only."""

    sparse_grad: bool = False
    """Return a row-sparse gradient of the weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "num_negatives", auto=True)
        check_choice(self, "correction", "none", "importance")
        check_choice(self, "resampling", "auto", "independent", "systematic")
        check_choice(self, "popularity", "counts", "log", "power")
        check_choice(self, "sparse_grad", True, False)
        if self.correction == "importance" and self.popularity != "counts":
            raise ValueError(
                f'{type(self).__name__}: popularity="{self.popularity}" flattens what '
                'correction="importance" weighs by; leave it out.'
            )


@dataclass(frozen=True)
class XIRConfig(BIRConfig):
    """Configuration of XIR. Raises ValueError for a value out of range."""

    cache_size: int | Literal["auto"] = "auto"
    """C, draws that make the cache; "auto": the number of positions, up to 2,048."""

    cache_weight: float = 0.5
    """lambda, the cache's share of the loss, in [0, 1]; correction "none" only."""

    cache_from: Literal["all", "drawn"] = "all"
    """Classes that a cache may hold: all, or those that the latest call has drawn (the code)."""

    decay: float = 1.0
    """Factor on past occurrences at each call, in [0, 1]; 1 forgets nothing, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "cache_size", auto=True)
        check_share(self, "cache_weight")
        check_choice(self, "cache_from", "all", "drawn")
        check_share(self, "decay")
        if self.num_negatives == 1:
            raise ValueError(
                "XIRConfig.num_negatives is 1, and half of the draws come from the cache; give 2 "
                "or more."
            )
        if self.correction == "importance" and self.cache_weight != 0.5:
            raise ValueError(
                f"XIRConfig: cache_weight={self.cache_weight} has no meaning with "
                'correction="importance", where batch and cache are one pool; leave it out.'
            )


class _Pool(NamedTuple):
    """Classes to draw from."""

    ids: torch.Tensor
    """``[U]`` distinct."""
    log_factor: torch.Tensor
    """``[U]`` fp64: ``w_tj`` is in proportion to ``exp(s_tj + log_factor_j)``."""


class BIR(SampledObjective):
    """In-batch importance resampling by a :class:`BIRConfig`."""

    name = "bir"
    config_class = BIRConfig
    config: BIRConfig

    def has_static_shapes(self, head: Head) -> bool:
        return True

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        seen = call.counts
        found = distinct(positions.labels, len(seen), positions.is_valid)
        ids, n = found.ids, found.occurrences
        if self.config.correction == "importance":
            factor = n / (_others(positions) * _frequency(seen, ids))
        else:
            factor = n / _popularity(seen, ids, self.config.popularity)
        draws = _size(self.config.num_negatives, len(positions))
        pool = _Pool(ids, found.once(factor.log()))
        loss, drawn = self._loss(head, positions, pool, draws, call, "batch")
        return loss, self.statistics(
            positions,
            call,
            2.0 * len(ids),
            ids=[ids.masked_fill(drawn == 0, -1)],
            candidates=float(len(ids)),
        )

    def _loss(
        self, head: Head, positions: Positions, pool: _Pool, draws: int, call: Call, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss over ``draws`` draws from a pool by the call's stream ``name``, and how often
        each of its classes was drawn, over all positions, ``[U]``."""
        corrected = self.config.correction == "importance"
        generator = call.stream(name)
        kind = self.config.resampling
        systematic = corrected if kind == "auto" else kind == "systematic"
        count = systematic_counts if systematic else multinomial_counts
        log_weights, drawn = _resample(
            head, positions, pool, draws, generator, corrected=corrected, count=count
        )
        candidates = PositionCandidates(
            pool.ids[None],
            log_weights,
            keep_label=not corrected,
            sparse_grad=self.config.sparse_grad,
        )
        loss = position_cross_entropy(head, positions, candidates, backend=call.backend).loss
        return loss, drawn


class XIR(BIR):
    """Cache-augmented in-batch importance resampling by an :class:`XIRConfig`."""

    name = "xir"
    config_class = XIRConfig
    config: XIRConfig

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        config, state = self.config, self.state
        cache = call.once(
            "cache",
            lambda: draw_cache(
                state,
                _size(config.cache_size, len(positions)),
                positions.labels,
                call.stream("cache"),
                head.vocab_size,
                among_drawn=config.cache_from == "drawn",
                is_asked=positions.is_valid,
                left_out=head.masked,
            ),
        )
        combine = self._one_pool if config.correction == "importance" else self._two_pools
        loss, drawn_from, drawn = combine(head, positions, call, cache)
        if call.counted:
            record_draws(state, drawn_from, drawn, head.vocab_size, config.decay)
        return loss, self.statistics(
            positions,
            call,
            2.0 * len(drawn_from),
            ids=[drawn_from.masked_fill(drawn == 0, -1)],
            candidates=float(len(drawn_from)),
            distinct_cached=(cache.counts > 0).sum(),
        )

    def _two_pools(self, head: Head, positions: Positions, call: Call, cache: Cache):
        """As published: the loss, the classes of both pools and how often each was drawn."""
        draws = _size(self.config.num_negatives, len(positions)) // 2
        losses, pools, drawn = [], [], []
        for name, m in (("batch", cache.asked), ("cached", cache.counts)):
            pool = cache.ids
            if not needs_static_shapes(pool.device):  # else those that are not there weigh 0
                pool, m = pool[m > 0], m[m > 0]
            pools.append(pool)
            factor = m / _popularity(call.counts, pool, self.config.popularity)
            drawable = _Pool(pool, factor.log())
            loss, times = self._loss(head, positions, drawable, draws, call, name)
            losses.append(loss)
            drawn.append(times)
        share = self.config.cache_weight
        return share * losses[1] + (1.0 - share) * losses[0], torch.cat(pools), torch.cat(drawn)

    def _one_pool(self, head: Head, positions: Positions, call: Call, cache: Cache):
        """Corrected: the same, for the pool of all classes in batch and cache."""
        expected = _others(positions) * _frequency(call.counts, cache.ids)
        expected += cache.counts.sum() * cache.q
        draws = _size(self.config.num_negatives, len(positions))
        pool = _Pool(cache.ids, ((cache.counts + cache.asked) / expected).log())
        loss, drawn = self._loss(head, positions, pool, draws, call, "batch")
        return loss, cache.ids, drawn

    def end_step(self, device: torch.device) -> None:
        """Once an optimiser step, on every process: one cache for all of them."""
        merge_occurrences(self.state, device)


def _size(size: int | Literal["auto"], num_positions: int) -> int:
    return max(2, min(num_positions, AUTO_SIZE)) if size == "auto" else size


def _others(positions: Positions) -> int | torch.Tensor:
    """Labels beside a position's own, at least 1."""
    others = positions.num_valid - 1
    return others.clamp_min(1) if torch.is_tensor(others) else max(others, 1)


def _frequency(seen: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Share of these classes among all labels seen so far, fp64."""
    return seen[ids].to(torch.float64) / seen.sum()


def _popularity(seen: torch.Tensor, ids: torch.Tensor, kind: str) -> torch.Tensor:
    """What the published weights divide by, fp64; a class that was never seen counts as seen
    once."""
    n = seen[ids].clamp_min(1).to(torch.float64)
    return {"counts": n, "log": torch.log1p(n), "power": n**0.75}[kind]


@torch.no_grad()
def _resample(
    head: Head,
    positions: Positions,
    pool: _Pool,
    draws: int,
    generator: torch.Generator,
    *,
    corrected: bool,
    count: Callable[[torch.Tensor, int, torch.Generator], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-weights ``[N, U]`` of a pool's classes in each position's sum, -inf where it was not
    drawn, and how often each class was drawn in all, ``[U]`` fp64.

    As published that is log k. Corrected, with ``Zpool = sum_j f_j exp s_j`` over the pool without
    the label, ``w_j = f_j exp(s_j) / Zpool`` and so ``c_j = log k_j - log R + log Zpool - s_j``.
    """
    dtype = compute_dtype(positions.hidden, head.weight)
    rows = head.rows(pool.ids, dtype)
    hidden = head.extend(positions.hidden, dtype)
    log_factor = pool.log_factor.to(dtype)
    log_weights = rows.new_empty(len(positions), len(pool.ids))
    drawn = torch.zeros_like(pool.log_factor)
    step = max(1, BLOCK_ELEMENTS // max(draws, len(pool.ids)))
    for start in range(0, len(log_weights), step):
        block = slice(start, start + step)
        s = head.post(hidden[block] @ rows.T)
        log_w = s + log_factor
        if corrected:
            log_w.masked_fill_(pool.ids == positions.labels[block, None], -torch.inf)
        k = count(log_w, draws, generator)
        if positions.is_valid is not None:
            k *= positions.is_valid[block, None]
        drawn += k.sum(dim=0)
        log_weights[block] = k.log()
        if corrected:
            log_weights[block] += torch.logsumexp(log_w, dim=1, keepdim=True) - s - math.log(draws)
            log_weights[block].masked_fill_(k == 0, -torch.inf)  # whose logit may be -inf
    return log_weights, drawn
