"""Approximate search of items: a few thousand inner products for a list instead of one an item.

    recsys.export(model, tokenizer, "index", format="faiss")
    index = recsys.load_index("index", tokenizer)
    recsys.recommend(model, tokenizer, histories, index=index)

The index proposes items; the model scores what it proposed by its own rows, so that scores and
order are those of an exact list, and an old index costs recall but never a wrong score. Filters are
kept: more items are asked for than a list needs, and a user for whom too few are left gets an exact
list.

"faiss" is an inverted file: k-means cells, of which the nearest are searched in full (Jégou, Douze,
Schmid 2011). "usearch" is a graph of neighbours (HNSW; Malkov, Yashunin 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from sce_lm.ops.head import Head
from sce_lm.recsys.item_vectors import queries
from sce_lm.recsys.scoring import Encoded, encoded_scores, top_items
from sce_lm.requirements import require

IndexKind = Literal["faiss", "usearch"]

EXACT_FROM = 0.25
"""From this share of the catalogue on, asking for so many items takes longer than scoring all."""


class _Library(Protocol):
    """What is needed of a library of indices."""

    max_effort: int
    """From here on, more effort finds nothing more."""

    def search(self, query: np.ndarray, n: int, effort: int) -> np.ndarray:
        """int64 [users, n] rows of the items found, -1 where there are fewer."""
        ...

    def save(self, path: Path) -> None: ...


class _Faiss:
    """An inverted file; effort is the number of cells searched."""

    def __init__(self, index: Any):
        self.index = index
        self.max_effort = index.nlist

    @classmethod
    def build(cls, vectors: np.ndarray) -> _Faiss:
        import faiss

        num_items, width = vectors.shape
        cells = max(1, min(int(4 * math.sqrt(num_items)), num_items // 40))
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.niter = 10
        chosen = np.random.default_rng(0).permutation(num_items)[: 40 * cells]
        index.train(vectors[np.sort(chosen)])
        index.add(vectors)
        return cls(index)

    @classmethod
    def load(cls, path: Path) -> _Faiss:
        import faiss

        return cls(faiss.read_index(str(path)))

    def search(self, query: np.ndarray, n: int, effort: int) -> np.ndarray:
        import faiss

        parameters = faiss.SearchParametersIVF()
        parameters.nprobe = effort
        return self.index.search(query, n, params=parameters)[1]

    def save(self, path: Path) -> None:
        import faiss

        faiss.write_index(self.index, str(path))


class _Usearch:
    """A graph of neighbours; effort is the number of candidates kept while walking it.

    A graph of inner products has items that no walk reaches. So item vectors x get a further column
    sqrt(max |x|² - |x|²), which makes them equally long, and queries a 0 (Bachrach et al. 2014).
    """

    def __init__(self, index: Any):
        self.index = index
        self.max_effort = len(index)

    @classmethod
    def build(cls, vectors: np.ndarray) -> _Usearch:
        from usearch.index import Index

        squares = np.einsum("id,id->i", vectors, vectors)
        column = np.sqrt(np.maximum(squares.max() - squares, 0.0))
        rows = np.column_stack((vectors, column))
        index = Index(ndim=rows.shape[1], metric="ip", dtype="f32", connectivity=32)
        index.add(np.arange(len(rows), dtype=np.uint64), rows)
        return cls(index)

    @classmethod
    def load(cls, path: Path) -> _Usearch:
        from usearch.index import Index

        return cls(Index.restore(str(path)))

    def search(self, query: np.ndarray, n: int, effort: int) -> np.ndarray:
        self.index.expansion_search = max(effort, n)
        found = self.index.search(np.pad(query, ((0, 0), (0, 1))), n)
        rows = found.keys.astype(np.int64)
        return np.where(np.arange(n) < found.counts[:, None], rows, -1)

    def save(self, path: Path) -> None:
        self.index.save(str(path))


_LIBRARIES = {"faiss": _Faiss, "usearch": _Usearch}


@dataclass
class ItemIndex:
    """An index of item vectors; :meth:`build` makes one, ``load_index`` reads an exported one."""

    library: _Library
    num_items: int
    width: int
    """D of :func:`~sce_lm.recsys.item_vectors`."""
    effort: int
    """Cells or candidates looked at for a list: more find more and take longer."""

    @classmethod
    def build(cls, vectors: np.ndarray, kind: IndexKind, effort: int | None = None) -> ItemIndex:
        """An index of fp32 [items, D]; effort None: all of it, until :meth:`tune` sets one."""
        require(f"An index of kind {kind}", kind)
        library = _LIBRARIES[kind].build(np.ascontiguousarray(vectors, dtype=np.float32))
        num_items, width = vectors.shape
        return cls(library, num_items, width, effort or library.max_effort)

    @classmethod
    def read(
        cls, path: Path, kind: IndexKind, num_items: int, width: int, effort: int
    ) -> ItemIndex:
        """An index from the file of :meth:`save`."""
        require(f"An index of kind {kind}", kind)
        return cls(_LIBRARIES[kind].load(path), num_items, width, effort)

    def save(self, path: Path) -> None:
        """Write the library's own file."""
        self.library.save(path)

    def search(self, query: np.ndarray, n: int) -> np.ndarray:
        """int64 [users, n] rows of the items found for fp32 [users, D], -1 where there are fewer;
        in no order."""
        return self.library.search(query, min(n, self.num_items), self.effort)

    def tune(self, query: np.ndarray, exact: np.ndarray, recall: float) -> float:
        """Set the least power of two as effort that finds so much of the exact lists.

        Args:
            query: fp32 [users, D].
            exact: int64 [users, k] rows of the best items.
            recall: share of them to find, at most 1.

        Returns:
            The share that is found.
        """
        effort, found = 1, 0.0
        while True:
            self.effort = min(effort, self.library.max_effort)
            found = share_found(self.search(query, exact.shape[1]), exact)
            if found >= recall or effort >= self.library.max_effort:
                return found
            effort *= 2

    def top_items(
        self,
        encoded: Encoded,
        items: range,
        k: int,
        *,
        masked: tuple[Tensor, Tensor] | None = None,
        allowed: Tensor | None = None,
        tile_size: int = 16_384,
    ) -> tuple[Tensor, Tensor]:
        """As :func:`~sce_lm.recsys.scoring.top_items`, of what the index finds.

        Args:
            encoded: hidden states of a batch, and the head.

        Raises:
            ValueError: the index is of other items or of another model.
        """
        query, head = queries(encoded)
        self._check(items, query)
        choice = self.num_items if allowed is None else int(allowed[items.start :].sum())
        hidden_by_mask = 0 if masked is None else int(masked[0].bincount().max())
        n = math.ceil((k + hidden_by_mask) * self.num_items / max(choice, 1))
        filters = {"masked": masked, "allowed": allowed, "tile_size": tile_size}
        if n > EXACT_FROM * self.num_items:
            return top_items(encoded_scores(encoded), items, k, **filters)
        rows = torch.from_numpy(self.search(query.cpu().numpy(), n))
        tokens = rows.add(items.start).masked_fill(rows < 0, -1).sort(dim=1).values
        scores = _scores_at(tokens, query, head)
        scores[~_permitted(tokens, masked, allowed)] = -torch.inf
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, tokens = scores[:, :k], tokens.gather(1, order)[:, :k]
        short = (scores == -torch.inf).any(1).nonzero().squeeze(1)
        if len(short):
            if masked is not None:
                place = torch.full((len(query),), -1).index_copy(0, short, torch.arange(len(short)))
                kept = place[masked[0]] >= 0
                filters["masked"] = place[masked[0]][kept], masked[1][kept]
            hidden_states = encoded[0][short.to(encoded[0].device)]
            best_scores, best = top_items(
                encoded_scores((hidden_states, head)), items, k, **filters
            )
            scores[short], tokens[short] = best_scores.to(scores), best.cpu()
        return scores, tokens

    def _check(self, items: range, query: Tensor) -> None:
        if len(items) != self.num_items or query.shape[1] != self.width:
            raise ValueError(
                f"The index holds {self.num_items} items of {self.width} numbers, and the model "
                f"has {len(items)} items of {query.shape[1]}; export the model anew."
            )


def share_found(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean over users of the share of exact [users, k] that is in found [users, n]."""
    return float((exact[:, :, None] == found[:, None, :]).any(2).mean())


def _scores_at(tokens: Tensor, query: Tensor, head: Head) -> Tensor:
    """fp32 [users, n] scores, on the CPU."""
    at = tokens.clamp(min=0).to(query.device)
    rows = head.rows(at.flatten(), query.dtype).unflatten(0, at.shape)
    with torch.autocast(query.device.type, enabled=False):
        return head.post((rows @ query[:, :, None]).squeeze(2)).cpu()


def _permitted(
    tokens: Tensor, masked: tuple[Tensor, Tensor] | None, allowed: Tensor | None
) -> Tensor:
    """bool [users, n], which of the tokens may be listed."""
    permitted = tokens >= 0
    if allowed is not None:
        permitted &= allowed[tokens.clamp(min=0)]
    if masked is not None:
        span = int(max(tokens.max(), masked[1].max())) + 1
        users = torch.arange(len(tokens))[:, None]
        pairs = users * span + tokens.clamp(min=0)
        permitted &= ~torch.isin(pairs, masked[0] * span + masked[1])
    return permitted
