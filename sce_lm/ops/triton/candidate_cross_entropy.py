r"""Candidate cross-entropy by kernels: the equations of :mod:`sce_lm.ops.candidate_cross_entropy`.

Forward: one launch a list (shared, tail, buckets) leaves each position's sums, which are put
together here. Backward: for each list, or as many of its columns as a bounded workspace holds,

    logit_gradient    G = the list's logits once more, turned into gradients      [N, C]
    hidden_gradient   dH += G · W[ids]                                            one product
    row_gradient      slots = G' · H                                              one product

then :mod:`~sce_lm.ops.triton.merge_rows` sums slots and labels into rows of W. In all four products
of ``2·N·K·d`` operations, no logits kept between the passes, every output element written by one
program a launch, and the order of launches fixed: the result has the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sce_lm.ops.candidate_cross_entropy import CandidateLoss
from sce_lm.ops.candidates import Candidates, ExpectedRows
from sce_lm.ops.gradient_memory import add_product
from sce_lm.ops.head import Head, sparse_gradient
from sce_lm.ops.logits import LogitTransform
from sce_lm.ops.positions import LossTerms, Positions
from sce_lm.ops.triton.backward_pass import backward_pass, normalised
from sce_lm.ops.triton.candidate_epilogue import Control, candidate_epilogue
from sce_lm.ops.triton.candidate_forward import list_sums
from sce_lm.ops.triton.candidate_lists import CandidateTensors, candidate_lists
from sce_lm.ops.triton.control_variate import Rest, in_lists, mean_gradient, rest_of
from sce_lm.ops.triton.hidden_gradient import RowTerm
from sce_lm.ops.triton.logit_gradient import LossGradient
from sce_lm.ops.triton.merge_rows import merge_rows, touched_rows
from sce_lm.ops.triton.row_dot import row_dot
from sce_lm.ops.triton.row_gradient import RowTarget
from sce_lm.ops.triton.supported import contiguous, losses_supported

candidate_cross_entropy_supported = losses_supported


def candidate_cross_entropy(
    head: Head, positions: Positions, candidates: Candidates
) -> CandidateLoss:
    """As :func:`sce_lm.ops.candidate_cross_entropy.candidate_cross_entropy`, for inputs that
    :func:`candidate_cross_entropy_supported` accepts."""
    c = candidates
    labels, bias = contiguous(positions.labels, head.bias)
    shared, tail, items, bucket_of = contiguous(c.shared, c.tail, c.bucket_items, c.bucket_of)
    share = centers = center_of = None
    if c.expected is not None:
        share, centers, center_of = c.expected
    losses, log_partition, num_clamped, *_ = _forward(
        positions.hidden.to(head.weight.dtype),
        head.weight,
        bias,
        labels,
        shared,
        tail,
        candidates.tail_log_weights,
        items,
        bucket_of,
        candidates.bucket_log_weights,
        candidates.row_sum,
        head.masked,
        share,
        centers,
        center_of,
        head.post.scale,
        head.post.soft_cap,
        candidates.control_variate,
        candidates.sparse_grad,
        positions.terms.z_loss,
        positions.terms.label_smoothing,
    )
    return CandidateLoss(positions.reduce(losses), log_partition, num_clamped)


@torch.library.custom_op("sce_lm::candidate_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    shared: Tensor,
    tail: Tensor,
    tail_log_weights: Tensor,
    bucket_items: Tensor | None,
    bucket_of: Tensor | None,
    bucket_log_weights: Tensor | None,
    row_sum: Tensor | None,
    masked: Tensor | None,
    share: Tensor | None,
    centers: Tensor | None,
    center_of: Tensor | None,
    scale: float,
    soft_cap: float | None,
    control_variate: bool,
    sparse_grad: bool,
    z_loss: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, log Zhat and the number of clamped positions; then what the backward pass needs, by
    position: the gradient at the label's raw logit, ``pull``, the gradient at the mean logit, and
    which were clamped; and the mean rows and size of R. The last five are empty without control
    variate."""
    post, terms = LogitTransform(scale, soft_cap), LossTerms(z_loss, label_smoothing)
    tensors = CandidateTensors(
        shared, tail, tail_log_weights, bucket_items, bucket_of, bucket_log_weights, masked
    )
    label_raw = row_dot(hidden, weight, labels, bias)
    lists = candidate_lists(tensors, len(hidden))
    sums = {
        members.kind: list_sums(
            hidden, weight, bias, labels, members, post, control=control_variate
        )
        for members in lists
    }
    control, size, mean_rows = None, labels.new_empty(0), label_raw.new_empty(0)
    if control_variate:
        rest = rest_of(weight, bias, tensors, labels, row_sum)
        size, mean_rows = rest.size, rest.rows
        mean = row_dot(hidden, rest.rows, rest.bucket_of, rest.bias)
        control = Control(size, mean, in_lists(labels, tensors, len(weight)))
    found = candidate_epilogue(
        label_raw,
        [of_list for kind, of_list in sums.items() if kind != "tail"],
        sums.get("tail"),
        control,
        post,
        terms,
    )
    loss, log_z, grad_label, pull, grad_mean, clamped = found
    return loss, log_z, clamped.sum(), grad_label, pull, grad_mean, clamped, mean_rows, size


