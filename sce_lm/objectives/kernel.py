"""Adaptive sampled softmax with kernel-based sampling (Blanc & Rendle, ICML 2018, arXiv
1712.00527).

    q_tj in proportion to alpha·x_tj² + 1        x the raw logit times the model's scale
    Zhat_t = exp s_ty + sum over m draws, j != y, of exp(s_tj) / (m q_tj)

Every position draws for itself, from a distribution that follows its logits as the parameters
change, so that few draws do. Zhat is unbiased: the label's logit is not corrected, and a draw that
hits the label is left out.

The square is blind to the sign: a class with a very negative logit is drawn as often as one with a
very positive one. The paper therefore also trains an absolute softmax, over ``|s|``, which is not
here: predictions would have to take absolute values too. The square also sees a common shift of the
logits, which a softmax does not, and trained models have one: their mean logit lies well below 0,
so that the published kernel spends its draws on the least likely classes. ``center=True`` takes it
of the logits less their mean over the catalogue, a position at a time, and costs nothing. On the
next-item model of the demo the variance of a draw's weight is then a hundredth of the published
one, and that of a uniform draw fifty times as large; the paper's form stays the default.

The paper's ``alpha`` is 100. The same kernel also gives one proposal for all positions of a call,
the mean of theirs, which needs no blocks (``shared=True``).

Wide models: the kernel is taken on ``projection`` directions in which the logits are nearest to the
full ones. q then follows the logits less closely, and its log is exact all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sce_lm.candidates.kernel_sampler import KernelSampler, fit_projection, mean_kernel_proposal
from sce_lm.candidates.proposals import draw_with_replacement
from sce_lm.config import LikelihoodConfig, check_choice, check_count
from sce_lm.objectives.base import Statistics
from sce_lm.objectives.call import Call
from sce_lm.objectives.sampled_objective import SampledObjective
from sce_lm.ops.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.dtypes import compute_dtype
from sce_lm.ops.head import EVERYTHING, Head
from sce_lm.ops.position_cross_entropy import PositionCandidates, position_cross_entropy
from sce_lm.ops.positions import Positions
from sce_lm.ops.static_shapes import needs_static_shapes

AUTO_WIDTH, AUTO_PROJECTION = 128, 64
"""Models wider than the first are projected to the second by "auto"."""
TILE_ELEMENTS = 2**22
"""Elements of the weight that are projected at a time."""
PROJECTION_ROWS = 32
"""Rows for each dimension from which a projection is fitted."""
PROJECTION_REFRESH = 100
"""Calls after which it is fitted again."""
AUTO_POWERS = range(-4, 9)
"""alpha="auto" chooses among the powers of the root of 10."""
AUTO_POSITIONS, AUTO_ROWS = 64, 1024
"""Positions and rows, evenly spread, that it looks at."""


@dataclass(frozen=True)
class KernelConfig(LikelihoodConfig):
    """Configuration of kernel-based sampling. Raises ValueError for a value out of range."""

    num_negatives: int = 64
    """m, draws of a position, or of a call if they are shared; with replacement."""

    alpha: float | Literal["auto"] = 100.0
    """Weight of the logit's power against the 1. "auto": what gives Zhat the smallest variance on a
    sample of positions and classes, at each call."""

    kernel: Literal["quadratic", "quartic"] = "quadratic"
    """alpha·x² + 1, or alpha·x⁴ + 1, which is nearer to a softmax and costs a scan."""

    center: bool = False
    """Take the kernel of a position's logits less their mean over the catalogue; the paper takes it
    of the logits themselves. Recommended for anything but a model from scratch."""

    shared: bool = False
    """One sample for all positions of a call, from the mean of their distributions."""

    block_size: int | Literal["auto"] = "auto"
    """Rows of a block; "auto": from the cost model."""

    projection: int | Literal["auto"] | None = "auto"
    """Width that the kernel is taken at; None: that of the model. "auto": 64 for models wider than
    128, else None. A narrower kernel costs less and follows the logits less closely."""

    sparse_grad: bool = False
    """Return a row-sparse gradient of the weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "num_negatives")
        check_choice(self, "kernel", "quadratic", "quartic")
        for name in ("center", "shared", "sparse_grad"):
            check_choice(self, name, True, False)
        check_count(self, "block_size", auto=True)
        if self.projection is not None:
            check_count(self, "projection", auto=True)
        is_number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha != "auto" and not (is_number and 0 < self.alpha < float("inf")):
            raise ValueError(
                f'KernelConfig.alpha is {self.alpha!r}; give a positive number, or "auto".'
            )
        if self.shared:
            wrong = {"kernel": self.kernel == "quartic", "block_size": self.block_size != "auto"}
            for name in (name for name, is_wrong in wrong.items() if is_wrong):
                raise ValueError(
                    f"KernelConfig: {name}={getattr(self, name)!r} needs draws for each position; "
                    "use shared=False, or leave it out."
                )


