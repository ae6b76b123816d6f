"""What corrected SCE chose for its latest call, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from sce_lm.config import WIDE, SCEConfig, SCESizes


class Choice(NamedTuple):
    """One size, and where it comes from."""

    value: Any
    why: str


def chosen_sizes(
    config: SCEConfig, sizes: SCESizes, num_positions: int, width: int
) -> dict[str, Choice]:
    """Each of the sizes of a call of N positions on a head of width d with its reason."""
    is_first = sizes == sizes.labels_alone() and config.labels_first > 0
    why = _reasons(config, sizes, num_positions, width)
    if is_first:
        why = dict.fromkeys(why, "the first calls have the batch's labels alone")
    found = {}
    for name, value in dataclasses.asdict(sizes).items():
        if torch.is_tensor(value):
            value = value.item()
        is_given = getattr(config, name, "auto") != "auto" and not is_first
        if name == "tail_candidates" and config.target_relative_error is not None:
            is_given = False
        found[name] = Choice(value, "as configured" if is_given else why[name])
    return found


def table(choices: Mapping[str, Choice]) -> str:
    """A line for each."""
    shown = [(name, _shown(choice.value), choice.why) for name, choice in choices.items()]
    names, values, _ = (max(map(len, column)) for column in zip(*shown))
    return "\n".join(f"  {name:<{names}}  {value:>{values}}  {why}" for name, value, why in shown)


def _shown(value: Any) -> str:
    return f"{float(value):.2g}" if not isinstance(value, bool | int | str) else f"{value}"


def _reasons(config: SCEConfig, sizes: SCESizes, num_positions: int, width: int) -> dict[str, str]:
    is_sampled = sizes.bucket_sampling == "priority"
    if config.bucket_sampling == "auto" and width >= WIDE and not is_sampled:
        sampling = "one tail is asked for, or a row-sparse gradient"
    else:
        sampling = f"the head's width is {width}; from {WIDE} on buckets are sampled"
    if is_sampled:
        buckets, candidates = (
            "one for 64 positions, 64 at most; 16 at least, if each has 16",
            "V/32, 4,096 at least",
        )
    else:
        buckets = "one for 32 positions, if the scan of the catalogue is worth it"
        candidates = "32 for each of its positions, 1,024 to 4,096"
    if not sizes.num_buckets:
        candidates = "there are no buckets"
    if config.target_relative_error is not None:
        tail = f"what target_relative_error={config.target_relative_error} took so far"
    else:
        tail = "each bucket has a sample of its own" if is_sampled else "a sample for all positions"
    rows = "the buckets' scan gives them" if is_sampled else "it would take a scan of its own"
    control = "the smaller variance so far" if sizes.tail_candidates else "there is no tail"
    return {
        "num_buckets": buckets,
        "bucket_positions": f"{num_positions} positions by buckets",
        "bucket_candidates": candidates,
        "shared_frequent": "1,024 beside buckets, 2,048 without",
        "tail_candidates": tail,
        "bucket_sampling": sampling,
        "control_variate": control,
        "row_control_variate": rows,
        "uniform_floor": "V over V and the labels seen so far",
    }
