"""Is the sample of SCE (default) large enough? What it says of itself, and what follows from that.

Every so many calls the variance of what was drawn is estimated on some positions, of a tail with
and without control variate. The averages choose the control variate, feed the logs and the advice,
and with ``target_relative_error`` set the size of the next tail.
"""

from __future__ import annotations

import math
import warnings

import torch

from sce_lm.candidates.state import SCEState
from sce_lm.config import SCEConfig
from sce_lm.objectives.call import Call
from sce_lm.ops.candidate_variance import bucket_variance, candidate_variance
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions

MONITOR_EVERY = 8
"""Calls between two measurements of the variance."""
MONITOR_POSITIONS = 256
"""Positions that each of them looks at, spread evenly over the batch."""
MIN_TAIL = 64
"""Least size of a tail that a target sets."""
MAX_TAIL_SHARE = 0.25
"""Its largest share of the catalogue; beyond it the exact loss is the better choice."""
HIGH_ERROR, GOOD_ERROR = 0.3, 0.1
"""Relative error above which more candidates are advised, and the one they are to bring."""


@torch.no_grad()
def relative_error(
    config: SCEConfig,
    state: SCEState,
    head: Head,
    positions: Positions,
    call: Call,
    candidates: Candidates,
    log_partition: torch.Tensor,
) -> torch.Tensor | None:
    """Relative error ``[N]`` of what was drawn if statistics were asked for; now and then the
    state's averages are brought up to date."""
    monitors = call.counted and (state.step - 1) % MONITOR_EVERY == 0
    is_drawn = len(candidates.tail) > 0 or candidates.bucket_log_weights is not None
    if not is_drawn or not (monitors or call.want_statistics):
        return None
    if call.want_statistics:
        chosen = torch.arange(len(positions), device=log_partition.device)
    else:
        chosen = _spread(positions, min(len(positions), MONITOR_POSITIONS))
    if candidates.bucket_log_weights is not None:
        plain = control = bucket_variance(head, positions, candidates, log_partition, chosen)
    else:
        plain, control = candidate_variance(head, positions, candidates, log_partition, chosen)
    own = control if candidates.control_variate else plain
    if monitors:
        state.average(
            variance_plain=plain.mean(),
            variance_control=control.mean(),
            relative_error_p95=own.quantile(0.95).sqrt(),
        )
        if config.target_relative_error is not None:
            target, size = config.target_relative_error, len(candidates.tail)
            set_tail(state, target, size, float(own.mean()), head.num_classes)
    return own.sqrt() if call.want_statistics else None


def _spread(positions: Positions, count: int) -> torch.Tensor:
    """``[count]`` int64: positions with a label, spread evenly over them."""
    device = positions.labels.device
    if positions.is_valid is None:
        return torch.linspace(0, len(positions) - 1, count, device=device).long()
    first = torch.argsort(positions.is_valid, descending=True, stable=True)
    last = (positions.is_valid.sum() - 1).clamp_min(0)
    return first[torch.arange(count, device=device) * last // max(count - 1, 1)]


def set_tail(state: SCEState, target: float, size: int, variance: float, vocab_size: int) -> None:
    """The next tail's size: the variance falls as 1 / size, and half of the way there, in
    logarithms, keeps one noisy measurement from swinging it."""
    largest = max(MIN_TAIL, int(MAX_TAIL_SHARE * vocab_size))
    wanted = size * min(max(variance**0.5 / target, 0.5), 2.0)
    if wanted > largest and state.tail_candidates < largest:
        warnings.warn(
            f"target_relative_error={target} needs a tail of more than {largest} candidates; "
            f"it is capped there (relative error {variance**0.5:.3f} at {size}). Raise the "
            "target or the shared and bucket lists, or use the exact loss.",
            stacklevel=2,
        )
    state.tail_candidates = min(max(round(wanted), MIN_TAIL), largest)


def advice(config: SCEConfig, state: SCEState, option: str, size: int, covered: int) -> str | None:
    """One sentence on what should be changed, or None.

    Args:
        option, size: what sets the size of the samples, and the latest size.
        covered: classes of the latest call if its lists held them all, else 0.
    """
    if covered:
        return (
            f"the lists of SCE hold all {covered} classes, so that it is exact cross-entropy at a "
            'higher cost; choose "exact" instead, or smaller shared_frequent, tail_candidates and '
            "bucket_candidates."
        )
    error = state.summary().get("relative_error", 0.0)
    if error <= HIGH_ERROR or config.target_relative_error is not None or not size:
        return None
    wanted = size * (error / GOOD_ERROR) ** 2
    return (
        f"the partition function's relative error is {error:.2f}, so the loss is biased by "
        f"about {error**2 / 2:.2f} nats: there are too few candidates. {option}="
        f"{math.ceil(wanted / 1024) * 1024} instead of {size} would bring it to about "
        f"{GOOD_ERROR}; more buckets or shared candidates help as well."
    )
