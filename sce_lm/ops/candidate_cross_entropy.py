r"""Candidate cross-entropy: the one numeric core behind every approximate loss.

A position t sums over three disjoint lists and its label:

    Zhat_t = exp s_ty + sum_{j in S + B(t)} exp s_tj + sum_{j in T \ B(t)} w_j exp s_tj,   j != y
    loss_t = log Zhat_t - s_ty

S is shared and certain, B(t) belongs to the position's bucket and is certain, T is a sample with
weights w = exp c. With the control variate (module :mod:`sce_lm.objectives.sce` has its source) let
R = everything outside S and B(t), and m_t the mean raw logit over R, known from the row sum of W.
The tangent of exp(g(x)) at m sums to ``|R| exp g(m)`` over R, so only its error is sampled:

    Zhat_t += e0·(|R| - A0 - g'(m)·(A1 - m·A0)),     e0 = exp g(m)
    A0 = sum_{T \ B, != y} w_j     + [y in R]
    A1 = sum_{T \ B, != y} w_j x_j + [y in R] x_y

which makes R's part ``e0·(|R| + sum w·phi + [y in R]·phi_y)``, ``phi = exp(g(x) - g(m)) - 1
- g'(m)(x - m)``, written in sums that a shift by the row's largest logit keeps in range: no
exponential here exceeds 1, so a delta of 95 is harmless, and the cancellation in a small phi stays
at rounding size beside ``|R|·e0``. That is why no ``log phi`` is taken. A0 and A1 are linear in h,
so they cost one product a position: ``sum w_j x_j = h·(sum w_j W_j)``, one row a bucket. Where the
sampled part would push Zhat below the terms that were actually seen (possible with a soft cap,
whose phi may be negative), those terms alone are used and the position is counted as clamped.

Gradients, for a weight p_t on each position's loss (p/Zhat times):

    lists, x_j:  w_j·exp(s_j)·g'(x_j)       - [control, j in T] e0·g'(m)·w_j
    label, x_y:  (exp(s_y) - Zhat)·g'(x_y)  - [control, y in R] e0·g'(m)
    mean,  m:    e0·( g'(m)·|R| - (g'(m)² + g''(m))·(A1 - m·A0) )

With other terms of the loss (:class:`~sce_lm.ops.positions.LossTerms`) p/Zhat is multiplied by
what the gradient of log Zhat is, and the -1 of the label, that is Zhat, by what that of -s_ty is.

They are taken block of positions by block, when :mod:`sce_lm.ops.head_loss` asks for them: no
``[N, K]`` logits are kept. Only exp(s) itself is held for a block, and passed over four times:
largest, shift, exp, and the weighted sum.
Weights of classes scale the candidates' rows, and weights of positions scale h, before and after
the products instead; the control's second term has rank one a bucket and is added there too. The
gradient of W is summed in fp32 over the rows that were touched, and cast once. A low-rank operand
and a bias are further columns of W (module :mod:`sce_lm.ops.head`).

Masked classes, which a bias keeps out of every sum, are in none of the lists and no part of R. A
label among them has its own term, exp(s_ty) = 0, and nothing else.

Of a head that is cut by rows over several ranks, each rank has candidates among its own rows, and
the sums of the ranks add up: Zhat = sum_r Zhat_r, with the label's term where its row is. A label
that is elsewhere is -1 here. :class:`CandidatePass` gives log Zhat_r first and the gradients once
log Zhat is known: above, Zhat is then that of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sce_lm.ops.candidate_blocks import Lists
from sce_lm.ops.candidate_gradients import CandidateGradients
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.control_variate import Control, Rest
from sce_lm.ops.dispatch import Backend, kernels
from sce_lm.ops.head import NOTHING, Head, Needs
from sce_lm.ops.head_loss import Found, Pass, head_loss
from sce_lm.ops.positions import Positions
from sce_lm.ops.static_shapes import needs_static_shapes


class CandidateLoss(NamedTuple):
    """What :func:`candidate_cross_entropy` returns."""

    loss: torch.Tensor
    """The positions' weighted sum of losses, or ``[N]`` if they have no weight."""
    log_partition: torch.Tensor
    """``[N]`` log Zhat_t, without gradient."""
    num_clamped: torch.Tensor
    """0-dim int64: positions whose control variate was dropped."""


def candidate_cross_entropy(
    head: Head, positions: Positions, candidates: Candidates, *, backend: Backend = "auto"
) -> CandidateLoss:
    """Cross-entropy over candidates, as in the module's equations.

    Args:
        head: the output head.
        positions: N >= 1 of them; where they have a weight the gradients are taken in the forward
            pass.
        candidates: the lists and their log-weights.
        backend: :data:`~sce_lm.ops.dispatch.Backend`.

    Raises:
        ValueError: a control variate with weighted buckets; backend "triton", and it cannot run.
    """
    if candidates.control_variate and candidates.bucket_log_weights is not None:
        raise ValueError(
            "the control variate knows what certain buckets leave over, and these have "
            "bucket_log_weights; use control_variate=False."
        )
    run = kernels("candidate_cross_entropy", backend, positions.hidden.device, head, positions)
    if run is not None:
        return run(head, positions, candidates)
    loss, (log_partition, num_clamped) = head_loss(CandidatePass(candidates), head, positions)
    return CandidateLoss(loss, log_partition, num_clamped)