@_forward.register_fake
def _(hidden, weight, bias, labels, shared, tail, tail_log_weights, bucket_items, *options):
    def new(*shape, dtype=torch.float32):
        return hidden.new_empty(shape, dtype=dtype)

    count = len(hidden)
    result = (new(count), new(count), new(dtype=torch.int64), new(count))
    if not options[-4]:
        nothing = (new(0), new(0), new(0, dtype=torch.int8), new(0), new(0, dtype=torch.int64))
        return *result, *nothing
    means = 1 if bucket_items is None else len(bucket_items)
    rows = new(means, hidden.shape[1])
    size = new(dtype=torch.int64)
    return *result, new(count), new(count), new(count, dtype=torch.int8), rows, size


@torch.library.custom_op("sce_lm::candidate_backward", mutates_args=())
def _backward(
    grad_loss: Tensor,
    log_partition: Tensor,
    grad_label: Tensor,
    pull: Tensor,
    grad_mean: Tensor,
    clamped: Tensor,
    mean_rows: Tensor,
    size: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    shared: Tensor,
    tail: Tensor,
    tail_log_weights: Tensor,
    bucket_items: Tensor | None,
    bucket_of: Tensor | None,
    bucket_log_weights: Tensor | None,
    masked: Tensor | None,
    share: Tensor | None,
    centers: Tensor | None,
    center_of: Tensor | None,
    scale: float,
    soft_cap: float | None,
    control_variate: bool,
    sparse_grad: bool,
    z_loss: float,
    label_smoothing: float,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias, empty where they are not needed; with
    ``sparse_grad`` the weight's are rows ``[E, d]``, one for each place in a list and each label,
    and their ids come last; rows of an id add up."""
    tensors = CandidateTensors(
        shared, tail, tail_log_weights, bucket_items, bucket_of, bucket_log_weights, masked
    )
    lists = candidate_lists(tensors, len(hidden))
    ratio, factor = normalised(grad_loss)
    grad_label = grad_label * ratio
    rest = None
    if control_variate:
        of = torch.zeros_like(labels) if bucket_of is None else bucket_of
        rest = Rest(size, mean_rows, None, of)
        grad_mean = grad_mean * ratio
    loss = LossGradient(
        log_partition,
        LossTerms(z_loss).of_partition(ratio, log_partition),
        pull if rest is not None else None,
        clamped if rest is not None and soft_cap is not None else None,
    )
    passed_on = None
    if rest is not None and needs_weight and not sparse_grad:
        passed_on = mean_gradient(hidden, grad_mean, rest)

    targets: list[RowTarget | None] = [None] * len(lists)
    num_slots = sum(members.num_slots for members in lists) if needs_weight else 0
    slots = hidden.new_empty(num_slots, hidden.shape[1], dtype=torch.float32)
    bias_slots = None if bias is None else slots.new_empty(num_slots)
    if needs_weight:
        sizes = [members.num_slots for members in lists]
        rows = slots.split(sizes)
        biases = [None] * len(lists) if bias_slots is None else bias_slots.split(sizes)
        for i, members in enumerate(lists):
            offset = (None, None) if passed_on is None else passed_on.offsets(members.kind)
            targets[i] = RowTarget(rows[i], biases[i], *offset)
    grad_hidden = backward_pass(
        hidden,
        weight,
        bias,
        labels,
        LogitTransform(scale, soft_cap),
        list(zip(lists, targets)),
        loss,
        factor,
        label=RowTerm(grad_label, weight, labels),
        mean=None if rest is None else RowTerm(grad_mean, rest.rows, rest.bucket_of),
        needs_hidden=needs_hidden,
    )
    none = hidden.new_empty(0)
    grad_hidden = none if grad_hidden is None else grad_hidden
    if not needs_weight:
        return grad_hidden, none.clone(), none.clone(), labels.new_empty(0)

    # As they are in the lists: the empty places of the shared one name no row.
    listed = [
        shared if members.kind == "shared" else members.ids.reshape(-1)
        for members in lists
        if members.ids is not None
    ]
    touched = touched_rows([*listed, labels])
    everywhere = bias_everywhere = None
    if passed_on is not None:
        everywhere, bias_everywhere = passed_on.share.sum(dim=0), passed_on.bias_share.sum()
    if sparse_grad:  # rows of 0 for what repeats, and for empty places
        ids = touched.ids.clamp_min(0)
        grad_weight = weight.new_zeros(len(ids), weight.shape[1])
    else:
        ids = labels.new_empty(0)
        fill = weight.new_zeros(weight.shape[1]) if everywhere is None else everywhere * factor
        grad_weight = fill.to(weight.dtype).repeat(len(weight), 1)
    grad_bias = none.clone()
    if bias is not None:
        fill = factor.new_zeros(()) if bias_everywhere is None else bias_everywhere * factor
        grad_bias = fill.to(bias.dtype).repeat(len(bias))
    merge_rows(
        slots,
        touched,
        hidden,
        grad_label,
        factor,
        grad_weight,
        bias_slots=bias_slots,
        bias_out=None if bias is None else grad_bias,
        everywhere=everywhere,
        bias_everywhere=bias_everywhere,
        compact=sparse_grad,
    )
    if masked is not None and everywhere is not None and bias_everywhere is not None:
        # The mean does not reach them; merging has brought it to those that are labels.
        is_label = torch.zeros(len(weight), dtype=torch.bool, device=labels.device)
        is_label.index_fill_(0, labels, True)
        merged = masked[is_label[masked]]
        labelled = grad_weight[merged] - (everywhere * factor).to(weight.dtype)
        grad_weight.index_fill_(0, masked, 0.0).index_copy_(0, merged, labelled)
        if bias is not None:
            labelled = grad_bias[merged] - (bias_everywhere * factor).to(bias.dtype)
            grad_bias.index_fill_(0, masked, 0.0).index_copy_(0, merged, labelled)
    if share is not None and centers is not None and center_of is not None:
        expected = ExpectedRows(share, centers, center_of)
        rows = expected.rows(Head(weight, None, bias), grad_loss)
        add_product(grad_weight, share, rows[:, : weight.shape[1]])
        if bias is not None:
            add_product(grad_bias, share, rows[:, -1])
    return grad_hidden, grad_weight, grad_bias, ids


@_backward.register_fake
def _(grad_loss, *arguments):
    hidden, weight, bias, labels = arguments[7:11]
    sparse_grad, _, _, needs_hidden, needs_weight = arguments[-5:]
    shared, tail, _, items = arguments[11:15]
    touched = len(labels) + len(shared) + len(tail) + (0 if items is None else items.numel())
    rows = labels.new_empty(touched if sparse_grad and needs_weight else 0)
    shape = (len(rows) if sparse_grad else len(weight), weight.shape[1])
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(shape if needs_weight else 0),
        hidden.new_empty(0) if bias is None or not needs_weight else torch.empty_like(bias),
        rows,
    )


def _save(ctx, inputs, output):
    ctx.options = inputs[15:]
    ctx.save_for_backward(*inputs[:10], *inputs[11:15], output[1], *output[3:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad_loss, *_):
    everything = ctx.saved_tensors  # may be read only once under gradient checkpointing
    tensors, saved = everything[:14], everything[14:]
    weight, bias = tensors[1:3]
    needs_hidden, needs_row, needs_bias = ctx.needs_input_grad[:3]
    sparse_grad = ctx.options[-3]
    grad_hidden, grad_weight, grad_bias, ids = _backward(
        grad_loss, *saved, *tensors, *ctx.options, needs_hidden, needs_row or needs_bias
    )
    if sparse_grad and needs_row:
        grad_weight = sparse_gradient(weight, ids, grad_weight, is_coalesced=False)
    return (
        grad_hidden if needs_hidden else None,
        grad_weight if needs_row else None,
        grad_bias if bias is not None and needs_bias else None,
        *[None] * 18,
    )


_forward.register_autograd(_differentiate, setup_context=_save)
