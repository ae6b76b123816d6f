"""The losses that are compared: ours, and what a user would pick instead.

A command line names them by `--methods NAME ...`; `NAME:{"option": value}` changes options of one
of ours, for instance `sce:{"tail_candidates": 8192}`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sce_lm import objectives
from sce_lm.benchmarks.loss_cost import Loss, loss_of
from sce_lm.benchmarks.peers import PEERS, Peer
from sce_lm.config import SCEConfig
from sce_lm.objectives import Objective
from sce_lm.ops.logits import LogitTransform

LOGITS = 2048
"""Logits of a position, where nothing else is asked for."""


@dataclass(frozen=True)
class Method:
    """A loss by name."""

    name: str
    """On the command line."""
    label: str
    """In tables and plots."""
    specification: dict[str, Any]
    """Arguments of ``objectives.get``, or ``{"name": peer}`` for one of ``peers.PEERS``."""

    @property
    def peer(self) -> Peer | None:
        """What it is if it is not ours."""
        return PEERS.get(self.specification["name"])

    def having(self, **options: Any) -> Method:
        """The same objective with other options, which its label names."""
        if self.peer is not None:
            raise ValueError(f"--methods gives options to {self.name}, which has none; leave them.")
        shown = ", ".join(f"{name}={value}" for name, value in options.items())
        return Method(self.name, f"{self.label}, {shown}", self.specification | options)

    def resolved(self, positions: int, vocab_size: int, width: int) -> dict[str, Any]:
        """Every option, with a number for each "auto" that the sizes of a problem decide."""
        if self.peer is not None:
            return self.specification
        objective = objectives.get(**self.specification)
        found = objective.to_dict()
        resolve = getattr(objective.config, "resolve", lambda *_: None)
        if isinstance(objective.config, SCEConfig):
            resolve = partial(resolve, width=width)
        sizes = resolve(positions, vocab_size)
        if dataclasses.is_dataclass(sizes) and not isinstance(sizes, type):
            # The floor falls with the labels that were seen, of which a problem knows nothing.
            found |= dataclasses.asdict(sizes) | {"uniform_floor": found.get("uniform_floor")}
        return {name: value for name, value in found.items() if value is not None}


def methods(logits: int = LOGITS, vocab_size: int = 2**17) -> dict[str, Method]:
    """All methods by name. SCE (default) and SCE (published) are as they come; the others of ours
    have about ``logits`` logits a position.

    What depends on the batch cannot be set: in-batch losses see its distinct labels, BIR and XIR
    those twice, once to resample. Kernel sampling for each position has 64 draws: to find them
    costs more than their logits. BCE and gBCE have 256 negatives of each position, as published.
    """
    tail_only = {"num_buckets": 0, "shared_labels": False, "shared_frequent": 0}
    sampled, softmax = {"num_negatives": logits}, "sampled_softmax"
    kernel = {"num_negatives": 64, "alpha": "auto", "center": True}  # at its best once trained
    ours: dict[str, tuple[str, str, dict[str, Any]]] = {
        "exact": ("exact (ours)", "exact", {}),
        "sce": ("SCE (default)", "sce", {}),
        "sce-tail": ("SCE (tail only)", "sce", {**tail_only, "tail_candidates": logits}),
        "sce-published": ("SCE (published)", "sce", {"published": True}),
        "uniform": ("sampled softmax, uniform", softmax, sampled | {"proposal": "uniform"}),
        "unigram": ("sampled softmax, unigram", softmax, sampled | {"proposal": "unigram"}),
        "in-batch": ("in-batch, logQ", "in_batch", {}),
        "bce": ("BCE", "bce", {"num_negatives": 256}),
        "gbce": ("gBCE", "gbce", {}),
        "bir": ("BIR", "bir", {}),
        "xir": ("XIR", "xir", {"cache_size": logits // 2}),
        "kernel-sampling": ("kernel sampling, 64", "kernel", kernel),
        # A position meets three chunks of V / num_buckets classes.
        "rece": ("RECE", "rece", {"num_buckets": max(1, 3 * vocab_size // logits)}),
    }
    found = {name: Method(name, peer.label, {"name": name}) for name, peer in PEERS.items()}
    for name, (label, objective, options) in ours.items():
        found[name] = Method(name, label, {"name": objective, **options})
    return found


def add_options(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """``--methods`` and ``--logits``, and a list of all methods below the other options."""
    known = methods()
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        default=list(default),
        help=f"rows of the table; default: {' '.join(default)}",
    )
    parser.add_argument(
        "--logits",
        type=int,
        default=LOGITS,
        help="of a position, for those of our methods that take a number of them",
    )
    width = max(map(len, known))
    lines = [f"  {name:<{width}}  {method.label}" for name, method in known.items()]
    options = 'NAME:{"option": value} changes options of ours: sce:{"tail_candidates": 8192}'
    parser.epilog = "\n".join(["methods:", *lines, "", options])


def choose(
    arguments: argparse.Namespace, vocab_size: int = 2**17, *further: Method
) -> list[Method]:
    """The methods that a command line names, in its order; ``further`` ones may be named too."""
    known = methods(arguments.logits, vocab_size) | {method.name: method for method in further}
    found = []
    for asked in arguments.methods:
        name, _, options = asked.partition(":")
        if name not in known:
            raise ValueError(f"--methods has {name!r}; choose from {', '.join(known)}.")
        try:
            given = json.loads(options or "{}")
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise ValueError(
                f"--methods has {asked!r}; expected a JSON object behind the colon, for instance "
                "'sce:{\"tail_candidates\": 8192}'."
            )
        found.append(known[name].having(**given) if given else known[name])
        if found[-1].peer is None:
            objectives.get(**found[-1].specification)  # an option that is none ends it here
    return found


def build(
    specification: dict[str, Any], post: LogitTransform, device: str
) -> tuple[Loss, Objective | None]:
    """A new loss of a :class:`Method`'s specification, and the objective behind it if it is one of
    ours."""
    if specification["name"] in PEERS:
        return PEERS[specification["name"]].build(post, device), None
    objective = objectives.get(**specification)
    return loss_of(objective, post), objective
