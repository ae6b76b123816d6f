"""Errors that the Monte-Carlo tests must find, planted into the library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

import sce_lm.objectives.sce as sce
from sce_lm.ops.candidate_blocks import Lists
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head


def wrong_threshold(proposal, size, generator, **options):
    """tau is the m-th largest priority instead of the (m+1)-th."""
    u = torch.rand(len(proposal), generator=generator, dtype=torch.float64)
    top = torch.topk(proposal - torch.log1p(-u), size)
    return top.indices, (top.values[-1] - proposal[top.indices]).clamp_min(0)


PLANTED = ["c omitted", "tau the m-th", "label twice", "bucket item twice", "mean of b", "offsets"]


def plant(error: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Candidates], Candidates]:
    """Put one error into the library; returns what to do to the candidates of a draw."""
    init, block, rows, row_sum = Lists.__init__, Lists.block, Head.rows, Head.row_sum

    def all_of_the_tail(lists, *args, **options):
        init(lists, *args, **options)
        lists.own_tail = torch.zeros_like(lists.own_tail)

    def no_label_mask(*args):
        return block(*args)._replace(label_columns=[])

    def without_bias(head, *args):
        return row_sum(head._replace(bias=torch.zeros_like(head.bias)), *args)

    def narrow(head, ids, dtype):
        """Row offsets that overflow an integer narrower than the table, as int32 would."""
        if isinstance(ids, slice):
            return rows(head, ids, dtype)
        width = head.weight.shape[1]
        offset = ids * width
        wrapped = torch.where(offset >= 1024, offset - 1024, offset)
        return rows(head, wrapped // width, dtype)

    if error == "c omitted":
        return lambda c: dataclasses.replace(c, tail_log_weights=0 * c.tail_log_weights)
    if error == "tau the m-th":
        monkeypatch.setattr(sce, "priority_sample", wrong_threshold)
    elif error == "label twice":
        monkeypatch.setattr(Lists, "block", no_label_mask)
    elif error == "bucket item twice":
        monkeypatch.setattr(Lists, "__init__", all_of_the_tail)
    elif error == "mean of b":
        monkeypatch.setattr(Head, "row_sum", without_bias)
    else:
        assert error == "offsets"
        monkeypatch.setattr(Head, "rows", narrow)
    return lambda c: c
