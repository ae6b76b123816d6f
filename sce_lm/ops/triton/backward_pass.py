r"""Backward pass over lists of columns, a bounded workspace at a time.

For each list, or as many of its columns as the workspace holds:

    logit_gradient    G = the list's logits once more, turned into gradients      [N, C]
    hidden_gradient   dH += G · W[ids]
    row_gradient      rows = G' · H

three products of ``2·N·C·d`` operations. The lists are walked one after another and each element is
written by one program a launch, so the sums have one order and the same bits every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.triton.candidate_lists import CandidateList
from sce_lm.ops.triton.hidden_gradient import RowTerm, hidden_gradient
from sce_lm.ops.triton.logit_gradient import LossGradient, column_block, logit_gradient
from sce_lm.ops.triton.row_gradient import RowTarget, row_gradient

WORKSPACE_ELEMENTS = 2**28
"""Elements of the logit gradient held at a time (512 MiB in half precision)."""


class Piece(NamedTuple):
    """Columns of a list that go through the workspace together."""

    members: CandidateList
    columns: range
    target: RowTarget | None
    """Where the gradient of the rows goes; None: it is not needed."""


def backward_pass(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor | None,
    post: LogitTransform,
    lists: list[tuple[CandidateList, RowTarget | None]],
    loss: LossGradient,
    factor: torch.Tensor,
    *,
    label: RowTerm | None = None,
    mean: RowTerm | None = None,
    needs_hidden: bool,
) -> torch.Tensor | None:
    """Fill the row targets, and return the gradient of the hidden states if it is needed.

    Args:
        labels: ``[N]`` int64, whose gradient goes another way; None: there are none.
        lists: each with the target of its rows.
        loss: the loss as a function of the logits.
        factor: 0-dim fp32 on the gradient of the hidden states.
        label, mean: further terms of that gradient.
    """
    num_positions = len(hidden)
    pieces, widest = [], 1
    for members, target in lists:
        block = column_block(members, hidden, weight)
        length = max(WORKSPACE_ELEMENTS // num_positions // block, 1) * block
        stops = range(0, max(members.num_columns, 1), length)
        for start in stops:
            columns = range(start, min(start + length, members.num_columns))
            pieces.append(Piece(members, columns, target))
            widest = max(widest, triton.cdiv(len(columns), block) * block)
    workspace = hidden.new_empty(num_positions, widest)
    out = hidden.new_empty(hidden.shape) if needs_hidden else None
    several = needs_hidden and len(pieces) > 1
    sums = hidden.new_empty(hidden.shape, dtype=torch.float32) if several else None
    for index, (members, columns, target) in enumerate(pieces):
        logit_gradient(hidden, weight, bias, labels, members, post, columns, workspace, loss)
        if out is not None:
            hidden_gradient(
                workspace,
                weight,
                members,
                columns,
                sums,
                factor,
                out,
                label=label if index == 0 else None,
                mean=mean if index == 0 else None,
                is_first=index == 0,
                is_last=index == len(pieces) - 1,
            )
        if target is not None:
            row_gradient(workspace, hidden, members, columns, target)
    return out


def normalised(grad_loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``grad_loss`` as ratios in [-1, 1] and their 0-dim fp32 factor.

    The kernels work on the ratios, so that a mean over many positions, or a loss scale, does not
    take the logit gradient out of fp16's range.
    """
    grad_loss = grad_loss.float()
    factor = grad_loss.abs().amax()
    return grad_loss / factor.clamp_min(torch.finfo(torch.float32).tiny), factor
