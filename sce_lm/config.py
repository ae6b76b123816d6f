"""`SCEConfig`: every choice of the SCE losses in one place, checked once, resolved once.

What "auto" chooses from N positions, V classes and the head's width d (:meth:`SCEConfig.resolve`):

================================  =======  ==================  =======  ========  =====
problem                           buckets  lists of each       rows     frequent  tail
================================  =======  ==================  =======  ========  =====
d >= 256 (language models)        N/64     samples of V/32,    control  1,024     none
                                  16 to    but 4,096 at least
                                  64
d < 256, V >= 65,536, N large     64       32·N/64 largest,             1,024     2,048
                                           1,024 to 4,096
the same, scan over 4,096·N/V     fewer    the same                     1,024     2,048
d < 256, buckets fewer than 8     none                                  2,048     4,096
d < 256, V < 65,536               none                                  2,048     4,096
================================  =======  ==================  =======  ========  =====

* Pretrained language models are peaked: most of the mass lies on few, context-dependent tokens.
  A sample for each bucket, by the softmax at its centre, finds them, and what it misses it knows
  the weight of. Its scan costs ``num_buckets / N`` of a pass of the exact loss.
* "rows control" is ``row_control_variate``, where the head is trained with a dense gradient.
* Narrow heads are those of recommenders, flat enough that a tail gains as much. Noise and scores of
  the scan would cost more there than its products, and without buckets no part of a call grows
  with V.
* A Llama trained from scratch for 150 steps on the demo's text (V=32,768, d=256, 2,040 positions a
  step, one seed), frequent + tail: held-out NLL and accuracy. Exact loss 6.398 and .128; 1,024 +
  2,048: 6.443, .130; 4,096 + 2,048: 6.414, .131; 1,024 + 5,120: 6.409, .129; 2,048 + 4,096: 6.382,
  .133; 4,096 + 4,096: 6.390, .131; 1,024 + 8,192: 6.387, .130.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from sce_lm.ops.dispatch import Backend
from sce_lm.ops.positions import LossTerms

Auto = Literal["auto"]

WIDE = 256
"""Width of a head from which on "auto" takes it for a language model's."""
SCAN_PRODUCTS = 4096
"""Inner products a position that the catalogue scan of a narrow head may cost under "auto"."""
CANDIDATES_PER_POSITION = 32
"""Candidates of a bucket for each of its positions: gathering their rows costs that much."""
MIN_FLOOR = 0.03
"""Least share of the proposal that "auto" spreads evenly."""
MIN_BUCKETS = 8
"""Buckets below which "auto" makes none."""
PRIORS = ("labels", "uniform", "gradient")
"""Components of the tail's proposal (:mod:`sce_lm.objectives.tail_proposal`)."""


def check_choice(config: Any, name: str, *allowed: Any) -> None:
    """Raise one sentence unless the field is one of ``allowed``."""
    value = getattr(config, name)
    if not any(value is choice or value == choice for choice in allowed):
        raise ValueError(
            f"{type(config).__name__}.{name} is {value!r}; choose one of "
            + ", ".join(map(repr, allowed))
            + "."
        )