class Kernel(SampledObjective):
    """Kernel-based sampled softmax by a :class:`KernelConfig`."""

    name = "kernel"
    config_class = KernelConfig
    config: KernelConfig

    def has_static_shapes(self, head: Head) -> bool:
        return True

    def compute(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, Statistics]:
        config, m = self.config, self.config.num_negatives
        num_positions, width = positions.hidden.shape
        queries, rows, shift, alpha = self._kernel(head, positions, call)
        if config.shared:
            proposal = mean_kernel_proposal(rows, queries, alpha, shift, positions.is_valid)
            places, c = draw_with_replacement(proposal, m, call.stream("negatives"))
            ids = head.named(places)
            candidates = Candidates(ids[:0], ids, c, sparse_grad=config.sparse_grad)
            loss = candidate_cross_entropy(head, positions, candidates, backend=call.backend).loss
            rank = rows.shape[1]
            projection = width * rank if rank < width else 0
            products = m + len(rows) * (2.0 * rank**2 + projection) / (width * num_positions)
        else:
            sampler = KernelSampler(
                rows,
                m,
                alpha,
                power=4 if config.kernel == "quartic" else 2,
                block_size=None if config.block_size == "auto" else config.block_size,
            )
            places, log_q = sampler.draw(queries, m, call.stream("negatives"), shift)
            ids = head.named(places)
            own = PositionCandidates(ids, -log_q - math.log(m), sparse_grad=config.sparse_grad)
            loss = position_cross_entropy(head, positions, own, backend=call.backend).loss
            operations = sampler.operations(num_positions, m)
            if rows.shape[1] < width:  # their projection
                operations += len(rows) * width * rows.shape[1] / num_positions
            products = m + operations / width
        return loss, self.statistics(
            positions, call, products, ids=[ids], candidates=float(ids.shape[-1])
        )

    def _rank(self, width: int) -> int:
        """Width that the kernel is taken at."""
        rank = self.config.projection
        if rank == "auto":
            rank = AUTO_PROJECTION if width > AUTO_WIDTH else None
        return width if rank is None else min(rank, width)

    @torch.no_grad()
    def _kernel(self, head: Head, positions: Positions, call: Call):
        """Queries, rows, shift of each query and alpha of this call's kernel."""
        queries, rows = self._features(head, positions, call)
        shift = queries @ rows.mean(dim=0) if self.config.center else None
        return queries, rows, shift, self._alpha(head, positions, queries, rows, shift)

    def _features(
        self, head: Head, positions: Positions, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N, r]`` queries and the rows, ``[V, r]`` without those that are masked, whose inner
        products the kernel is taken of."""
        dtype = compute_dtype(positions.hidden, head.weight)
        queries = _extended_hidden(head, positions, EVERYTHING, dtype)
        wide = queries.shape[1]
        width = self._rank(wide)
        if width == wide:
            return queries, head.rows(head.kept, dtype)
        of_hidden, of_rows = call.once(
            "projection", lambda: self._projection(head, queries, width, call.counted)
        )
        rows = queries.new_empty(head.num_classes, width)
        kept, tile = head.kept, max(1, TILE_ELEMENTS // wide)
        for start in range(0, len(rows), tile):
            part = slice(start, start + tile)
            some = part if isinstance(kept, slice) else kept[part]
            torch.mm(head.rows(some, dtype), of_rows, out=rows[part])
        return queries @ of_hidden, rows

    def _projection(self, head: Head, queries: torch.Tensor, width: int, counted: bool):
        """The maps of hidden states and rows; kept in the state, fitted again now and then."""
        memory = self.state.memory
        is_due = counted and (self.state.step - 1) % PROJECTION_REFRESH == 0
        shape = (queries.shape[1], width)
        if is_due or "of_hidden" not in memory or memory["of_hidden"].shape != shape:
            some = _spread(head.num_classes, PROJECTION_ROWS * queries.shape[1], queries.device)
            rows = head.rows(head.named(some), queries.dtype)
            fitted = fit_projection(queries, rows, width)
            if counted:
                memory["of_hidden"], memory["of_rows"] = fitted
            return fitted
        return tuple(memory[name].to(queries) for name in ("of_hidden", "of_rows"))

    def _alpha(
        self, head: Head, positions: Positions, queries, rows, shift
    ) -> float | torch.Tensor:
        """The configured alpha, or the candidate with the least
        ``sum_j exp(2 s_j) / k_j · sum_j k_j / (sum_j exp s_j)²``, ``k = alpha·x^p + 1``, the
        relative second moment of a draw, on average over some positions."""
        if self.config.alpha != "auto":
            return self.config.alpha
        some = _spread(len(queries), AUTO_POSITIONS, queries.device)
        classes = _spread(len(rows), AUTO_ROWS, queries.device)
        exact = _extended_hidden(head, positions, some, queries.dtype)
        x = exact @ head.rows(head.named(classes), queries.dtype).T
        p = torch.softmax(head.post(x / head.post.scale), dim=1)
        kernel = queries[some] @ rows[classes].T
        if shift is not None:
            kernel -= shift[some, None]
        power = kernel ** (4 if self.config.kernel == "quartic" else 2)
        moments = [
            (p.square() / k).sum(dim=1).mul(k.sum(dim=1)).mean()
            for k in (10.0 ** (n / 2) * power + 1.0 for n in AUTO_POWERS)
        ]
        best = torch.stack(moments).argmin()
        if needs_static_shapes(best.device):
            return 10.0 ** ((best + AUTO_POWERS.start).to(power.dtype) / 2)
        return 10.0 ** ((int(best) + AUTO_POWERS.start) / 2)


def _extended_hidden(head: Head, positions: Positions, at, dtype: torch.dtype) -> torch.Tensor:
    """Hidden states with a 1 that meets the bias, times the model's scale."""
    hidden = head.extend(positions.hidden[at], dtype)
    return hidden if head.post.scale == 1.0 else hidden * head.post.scale


def _spread(total: int, size: int, device: torch.device) -> torch.Tensor:
    """At most ``size`` indices, evenly spread over ``total``."""
    return torch.arange(0, total, max(1, -(-total // size)), device=device)
