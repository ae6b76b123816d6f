"""Errors that the Monte-Carlo tests must find, planted into the library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

import sce_lm.objectives.sce as sce
import sce_lm.ops.candidate_cross_entropy as core
from sce_lm.ops.candidates import Candidates


def wrong_threshold(proposal, size, generator, **options):
    """tau is the m-th largest priority instead of the (m+1)-th."""
    u = torch.rand(len(proposal), generator=generator, dtype=torch.float64)
    top = torch.topk(proposal - torch.log1p(-u), size)
    return top.indices, (top.values[-1] - proposal[top.indices]).clamp_min(0)


PLANTED = ["c omitted", "tau the m-th", "label twice", "bucket item twice", "mean of b", "offsets"]


def plant(error: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Candidates], Candidates]:
    """Put one error into the library; returns what to do to the candidates of a draw."""
    problem_init, block, rows = core._Problem.__init__, core._block, core._Problem.rows

    def init(p, *args):
        problem_init(p, *args)
        candidates = args[3]
        if error == "bucket item twice":
            p.own_tail = torch.zeros_like(p.own_tail)
            if candidates.control_variate:
                p.tail_weight = p.dense_weight[p.tail].expand_as(p.tail_weight)
                p.tail_total = p.tail_weight.sum(dim=1)
                p.tail_rows = p.tail_weight @ p.dense_rows[p.tail]
        elif error == "mean of b":
            p.rest_total[:, -1] = 0.0

    def no_label_mask(*args):
        nowhere = torch.empty(0, dtype=torch.int64)
        return block(*args)._replace(is_label=(nowhere, nowhere))

    def narrow(p, ids):
        """Row offsets that overflow an integer narrower than the table, as int32 would."""
        width = p.columns.weight.shape[1]
        offset = ids * width
        wrapped = torch.where(offset >= 1024, offset - 1024, offset)
        return rows(p, wrapped // width)

    if error == "c omitted":
        return lambda c: dataclasses.replace(c, tail_log_weights=0 * c.tail_log_weights)
    if error == "tau the m-th":
        monkeypatch.setattr(sce, "priority_sample", wrong_threshold)
    elif error == "label twice":
        monkeypatch.setattr(core, "_block", no_label_mask)
    elif error == "offsets":
        monkeypatch.setattr(core._Problem, "rows", narrow)
    else:
        monkeypatch.setattr(core._Problem, "__init__", init)
    return lambda c: c
