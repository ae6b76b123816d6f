r"""Divergence over candidates that stand in for the catalogue, on both sides alike.

The candidates C(t) of a position are a shared list and its bucket's, both certain, and a sampled
tail with weights w = exp c. Student and teacher sum over the same draws:

    Zhat^S = sum_C w_j exp s_j,    Zhat^T = sum_C w_j exp x_j,    sum_C w_j exp(x_j) (x_j - s_j)

and so on, each of them unbiased, and the loss is the divergence of the two softmaxes over C whose
logits are ``s + c`` and ``x + c``. It is never negative, equals the exact one where C is the
catalogue, and carries a bias of the order of the sums' relative variance, as ratios and logarithms
of unbiased sums do. The gradient is the derivative of what was computed.

The layout is that of :mod:`sce_lm.ops.candidate_blocks`, without its label terms: a label that
should be certain is in the shared list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sce_lm.ops.candidate_blocks import Lists
from sce_lm.ops.candidate_gradients import CandidateGradients
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.divergence import FLOOR, Divergence
from sce_lm.ops.head import Head, Needs
from sce_lm.ops.head_loss import Found, Pass, head_loss
from sce_lm.ops.positions import Positions
from sce_lm.ops.teachers import HeadTeacher, Teacher


def candidate_divergence(
    head: Head,
    positions: Positions,
    candidates: Candidates,
    teacher: Teacher,
    divergence: Divergence,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, and ``[N]`` log Zhat of student and teacher, without gradient.

    Args:
        head: the student's output head.
        positions: N >= 1 of them, the student's hidden states.
        candidates: without control variate; the shared list ascending, and with all classes that a
            stored teacher knows.
        teacher: of the same N positions and V classes.
        divergence: which one.

    Returns:
        The positions' weighted sum of divergences (or ``[N]`` if they have no weight), and the
        teacher's and student's log-sums.
    """
    run = CandidateDivergencePass(candidates, teacher, divergence)
    loss, (student, of_teacher) = head_loss(run, head, positions)
    return loss, student, of_teacher


@dataclass(frozen=True)
class CandidateDivergencePass(Pass):
    """Over blocks of positions, each with its bucket's list."""

    candidates: Candidates
    teacher: Teacher
    divergence: Divergence

    def forward(self, head: Head, positions: Positions, needs: Needs) -> Found:
        given = self.candidates
        is_drawn = given.tail_log_weights > -torch.inf
        log_weights = given.tail_log_weights[is_drawn]
        # Weights are part of the probabilities here, so the layout has none.
        candidates = replace(
            given,
            tail=given.tail[is_drawn],
            tail_log_weights=torch.zeros_like(log_weights),
            bucket_log_weights=None,
        )
        lists = Lists(head, positions, candidates)
        spans = lists.spans()
        theirs = self._lists_of_teacher(lists, candidates)
        gradients = CandidateGradients(lists, None, candidates, needs)
        size = max(span.stop - span.start for span in spans), lists.num_columns + 1
        buffer, other = (lists.dense_rows.new_empty(size) for _ in range(2))
        losses, student, of_teacher = lists.dense_rows.new_empty(3, len(positions))
        column_weights = lists.dense_rows.new_zeros(lists.num_columns)
        column_weights[lists.tail] = log_weights.to(lists.dtype)

        for span in spans:
            height = span.stop - span.start
            b = lists.block(span, buffer[:height, :-1])
            s = head.post.apply_(b.x)
            slope = head.post.slope(s)
            if theirs is None:
                x = self.teacher.terms(b.at, candidates.shared, s, other)
            else:
                assert isinstance(self.teacher, HeadTeacher)
                x = theirs.block(span, other[:height, :-1]).x
                x = self.teacher.head.post.apply_(x)
            c = column_weights.expand(height, -1)
            if lists.own_tail is not None:
                c = c.clone()
                c[:, lists.tail].masked_fill_(lists.own_tail[b.bucket], FLOOR)
            if given.bucket_log_weights is not None:
                own = given.bucket_log_weights[b.bucket].to(lists.dtype).clamp_min(FLOOR)
                c = torch.cat([c[:, : lists.num_dense], own], dim=1)
            s, x = s.add_(c), x.add_(c)
            sums = [torch.logsumexp(each, dim=1) for each in (s, x)]
            student[b.at], of_teacher[b.at] = sums
            log_q = self.teacher.log_probs(b.at, candidates.shared, x.sub_(sums[1].unsqueeze(1)))
            terms = self.divergence(s.sub_(sums[0].unsqueeze(1)), log_q)
            losses[b.at] = terms.losses
            if not needs:
                continue
            assert positions.weight is not None
            share = positions.weight
            share = share.expand(height) if share.dim() == 0 else share[b.at]
            g = terms.gradient_(terms.pull).mul_(slope)
            gradients.add(b, g, share, torch.zeros_like(share), None)

        gradients.finish()
        return Found(losses, (student, of_teacher), gradients)

    def _lists_of_teacher(self, lists: Lists, candidates: Candidates) -> Lists | None:
        """The same layout of the teacher's head; None for a stored teacher."""
        if not isinstance(self.teacher, HeadTeacher):
            return None
        hidden = self.teacher.hidden.to(lists.dtype)
        positions = Positions(hidden, lists.positions.labels)
        theirs = Lists(self.teacher.head, positions, candidates)
        theirs.order = lists.order
        return theirs
