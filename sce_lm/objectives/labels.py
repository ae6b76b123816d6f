"""Which positions have a label, and whether labels and weights are what a loss can take."""

from __future__ import annotations

import torch

LABEL_RULE = (
    "outside [0, {vocab_size}) and not ignore_index={ignore_index}; check that tokenizer and head "
    "have the same size."
)
WEIGHT_RULE = "give each position with a label a finite weight that is not negative."

looked_at: set[tuple[torch.device, int]] = set()
"""Devices, and sizes of heads on them, whose first labels :func:`valid_mask` has looked at."""


def valid_positions(
    labels: torch.Tensor,
    ignore_index: int,
    vocab_size: int,
    is_masked: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int]:
    """Indices of the positions with a label, ascending, and the number of masked classes. On a
    device this waits once.

    Raises:
        ValueError: a label outside ``[0, vocab_size)``, or a position with a label whose weight is
            negative or not finite.
    """
    is_valid = labels != ignore_index
    outside = ((labels < 0) | (labels >= vocab_size)) & is_valid
    flags = [is_valid, outside, is_valid[:0] if is_masked is None else is_masked]
    is_wrong = is_valid[:0]
    if weights is not None:
        is_wrong = ~_is_weight(weights) & is_valid
    counts = torch.stack([flag.sum() for flag in (*flags, is_wrong)])
    num_valid, num_outside, num_masked, num_wrong = counts.tolist()
    if num_outside:
        rule = LABEL_RULE.format(vocab_size=vocab_size, ignore_index=ignore_index)
        raise ValueError(f"labels holds {labels[outside][0].item()}, {rule}")
    if weights is not None and num_wrong:
        raise ValueError(f"token_weights holds {weights[is_wrong][0].item()}; {WEIGHT_RULE}")
    return torch.argsort(is_valid, descending=True, stable=True)[:num_valid], num_masked


def valid_mask(
    labels: torch.Tensor,
    ignore_index: int,
    vocab_size: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[N]`` bool: which positions have a label. Waits for the device at the first call for a head
    of this size, to say at once what is wrong; from then on the device stops the program, with the
    same sentence, when it comes to the check.

    Raises:
        ValueError: as :func:`valid_positions`, at the first call.
    """
    key = (labels.device, vocab_size)
    if key not in looked_at:
        valid_positions(labels, ignore_index, vocab_size, None, weights)
        looked_at.add(key)
    is_valid = labels != ignore_index
    is_label = (labels.clamp(0, vocab_size - 1) == labels) | ~is_valid
    rule = LABEL_RULE.format(vocab_size=vocab_size, ignore_index=ignore_index)
    torch.ops.aten._assert_async.msg(is_label.all(), f"labels holds an id {rule}")
    if weights is not None:
        is_weight = _is_weight(weights) | ~is_valid
        torch.ops.aten._assert_async.msg(
            is_weight.all(), f"token_weights holds another; {WEIGHT_RULE}"
        )
    return is_valid


def _is_weight(weights: torch.Tensor) -> torch.Tensor:
    return (weights >= 0) & (weights < torch.inf)