def check_count(config: Any, name: str, *, low: int = 1, auto: bool = False) -> None:
    """Raise one sentence unless the field is an integer from ``low`` up (or "auto")."""
    value = getattr(config, name)
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not is_count and not (auto and value == "auto"):
        raise ValueError(
            f"{type(config).__name__}.{name} is {value!r}; give an integer from {low} up"
            + (', or "auto".' if auto else ".")
        )


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float; a bool and text are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_share(config: Any, name: str, *, zero: bool = True) -> None:
    """Raise one sentence unless the field lies in [0, 1], or in (0, 1] without ``zero``."""
    value = getattr(config, name)
    if not (is_number(value) and 0 <= value <= 1 and (zero or value > 0)):
        interval = "[0, 1]" if zero else "(0, 1]"
        raise ValueError(f"{type(config).__name__}.{name} is {value!r}; give one in {interval}.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What every objective's configuration has. Raises ValueError for a value out of range."""

    backend: Backend = "auto"
    """Implementation of the numeric core. "torch": PyTorch. "triton": Triton kernels, or an error
    that says why they cannot run. "auto": the kernels on a GPU wherever they can run, and PyTorch
    elsewhere."""

    def __post_init__(self) -> None:
        check_choice(self, "backend", *get_args(Backend))

    def terms(self) -> LossTerms:
        """What the loss has beside ``log Z - s_y``."""
        return LossTerms()


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(ObjectiveConfig):
    """What the configuration of a softmax's loss has, be its sum over all classes or over some."""

    z_loss: float = 0.0
    """Coefficient of ``(log Z)²``, which is added to each position's loss and keeps logits from
    drifting; Z is the objective's own sum (Zhat where it is estimated). 1e-4 is usual."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.z_loss) and self.z_loss >= 0):
            raise ValueError(
                f"{type(self).__name__}.z_loss is {self.z_loss!r}; give a number from 0 up."
            )

    def terms(self) -> LossTerms:
        return LossTerms(self.z_loss)


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(SoftmaxConfig):
    """What the configuration of a loss has whose Z is, on average, that of the whole vocabulary."""

    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over the vocabulary, in [0, 1], as in
    ``torch.nn.functional.cross_entropy``. Exact, also where Z is estimated, and nearly free; with a
    soft cap only objective "exact" has it. It reaches every row, so not with ``sparse_grad``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "label_smoothing")
        if self.label_smoothing and getattr(self, "sparse_grad", False):
            raise ValueError(
                f"{type(self).__name__}: label_smoothing={self.label_smoothing} has a gradient for "
                "every row of the head, and sparse_grad=True leaves most of them out; change one "
                "of the two."
            )

    def terms(self) -> LossTerms:
        return LossTerms(self.z_loss, self.label_smoothing)


@dataclass(frozen=True)
class SCEConfig(LikelihoodConfig):
    """Configuration of SCE (default); :meth:`published` gives the published form's.

    Raises ValueError for a value out of range and for combinations that mean nothing.
    """

    num_buckets: int | Auto = "auto"
    """Buckets of positions, each with candidates of its own; 0 skips the catalogue scan."""

    bucket_candidates: int | Auto = "auto"
    """Candidates of each bucket: the classes with the largest logits at its centre."""

    bucket_sampling: Literal["auto", "top", "priority"] = "auto"
    """"priority": instead of the largest, a priority sample of everything outside the shared list
    by the softmax at the bucket's centre, mixed with ``prior``. Such a sample is the bucket's own
    tail, so there is no other and no control variate. "auto": "priority" for wide heads, unless
    ``tail_candidates``, ``control_variate`` or ``target_relative_error`` ask for one tail, or
    ``sparse_grad`` for a call that does not grow with V."""

    shared_labels: bool = True
    """Keep the labels of the batch as candidates of every position, with certainty."""

    shared_frequent: int | Auto = "auto"
    """Number of most frequent labels so far that are candidates of every position."""

    tail_candidates: int | Auto = "auto"
    """Size of the priority sample from everything else, one for all positions; 0 drops it."""

    target_relative_error: float | None = None
    """Hold the relative error of the partition function (root mean square over positions, as in the
    logs) at this value by the size of the tail: ``tail_candidates`` is where it starts, and every
    few calls it moves by what was measured since, up to a quarter of the catalogue, with a warning
    there. The loss is biased by about half the square of it. None: the tail keeps its size."""

    prior: str | Mapping[str, float] = "labels"
    """Proposal of the tail: "labels" (frequencies seen so far), "uniform", or "gradient" (norms of
    the rows' gradients at k-means centres, a read of W once a call, at 16·V/N products a position);
    or a mapping of several to their shares. Any choice is unbiased."""

    prior_power: float = 0.75
    """Power on the frequencies of component "labels", in [0, 1]."""

    uniform_floor: float | Auto = "auto"
    """Share of the proposal spread evenly over the catalogue, in (0, 1]; bounds the weights.
    "auto": V / (V + labels seen) times the share of "labels" in the prior, at least 0.03, as if
    every class had been seen once before: few labels say little of rare classes. Against 0.3
    throughout it brought a language model's gradient of the weight, after a million labels, from
    cosine .9936 to .9956 of the exact one."""

    control_variate: bool | Auto = "auto"
    """Take the tail's part that is known in closed form out of the sample (Jensen control
    variate). "auto" chooses by a running average of the variance with and without it."""

    row_control_variate: bool | Auto = "auto"
    """Give every row of the head the gradient that the batch's k-means centres expect of it, and
    let the draws correct it: what this adds has mean 0. Without it Adam moves rows that are
    seldom drawn less far than exact gradients do (:mod:`sce_lm.objectives.row_control`). The
    centres are those of the buckets, or 16. "auto": where buckets are sampled, which scans W
    anyway, and the gradient is dense."""

    labels_first: int = 0
    """In the first so many calls (batches) the batch's labels alone are candidates, uncorrected: an
    in-batch softmax. Models from scratch learn to rank sooner by it, and the calls after it make a
    likelihood of what it taught; a quarter of the training was a good start. 0 for a pretrained
    model."""

    sparse_grad: bool = False
    """Return a row-sparse gradient of the weight: candidate and label rows. With the control
    variate the gradient through the catalogue's mean is then left out, an approximation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "bucket_sampling", "auto", "top", "priority")
        for name in ("control_variate", "row_control_variate"):
            check_choice(self, name, True, False, "auto")
        for name in ("shared_labels", "sparse_grad"):
            check_choice(self, name, True, False)
        for name in ("num_buckets", "shared_frequent", "tail_candidates"):
            check_count(self, name, low=0, auto=True)
        check_count(self, "labels_first", low=0)
        check_count(self, "bucket_candidates", auto=True)
        self._check_prior()
        check_share(self, "prior_power")
        if self.target_relative_error is not None:
            check_share(self, "target_relative_error", zero=False)
        floor = self.uniform_floor
        if floor != "auto" and not (is_number(floor) and 0.0 < floor <= 1.0):
            raise ValueError(
                f"SCEConfig.uniform_floor is {self.uniform_floor!r}; give one in (0, 1], or "
                '"auto": without a floor the weights of rare classes have no bound.'
            )
        self._refuse_meaningless()

    def _check_prior(self) -> None:
        shares = self.prior if isinstance(self.prior, Mapping) else {str(self.prior): 1.0}
        for name, share in shares.items():
            if name not in PRIORS:
                raise ValueError(
                    f"SCEConfig.prior has {name!r}; choose from "
                    + ", ".join(map(repr, PRIORS))
                    + ", or give several a share each."
                )
            if not (is_number(share) and share > 0):
                raise ValueError(
                    f"SCEConfig.prior gives {name!r} the share {share!r}; give a positive number, "
                    "or leave it out."
                )
        if not shares:
            raise ValueError('SCEConfig.prior is empty; give a component, for instance "labels".')

    def _samples_buckets(self, width: int) -> bool:
        """Whether a bucket, if there is one, has a sample of its own in place of a common tail."""
        if self.bucket_sampling != "auto":
            return self.bucket_sampling == "priority"
        asks_for_a_tail = self.tail_candidates != "auto" or self.control_variate is True
        asks_for_a_tail |= self.target_relative_error is not None or self.sparse_grad
        return width >= WIDE and not asks_for_a_tail

    def prior_shares(self) -> dict[str, float]:
        """Components of the tail's proposal and their shares, which sum to 1."""
        if isinstance(self.prior, str):
            return {self.prior: 1.0}
        total = sum(self.prior.values())
        return {name: share / total for name, share in self.prior.items()}

    def _refuse_meaningless(self) -> None:
        def refuse(name: str, why: str) -> None:
            raise ValueError(f"SCEConfig: {name}={getattr(self, name)!r} {why}.")

        if self.labels_first and not self.shared_labels:
            refuse(
                "labels_first",
                "begins with the batch's labels as candidates, and shared_labels=False leaves them "
                "out; change one of the two",
            )
        if self.bucket_sampling == "priority":
            wrong = {
                "num_buckets": self.num_buckets == 0,
                "tail_candidates": self.tail_candidates not in (0, "auto"),
                "control_variate": self.control_variate is True,
            }
            for name in (name for name, is_wrong in wrong.items() if is_wrong):
                refuse(
                    name,
                    'does not go with bucket_sampling="priority", where each bucket has a weighted '
                    "sample of everything that is not shared; leave it out, or use "
                    'bucket_sampling="top"',
                )
        is_sampled = self.bucket_sampling == "priority"
        has_tail = self.tail_candidates != 0 and not is_sampled
        if self.label_smoothing and not (has_tail or is_sampled):
            refuse(
                "label_smoothing",
                "spreads over the whole vocabulary, of which the partition function without a "
                "tail holds a part; give tail_candidates, or leave label_smoothing out",
            )
        if self.label_smoothing and self.labels_first:
            refuse(
                "label_smoothing",
                "spreads over the whole vocabulary, of which the first calls (labels_first="
                f"{self.labels_first}) see the batch's labels; leave one of the two out",
            )
        if self.target_relative_error is not None and not has_tail:
            refuse(
                "target_relative_error",
                "sets the size of a sampled tail; give one, or leave target_relative_error out",
            )
        is_drawn = has_tail or is_sampled
        if self.row_control_variate is True and (not is_drawn or self.sparse_grad):
            refuse(
                "row_control_variate",
                "corrects a dense gradient by what was drawn; it goes with a tail or sampled "
                "buckets and with sparse_grad=False, or leave it out",
            )
        if self.num_buckets == 0 and self.bucket_candidates != "auto":
            refuse(
                "bucket_candidates",
                "with num_buckets=0 is never used; give num_buckets, or leave bucket_candidates "
                "out",
            )
        if self.tail_candidates == 0 and self.control_variate is True:
            refuse(
                "control_variate",
                "needs a tail; give tail_candidates, or control_variate=False",
            )
        if (self.num_buckets, self.tail_candidates, self.shared_frequent) == (0, 0, 0) and (
            not self.shared_labels
        ):
            raise ValueError(
                "SCEConfig: no candidates are left; give buckets, a shared list or a tail."
            )

    @classmethod
    def published(cls, **options: Any) -> PublishedSCEConfig:
        """The configuration of SCE as published; ``options`` are its fields."""
        return PublishedSCEConfig(**options)

    def resolve(
        self,
        num_positions: int,
        vocab_size: int,
        prefer_control_variate: bool = True,
        num_labels: int | torch.Tensor = 0,
        rows: int | None = None,
        width: int = WIDE,
    ) -> SCESizes:
        """A number for every "auto", and no list longer than there are positions or classes.

        Args:
            num_positions: N, positions with a label in this call.
            vocab_size: V.
            prefer_control_variate: what past draws say for ``control_variate="auto"``.
            num_labels: labels seen so far, for ``uniform_floor="auto"``; may be a 0-dim tensor,
                and the floor is one then.
            rows: those of the V that this rank holds, if the head is cut by rows: each list is cut
                in proportion, and ``num_labels`` are the labels among them. None: all of them.
            width: d, the head's width.
        """
        n, v = num_positions, vocab_size
        rows = v if rows is None else rows

        def here(size: int) -> int:
            return -(-min(size, v) * rows // v)

        is_sampled = self._samples_buckets(width)
        if is_sampled:
            auto_buckets = max(1, min(64, max(n // 64, min(16, n // 16))))
        else:
            auto_buckets = min(64, n // 32, SCAN_PRODUCTS * n // v)
            auto_buckets = auto_buckets if v >= 2**16 and auto_buckets >= MIN_BUCKETS else 0
        num_buckets = min(_pick(self.num_buckets, auto_buckets), n)
        bucket_positions = -(-n // num_buckets) if num_buckets else 0
        is_sampled = is_sampled and num_buckets > 0
        auto_candidates = max(4096, v // 32)
        if not is_sampled:
            auto_candidates = max(1024, min(CANDIDATES_PER_POSITION * bucket_positions, 4096))
        # The same number of candidates again where there are no buckets.
        auto_frequent, auto_tail = (1024, 2048) if num_buckets else (2048, 4096)
        tail = here(_pick(self.tail_candidates, 0 if is_sampled else auto_tail))
        of_rows = self.row_control_variate
        if of_rows == "auto":
            of_rows = is_sampled and not self.sparse_grad
        control = prefer_control_variate if self.control_variate == "auto" else self.control_variate
        floor = self.uniform_floor
        if floor == "auto":
            floor = self.prior_shares().get("labels", 0.0) * rows / (rows + num_labels)
            is_there = isinstance(floor, torch.Tensor)
            floor = floor.clamp_min(MIN_FLOOR) if is_there else max(MIN_FLOOR, floor)
        return SCESizes(
            num_buckets=num_buckets,
            bucket_positions=bucket_positions,
            bucket_candidates=(
                here(_pick(self.bucket_candidates, auto_candidates)) if num_buckets else 0
            ),
            shared_frequent=here(_pick(self.shared_frequent, auto_frequent)),
            tail_candidates=tail,
            bucket_sampling="priority" if is_sampled else "top",
            control_variate=control and tail > 0,
            row_control_variate=of_rows,
            uniform_floor=floor,
        )

    def __str__(self) -> str:
        return _table(self)


@dataclass(frozen=True)
class SCESizes:
    """What :meth:`SCEConfig.resolve` decided for one problem: no "auto" is left."""

    num_buckets: int
    """Buckets of positions; 0: no scan of the catalogue."""
    bucket_positions: int
    """Positions that a bucket holds on average."""
    bucket_candidates: int
    """Candidates of each bucket."""
    shared_frequent: int
    """Most frequent labels kept as candidates of every position."""
    tail_candidates: int
    """Size of the priority sample."""
    bucket_sampling: Literal["top", "priority"]
    """Whether a bucket's candidates are the largest, or a sample."""
    control_variate: bool
    """Whether the tail uses the control variate."""
    row_control_variate: bool
    """Whether a dense gradient of the head has every row, where the head is trained."""
    uniform_floor: float | torch.Tensor
    """Share of the tail's proposal that is spread evenly."""

    def labels_alone(self) -> SCESizes:
        """Without any candidates but the batch's labels."""
        return dataclasses.replace(
            self,
            num_buckets=0,
            bucket_candidates=0,
            shared_frequent=0,
            tail_candidates=0,
            control_variate=False,
            row_control_variate=False,
        )

    def __str__(self) -> str:
        return _table(self)


@dataclass(frozen=True)
class PublishedSCEConfig(SoftmaxConfig):
    """Configuration of SCE as in arXiv 2409.18721. Raises ValueError for a value out of range.

    "auto" is the paper's: n_b = alpha·sqrt(N / beta) buckets of b_x = alpha·sqrt(N·beta) positions.
    """

    alpha: float = 2.0
    """Size of buckets and number of them, in square roots of the number of positions."""

    beta: float = 1.0
    """Positions of a bucket over the number of buckets."""

    bucket_candidates: int = 256
    """b_y, classes of each bucket."""

    num_buckets: int | Auto = "auto"
    """n_b."""

    bucket_positions: int | Auto = "auto"
    """b_x."""

    mix: bool = True
    """Centres are random mixtures of the batch's hidden states; False: Gaussian directions."""

    reduce: Literal["max", "mean"] = "max"
    """The loss of a position in several buckets: the largest (published), or the mean."""

    sparse_grad: bool = False
    """Return a row-sparse gradient of the weight: candidate and label rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_buckets", "bucket_positions"):
            check_count(self, name, auto=True)
        check_count(self, "bucket_candidates")
        check_choice(self, "reduce", "max", "mean")
        for name in ("mix", "sparse_grad"):
            check_choice(self, name, True, False)
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value) and value > 0):
                raise ValueError(f"PublishedSCEConfig.{name} is {value!r}; give a positive number.")

    def resolve(self, num_positions: int, vocab_size: int) -> PublishedSCESizes:
        """A number for every "auto", and no list longer than there are positions or classes."""
        n = num_positions
        auto_buckets = max(1, round(self.alpha * math.sqrt(n / self.beta)))
        auto_positions = max(1, round(self.alpha * math.sqrt(n * self.beta)))
        return PublishedSCESizes(
            _pick(self.num_buckets, auto_buckets),
            min(_pick(self.bucket_positions, auto_positions), n),
            min(self.bucket_candidates, vocab_size),
        )

    def __str__(self) -> str:
        return _table(self)


@dataclass(frozen=True)
class PublishedSCESizes:
    """What :meth:`PublishedSCEConfig.resolve` decided for one problem."""

    num_buckets: int
    """n_b."""
    bucket_positions: int
    """b_x."""
    bucket_candidates: int
    """b_y."""

    def __str__(self) -> str:
        return _table(self)


def _pick(value: int | Auto, auto: int) -> int:
    return auto if value == "auto" else value


def _table(config: Any) -> str:
    """Field and value, one line each."""
    fields = dataclasses.asdict(config)
    width = max(map(len, fields))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in fields.items())
