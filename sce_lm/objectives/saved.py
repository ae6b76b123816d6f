"""What earlier versions saved of an objective, in the terms of this one.

SCE as published was ``SCEConfig(assignment="topk")``, and SCE without a sampled tail
``correction="none"``; the tail's proposal had more components, and buckets could be of equal
size (``assignment="balanced"``).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

REMOVED_PRIORS = ("in_batch", "cache", "kernel")
"""Components that ``prior`` had."""
UNCORRECTED = {"num_buckets": 64, "bucket_candidates": 1024}
"""What "auto" was with ``correction="none"``, which always had buckets."""


def in_present_terms(name: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Options of this version that stand for removed ones, to be put over the others."""
    if name != "sce":
        return {}
    instead: dict[str, Any] = {}
    if saved.get("published") or saved.get("assignment") == "topk":
        if not saved.get("published"):
            instead["published"] = True
        if "centers" in saved:
            instead["mix"] = saved["centers"] == "mix"
        if saved.get("bucket_candidates") == "auto":
            instead["bucket_candidates"] = 1024
        return instead
    if saved.get("correction") == "none":
        instead |= {"tail_candidates": 0, "control_variate": False}
        if saved.get("num_buckets") != 0:
            is_auto = {option: saved.get(option, "auto") == "auto" for option in UNCORRECTED}
            instead |= {option: UNCORRECTED[option] for option in is_auto if is_auto[option]}
    prior = saved.get("prior")
    shares = {prior: 1.0} if isinstance(prior, str) else prior
    if isinstance(shares, Mapping) and not shares.keys().isdisjoint(REMOVED_PRIORS):
        kept = {part: share for part, share in shares.items() if part not in REMOVED_PRIORS}
        instead["prior"] = kept or "labels"
    return instead


def without_removed(
    name: str, saved: Mapping[str, Any], instead: Mapping[str, Any], known: Collection[str]
) -> dict[str, Any]:
    """The saved options that this version has, with those that stand for others; one warning names
    what it has not.

    Args:
        instead: what :func:`in_present_terms` gave.
        known: options of this version.
    """
    removed = [o for o in saved if o not in known or (o == "prior" and o in instead)]
    if removed:
        values = ", ".join(f"{option} {saved[option]!r}" for option in removed)
        goes_on = ", ".join(f"{option} {value!r}" for option, value in instead.items())
        warnings.warn(
            f"objective {name!r} was saved by another version with {values}; this version does not "
            f"have that and goes on {f'with {goes_on} instead' if instead else 'without'}.",
            stacklevel=4,
        )
    return {**{o: value for o, value in saved.items() if o in known}, **instead}