class Sums(NamedTuple):
    """What one pass over the candidates finds."""

    log_partition: torch.Tensor
    """``[N]`` log Zhat of the rows that are here, -inf where there is nothing to sum."""
    label_logit: torch.Tensor
    """``[N]`` s_ty, 0 where the label is elsewhere."""
    num_clamped: torch.Tensor
    """0-dim int64: positions whose control variate was dropped."""


@dataclass(frozen=True)
class CandidatePass(Pass):
    """The pass over the candidates; of a head that is cut by rows, over those among a rank's."""

    candidates: Candidates

    def forward(self, head: Head, positions: Positions, needs: Needs) -> Found:
        sums, gradients = self.run(head, positions, needs)
        losses = positions.terms.losses(sums.log_partition, sums.label_logit)
        return Found(losses, (sums.log_partition, sums.num_clamped), gradients)

    def run(
        self,
        head: Head,
        positions: Positions,
        needs: Needs = NOTHING,
        whole: torch.Tensor | None = None,
    ) -> tuple[Sums, CandidateGradients]:
        """Sums, and the gradients that are needed.

        Args:
            whole: ``[N]`` log Zhat of all ranks, if these rows are not all there are.
        """
        candidates, post, terms = self.candidates, head.post, positions.terms
        is_static = needs_static_shapes(positions.labels.device)
        lists = Lists(head, positions, candidates, is_static=is_static)
        rest = Rest(lists, candidates.row_sum) if candidates.control_variate else None
        spans = lists.spans()
        gradients = CandidateGradients(lists, rest, candidates, needs)
        count = len(positions)
        log_partition = lists.dense_rows.new_empty(count + 1)  # one for empty places
        label_logit = torch.empty_like(log_partition)
        num_clamped = torch.zeros((), dtype=torch.int64, device=log_partition.device)
        longest = max(span.stop - span.start for span in spans)
        buffer = log_partition.new_empty(longest, lists.num_columns)

        for span in spans:
            b = lists.block(span, buffer[: span.stop - span.start])
            control = None
            if rest is not None:
                if b.groups:
                    rest.set_means(b.buckets, b.item_rows)
                control = Control(rest, b, post)
            label_s = post(b.label_raw)
            label_logit[b.at] = label_s.masked_fill(~b.is_here, 0.0)
            present_s = label_s.masked_fill(~b.is_here, torch.finfo(lists.dtype).min)
            s = post.apply_(b.x)
            slope = post.slope(s)
            shift = torch.maximum(present_s, s.amax(dim=1)) if s.shape[1] else present_s
            if control is not None:
                shift = torch.maximum(shift, control.least_shift())
            e = s.sub_(shift.unsqueeze(1)).exp_()
            b.without_labels(e)
            if lists.own_tail is not None:
                e[:, lists.tail].masked_fill_(lists.own_tail[b.bucket], 0.0)
            if lists.item_weight is not None:
                e[:, lists.num_dense :] *= lists.item_weight[b.bucket]
            e_label = (present_s - shift).exp().masked_fill_(~b.is_here, 0.0)

            z = e @ lists.column_weight + e_label
            if control is not None:
                known = control.known_part(shift)
                if post.soft_cap is not None:
                    seen = lists.sum_seen(e) + e_label
                    clamped = z + known < seen
                    counted = clamped if b.is_empty is None else clamped & ~b.is_empty
                    num_clamped += counted.sum()
                    z, known = torch.where(clamped, seen, z), known.masked_fill(clamped, 0.0)
                    control.e0 = control.e0.masked_fill(clamped, 0.0)
                    e[:, lists.tail] *= torch.where(clamped.unsqueeze(1), lists.unweighted(), 1.0)
                z = z + known
            log_z = z.log() + shift
            log_partition[b.at] = log_z
            if not needs:
                continue

            assert positions.weight is not None
            share = b.share_of(positions.weight)
            if whole is not None:
                log_z = whole[b.read]
                z = (log_z - shift).exp()
            per_row = terms.of_partition(share, log_z) / z
            list_factor = per_row
            if torch.is_tensor(slope):
                e *= slope
            else:
                list_factor = per_row * slope
            label_grad = (e_label * per_row - terms.of_label(share)) * post.slope(label_s)
            label_grad = label_grad.masked_fill_(~b.is_here, 0.0)
            of_mean = None
            if control is not None:
                pull = control.pull() * per_row
                label_grad = label_grad - pull * control.label_share
                of_mean = (pull, control.mean_gradient() * per_row)
            gradients.add(b, e, list_factor, label_grad, of_mean)

        gradients.finish()
        return Sums(log_partition[:count], label_logit[:count], num_clamped), gradients
