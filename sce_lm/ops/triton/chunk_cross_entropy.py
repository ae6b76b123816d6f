r"""Cross-entropy over chunks by the kernels of candidate cross-entropy.

With one round each chunk of positions is a bucket, and its list holds the classes of its own chunk
and of ``reach`` chunks on either side; lists shorter than the longest end in empty slots. A class
stands in ``2·reach + 1`` lists, and the backward pass keeps a row of its gradient for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sce_lm.ops.candidates import Candidates
from sce_lm.ops.chunk_cross_entropy import Chunks
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.triton.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.triton.supported import losses_supported


def chunk_cross_entropy_supported(head: Head, positions: Positions, chunks: Chunks) -> str | None:
    """Why the kernels cannot take these inputs; None if they can."""
    rounds = len(chunks.of_position)
    if rounds != 1:
        return f"it has {rounds} rounds, and the kernels take one"
    return losses_supported(head, positions)


def chunk_cross_entropy(head: Head, positions: Positions, chunks: Chunks) -> Tensor:
    """As :func:`sce_lm.ops.chunk_cross_entropy.chunk_cross_entropy`, for inputs that
    :func:`chunk_cross_entropy_supported` accepts."""
    items, log_weights = _lists(chunks)
    nothing = positions.labels[:0]
    candidates = Candidates(
        nothing,
        nothing,
        log_weights[0, :0],
        items,
        chunks.of_position[0],
        bucket_log_weights=log_weights,
    )
    return candidate_cross_entropy(head, positions, candidates).loss


def _lists(chunks: Chunks) -> tuple[Tensor, Tensor]:
    """``[chunks, K]`` ascending classes that the positions of each chunk meet, and log-weights: 0,
    and -inf in the empty slots at the end. K is what chunks of equal size can give."""
    by_chunk, classes = torch.sort(chunks.of_class[0], stable=True)
    chunk = torch.arange(chunks.count, device=classes.device)
    first = torch.searchsorted(by_chunk, chunk - chunks.reach)
    stop = torch.searchsorted(by_chunk, chunk + chunks.reach, right=True)
    reached = min(2 * chunks.reach + 1, chunks.count)
    longest = min(reached * -(-len(classes) // chunks.count), len(classes))
    place = first.unsqueeze(1) + torch.arange(longest, device=classes.device)
    is_empty = place >= stop.unsqueeze(1)
    items = classes[place.clamp_max_(len(classes) - 1)]
    items = items.masked_fill(is_empty, len(classes)).sort(dim=1).values
    items = items.masked_fill(is_empty, 0).cummax(dim=1).values
    return items, torch.zeros(items.shape, device=items.device).masked_fill(is_empty, -torch.inf)
