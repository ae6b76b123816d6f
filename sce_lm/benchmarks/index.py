"""Lists of k items by an approximate index against exact ones, as the catalogue grows.

Item vectors are drawn: in "clusters", whose sizes fall as 1 / rank, of about 500 items a cluster,
with a bias for each item that falls as its place does, as the popularity of items; or
"independent", without any structure, which no index of this kind is made for. A history asks near
an item: its hidden state is that item's vector and as much noise as the cluster has. What is timed
is making lists from hidden states, the exact way and by the index in turns; the model's pass over
the history comes before either.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sce_lm.benchmarks import report, results
from sce_lm.benchmarks.report import Column, Plot, Table
from sce_lm.ops.head import Head
from sce_lm.recsys.item_index import ItemIndex, share_found
from sce_lm.recsys.scoring import encoded_scores, top_items

STRUCTURES = ("clusters", "independent")
ITEMS_A_CLUSTER = 500
NOISE = 0.7
"""Standard deviation within a cluster, that of the centres being 1."""
ITEMS = Column("items", "items", ",")
RECALL = Column("recall", "recall", ".4f", "share of the exact lists that is found")
SPEED = Column("x exact", "speedup", ".1f", "lists in the same time, exact ones being 1")
TABLES = (
    Table(
        "Lists from hidden states",
        (
            Column("lists by", "label"),
            *(ITEMS, RECALL, SPEED),
            Column("effort", "effort", ",", "cells (faiss) or candidates (usearch) looked at"),
            Column(
                *("pays from", "pays_from_lists", ",.0f"),
                "so many lists take as long as building the index and making them by it",
            ),
            Column("index MiB", "index_mib", ",.0f"),
            Column("ms / list", "list_seconds", ".3f", factor=1000.0),
            Column("build s", "build_seconds", ",.0f"),
        ),
    ),
)
PLOTS = (Plot("Speed", ITEMS, SPEED, joined=True),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--items", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--formats", nargs="+", choices=("faiss", "usearch"), default=["faiss"])
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--dim", type=int, default=64, help="width d")
    parser.add_argument("--k", type=int, default=10, help="length of the lists")
    parser.add_argument("--users", type=int, default=1024, help="lists that are compared")
    parser.add_argument("--batch_size", type=int, default=256, help="users at a time")
    parser.add_argument("--recall", type=float, default=0.98, help="to set the index to, on others")


def measure(arguments: argparse.Namespace) -> Sequence[results.Comparison]:
    """One comparison a structure."""
    return [
        results.Comparison(
            f"{structure.capitalize()}, width {arguments.dim}, lists of {arguments.k}",
            {"width": arguments.dim, "k": arguments.k, "recall_asked": arguments.recall},
            [
                row
                for num_items in arguments.items
                for row in _of_catalogue(structure, num_items, arguments)
            ],
        )
        for structure in arguments.structures
    ]


def draw_catalogue(
    structure: str, num_items: int, width: int, users: int
) -> tuple[torch.Tensor, Head]:
    """Hidden states fp32 [users, width], and the head with a row and a bias for each item."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((num_items, width), dtype=np.float32)
    bias = np.zeros(num_items, dtype=np.float32)
    if structure == "clusters":
        weight *= NOISE
        clusters = max(1, num_items // ITEMS_A_CLUSTER)
        centres = generator.standard_normal((clusters, width), dtype=np.float32)
        share = 1.0 / np.arange(1, clusters + 1)
        weight += centres[generator.choice(clusters, num_items, p=share / share.sum())]
        bias = np.log1p(num_items / generator.permutation(np.arange(1, num_items + 1)))
    scale = width**-0.5
    asked = weight[generator.integers(num_items, size=users)]
    asked = asked + NOISE * generator.standard_normal(asked.shape, dtype=np.float32)
    weight *= scale
    head = Head(torch.from_numpy(weight), bias=torch.from_numpy(bias.astype(np.float32)) * scale)
    return torch.from_numpy(asked), head


def _of_catalogue(
    structure: str, num_items: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for exact lists, and one a format."""
    users, size, k = arguments.users, arguments.batch_size, arguments.k
    hidden_states, head = draw_catalogue(structure, num_items, arguments.dim, users + size)
    others, batches = hidden_states[:size], hidden_states[size:].split(size)
    items = range(num_items)

    def exact(hidden: torch.Tensor) -> torch.Tensor:
        return top_items(encoded_scores((hidden, head)), items, k)[1]

    exact(others)  # sets up libraries
    exact_row = {"label": "exact", "items": num_items, "recall": 1.0, "speedup": 1.0}
    vectors = head.rows(slice(None), torch.float32).numpy()
    for kind in arguments.formats:
        report.progress(f"{structure}, {num_items:,} items: {kind}")
        begun = time.perf_counter()
        index = ItemIndex.build(vectors, kind)
        built = time.perf_counter() - begun
        query = head.extend(others, torch.float32).numpy()
        index.tune(query, exact(others).numpy(), arguments.recall)
        found, seconds = [], {"exact": [], "index": []}
        for hidden in batches:
            begun = time.perf_counter()
            best = exact(hidden)
            between = time.perf_counter()
            listed = index.top_items((hidden, head), items, k)[1]
            seconds["exact"].append((between - begun) / len(hidden))
            seconds["index"].append((time.perf_counter() - between) / len(hidden))
            found.append(share_found(listed.numpy(), best.numpy()))
        exact_seconds, list_seconds = map(statistics.median, seconds.values())
        if "list_seconds" not in exact_row:
            yield exact_row | {"list_seconds": exact_seconds}
            exact_row["list_seconds"] = exact_seconds
        saved = exact_seconds - list_seconds
        yield {
            "label": kind,
            "items": num_items,
            "recall": statistics.fmean(found),
            "speedup": exact_seconds / list_seconds,
            "effort": index.effort,
            "list_seconds": list_seconds,
            "build_seconds": built,
            "pays_from_lists": built / saved if saved > 0 else None,
            "index_mib": _file_size(index) / 2**20,
        }


def _file_size(index: ItemIndex) -> int:
    """Bytes of the index as a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        index.save(path)
        return path.stat().st_size
