"""Sums of the gradients of one pass over candidates."""

from __future__ import annotations

import torch

from sce_lm.ops.candidate_blocks import Block, Lists
from sce_lm.ops.candidates import Candidates
from sce_lm.ops.control_variate import Rest
from sce_lm.ops.gradient_memory import add_product
from sce_lm.ops.head import Needs
from sce_lm.ops.head_loss import OfInputs


class CandidateGradients:
    """Sums of one call's gradients: hidden states, touched rows of W, and the mean row.

    Columns of the head that are frozen, and lie before those that are not, take no part.
    """

    def __init__(
        self, lists: Lists, rest: Rest | None, candidates: Candidates, needs: Needs
    ) -> None:
        self.lists, self.rest, self.needs = lists, rest, needs
        self.sparse, self.expected = candidates.sparse_grad, candidates.expected
        self.with_hidden, self.with_head = needs.hidden, any(needs.head)
        width = lists.dense_rows.shape[1]
        labels = lists.positions.labels
        if self.with_hidden:
            self.hidden = lists.dense_rows.new_empty(len(labels) + 1, width)
            """``[N + 1, D]``: the last row is for empty places."""
            # Products with the candidates' rows meet their weights here.
            self.weighted_rows = lists.dense_rows * lists.dense_weight.unsqueeze(1)
        if self.with_head:
            touched = torch.cat([lists.dense, labels, lists.items.reshape(-1)])
            if lists.is_static:
                # Repeated; only the first place of a class takes part until the end. A label that
                # is elsewhere adds nothing to the row of class 0.
                self.ids = touched.clamp_min(0).sort().values
            else:
                # Labels that are elsewhere make a row -1, which stays 0 until it is dropped.
                self.ids = torch.unique(touched)
            self.num_frozen = lists.head.num_frozen(needs.head)
            width -= self.num_frozen
            self.rows = lists.dense_rows.new_zeros(len(self.ids), width)
            self.dense = lists.dense_rows.new_zeros(lists.num_dense, width)
            self.pull = lists.dense_rows.new_zeros(len(lists.items), width)
            self.mean = torch.zeros_like(self.pull)
            self.everywhere = lists.dense_rows.new_zeros(1, width)

    def slots(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(self.ids, ids.clamp_min(0) if self.lists.is_static else ids)

    def add(
        self,
        block: Block,
        e: torch.Tensor,
        list_factor: torch.Tensor,
        label_grad: torch.Tensor,
        of_mean: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Take in a block. All but ``e [n, S + m + K_b]`` are ``[n]`` and hold the weights of
        positions; the weights of dense candidates are still to be applied. ``of_mean`` are the
        control variate's pull and its mean's gradient."""
        lists, rest, h = self.lists, self.rest, block.h
        dense, own = e[:, : lists.num_dense], e[:, lists.num_dense :]
        own_by_group = [group.pad(own[group.rows]) for group in block.groups]
        if self.with_hidden:
            in_place = isinstance(block.at, slice)
            out = self.hidden[block.at] if in_place else torch.empty_like(h)
            torch.mm(dense, self.weighted_rows, out=out)
            for group, padded in zip(block.groups, own_by_group):
                back = torch.bmm(padded, block.item_rows[group.buckets])
                out[group.rows] += group.unpad(back)
            out *= list_factor.unsqueeze(1)
            out.addcmul_(label_grad.unsqueeze(1), block.label_rows)
            if of_mean is not None and rest is not None:
                tail_rows, mean_rows = (
                    rest.of(table, block.bucket) for table in (rest.tail_rows, rest.mean_rows)
                )
                pull, mean_grad = of_mean
                out.addcmul_(pull.unsqueeze(1), tail_rows, value=-1.0)
                out.addcmul_(mean_grad.unsqueeze(1), mean_rows)
            if not in_place:
                self.hidden[block.at] = out
        if self.with_head:
            h = h[:, self.num_frozen :]
            scaled = h * list_factor.unsqueeze(1)
            self.dense.addmm_(dense.T, scaled)
            for group, padded in zip(block.groups, own_by_group):
                rows = torch.bmm(padded.mT, group.pad(scaled[group.rows]))
                slots = self.slots(block.items[group.buckets].reshape(-1))
                self.rows.index_add_(0, slots, rows.flatten(0, 1))
            torch.mul(h, label_grad.unsqueeze(1), out=scaled)
            self.rows.index_add_(0, self.slots(block.y), scaled)
            for table, coefficient in zip((self.pull, self.mean), of_mean or ()):
                if len(table) == 1:
                    table[0] += coefficient @ h
                else:
                    table.index_add_(0, block.bucket, coefficient.unsqueeze(1) * h)

    def finish(self) -> None:
        """Bring the dense lists and the mean's gradient to the rows.

        Every row of W has its share ``mean_k / |R|`` in the mean of each bucket k, except the
        masked and the shared ones, and except a bucket's own items in that bucket's mean.
        """
        if not self.with_head:
            return
        lists, rest = self.lists, self.rest
        self.dense *= lists.dense_weight.unsqueeze(1)
        if rest is not None:
            self.dense[lists.tail].addmm_(rest.tail_weight.T, self.pull, alpha=-1.0)
        self.rows.index_add_(0, self.slots(lists.dense), self.dense)
        if rest is not None and not self.sparse:
            share = self.mean / rest.size.clamp_min(1.0).unsqueeze(1)
            self.everywhere = share.sum(dim=0, keepdim=True)
            of_ids = self.everywhere
            if lists.head.masked is not None:
                of_ids = of_ids * lists.takes_part(self.ids).unsqueeze(1)
            self.rows += of_ids
            certain = slice(lists.num_shared)
            back = lists.dense_weight[certain].unsqueeze(1) * self.everywhere
            self.rows.index_add_(0, self.slots(lists.dense[certain]), back, alpha=-1.0)
            if lists.bucket_size:
                bucket = torch.arange(len(lists.items), device=lists.items.device).unsqueeze(1)
                holds = share.new_zeros(len(self.ids), len(share))
                holds[self.slots(lists.items), bucket.expand_as(lists.items)] = 1.0
                self.rows.addmm_(holds, share, alpha=-1.0)
        if not lists.is_static:
            elsewhere = int(torch.count_nonzero(self.ids[:1] < 0))
            self.ids, self.rows = self.ids[elsewhere:], self.rows[elsewhere:]
        else:
            self.rows = self.rows[self.slots(self.ids)]

    def of_inputs(self, factor: torch.Tensor | None = None) -> OfInputs:
        """Gradients of hidden states (``[N, D]``, in the dtype of the computation), weight,
        low_rank and bias, times ``factor`` (None: 1), which is worked into the sums."""
        grad_hidden, of_head = None, [None] * 3
        if self.with_hidden:
            grad_hidden = self.hidden[:-1]
            if factor is not None:
                grad_hidden.mul_(factor)
        if self.with_head:
            rows, everywhere = self.rows, self.everywhere
            if factor is not None:
                rows, everywhere = rows.mul_(factor), everywhere * factor
            of_head = self.lists.head.gradients(
                self.needs.head, self.ids, rows, everywhere, sparse=self.sparse
            )
            self._add_expected(of_head, factor)
        return grad_hidden, *of_head

    def _add_expected(
        self, of_head: list[torch.Tensor | None], factor: torch.Tensor | None
    ) -> None:
        """Add to the head's gradients what is expected of every row."""
        lists = self.lists
        expected, of_positions = self.expected, lists.positions.weight
        if expected is None or of_positions is None:
            return
        of_positions = of_positions if factor is None else of_positions * factor
        rows = expected.rows(lists.head, of_positions)[:, self.num_frozen :]
        for gradient, part in zip(of_head, lists.head.split(self.needs.head, rows)):
            if gradient is not None and part is not None:
                add_product(gradient, expected.share, part)
