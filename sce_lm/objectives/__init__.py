"""Training losses by name: ``objectives.get("sce", tail_candidates=2048)``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from sce_lm.objectives.base import Objective, Statistics
from sce_lm.objectives.binary_cross_entropy import BCE, GBCE, BCEConfig, GBCEConfig
from sce_lm.objectives.exact import Exact, ExactConfig
from sce_lm.objectives.in_batch import InBatch, InBatchConfig
from sce_lm.objectives.kernel import Kernel, KernelConfig
from sce_lm.objectives.published_sce import PublishedSCE
from sce_lm.objectives.rece import RECE, RECEConfig
from sce_lm.objectives.sampled_softmax import SampledSoftmax, SampledSoftmaxConfig
from sce_lm.objectives.saved import in_present_terms, without_removed
from sce_lm.objectives.sce import SCE
from sce_lm.objectives.xir import BIR, XIR, BIRConfig, XIRConfig

__all__ = [
    "BCE",
    "BIR",
    "GBCE",
    "RECE",
    "SCE",
    "XIR",
    "BCEConfig",
    "BIRConfig",
    "Exact",
    "ExactConfig",
    "GBCEConfig",
    "InBatch",
    "InBatchConfig",
    "Kernel",
    "KernelConfig",
    "Objective",
    "PublishedSCE",
    "RECEConfig",
    "SampledSoftmax",
    "SampledSoftmaxConfig",
    "Statistics",
    "XIRConfig",
    "current_options",
    "from_config",
    "from_dict",
    "get",
    "names",
]

_OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        Exact,
        SCE,
        SampledSoftmax,
        InBatch,
        BCE,
        GBCE,
        BIR,
        XIR,
        Kernel,
        RECE,
    )
}

_PUBLISHED: dict[str, type[Objective]] = {"sce": PublishedSCE}
"""Published forms that are objectives of their own."""


def _class_of(name: str, published: bool) -> Any:
    if name not in _OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; choose one of {', '.join(names())}.")
    if published and name not in _PUBLISHED:
        raise ValueError(f"objective {name!r} has no other published form; leave published out.")
    return (_PUBLISHED if published else _OBJECTIVES)[name]


def names() -> list[str]:
    """Names that :func:`get` knows."""
    return list(_OBJECTIVES)


def get(name: str, *, published: bool = False, **options: Any) -> Objective:
    """A new objective with a state of its own.

    Args:
        name: one of :func:`names`.
        published: the published form instead of the corrected one; "sce" has both.
        options: fields of the objective's configuration: :class:`sce_lm.SCEConfig` for "sce",
            and for the others the one beside the objective, for instance ``SampledSoftmaxConfig``.

    Raises:
        ValueError: an unknown name, an unknown option, or options that do not go together.
    """
    objective_class = _class_of(name, published)
    known = [f.name for f in dataclasses.fields(objective_class.config_class)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {known}."
            raise ValueError(f"objective {name!r} has no option {option!r}; {hint}")
    return objective_class(objective_class.config_class(**options))


def from_dict(saved: Mapping[str, Any]) -> Objective:
    """A new objective from what :meth:`Objective.to_dict` gave, in this version or an earlier one.

    What this version does not have is left out, or what stands for it is taken, with one warning.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    options = dict(saved)
    name = options.pop("name")
    return get(name, **current_options(name, options))


def current_options(name: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an objective that were saved by this version or an earlier one, as :func:`get`
    takes them; see :func:`from_dict`."""
    instead = in_present_terms(name, saved)
    is_published = instead.get("published", saved.get("published", False))
    config_class = _class_of(name, is_published).config_class
    known = ["published", *(f.name for f in dataclasses.fields(config_class))]
    return without_removed(name, saved, instead, known)


def from_config(config: Any) -> Objective:
    """The objective of a configuration; an objective is returned as it is.

    Raises:
        TypeError: anything else.
    """
    if isinstance(config, Objective):
        return config
    objective_class: Any
    for objective_class in (*_OBJECTIVES.values(), *_PUBLISHED.values()):
        if type(config) is objective_class.config_class:
            return objective_class(config)
    raise TypeError(
        f"got {type(config).__name__}; pass an SCEConfig or another objective's configuration, or "
        "an objective from objectives.get(...)."
    )
