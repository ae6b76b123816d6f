"""Every loss once more, in straight-line PyTorch that reads like its equations.

These keep ``[N, V]`` logits and leave gradients to autograd; the fast paths are tested against
them. Each returns ``[N]`` losses, whatever ``positions.weight`` says, of a head without a low-rank
operand.
"""

from __future__ import annotations

import torch

from sce_lm.ops.candidates import Candidates
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions


def raw_logits(head: Head, hidden):
    """x_tj = h_t·w_j + b_j."""
    x = hidden @ head.weight.T
    return x if head.bias is None else x + head.bias


def exact_reference(head: Head, positions: Positions):
    """log Z_t - s_ty, Z_t = sum_j exp s_tj."""
    s = head.post(raw_logits(head, positions.hidden))
    return torch.logsumexp(s, dim=1) - s.gather(1, positions.labels[:, None]).squeeze(1)


def candidate_reference(head: Head, positions: Positions, candidates: Candidates):
    """log Zhat_t - s_ty with the lists' inclusion weights written out for all V classes."""
    labels, post = positions.labels, head.post
    x = raw_logits(head, positions.hidden)
    s = post(x)
    rows = torch.arange(len(labels))

    certain = torch.zeros_like(x, dtype=torch.bool)  # in S or in the position's own bucket
    certain[:, candidates.shared] = True
    if candidates.bucket_items is not None:
        certain.scatter_(1, candidates.bucket_items[candidates.bucket_of], True)
    sampled = torch.zeros_like(x)  # exp(c) for the tail
    sampled[:, candidates.tail] = candidates.tail_log_weights.to(x.dtype).exp()
    sampled = sampled.masked_fill(certain, 0.0)
    inclusion = sampled + certain
    if candidates.bucket_log_weights is not None and candidates.bucket_items is not None:
        own = torch.zeros(len(candidates.bucket_items), x.shape[1], dtype=x.dtype)
        weights = candidates.bucket_log_weights.to(x.dtype).exp()
        own = own.scatter_add_(1, candidates.bucket_items, weights)[candidates.bucket_of]
        inclusion = torch.where(own > 0, own, inclusion)
    inclusion[rows, labels] = 1.0  # the label is never sampled

    if not candidates.control_variate:
        z = (inclusion * s.exp()).sum(dim=1)
    else:
        rest = ~certain
        size = rest.sum(dim=1)
        mean = (x * rest).sum(dim=1) / size.clamp_min(1)
        g_mean, slope = post(mean), post.slope(post(mean))
        slope = slope[:, None] if torch.is_tensor(slope) else slope
        phi = (s - g_mean[:, None]).exp() - 1 - slope * (x - mean[:, None])
        z_rest = g_mean.exp() * (size + (inclusion * rest * phi).sum(dim=1))
        z_rest = torch.where(size > 0, z_rest, 0.0)
        seen = (s.exp() * rest * (inclusion > 0)).sum(dim=1)
        if post.soft_cap is not None:
            z_rest = torch.where(z_rest < seen, seen, z_rest)
        z = (s.exp() * certain).sum(dim=1) + z_rest
    return z.log() - s[rows, labels]


def published_sce_reference(
    head: Head, positions: Positions, centers, bucket_positions, bucket_candidates, *, reduce="max"
):
    """SCE as in arXiv 2409.18721; also returns the ``[N]`` coverage mask (loss 0 outside it)."""
    hidden, labels = positions.hidden, positions.labels
    with torch.no_grad():
        in_bucket = torch.topk(centers @ hidden.T, bucket_positions).indices  # [n_b, b_x]
        items = torch.topk(raw_logits(head, centers), bucket_candidates).indices
    losses = [[] for _ in labels]
    for bucket, own in zip(in_bucket, items):
        for t in bucket.tolist():
            s = head.post(raw_logits(head, hidden[t : t + 1]))[0]
            label = s[labels[t]]
            others = s[own].masked_fill(own == labels[t], -torch.inf)
            losses[t].append(torch.logsumexp(torch.cat([others, label[None]]), dim=0) - label)
    covered = torch.tensor([bool(found) for found in losses])
    combine = torch.amax if reduce == "max" else torch.mean
    zero = hidden.new_zeros(())
    return torch.stack([combine(torch.stack(f), 0) if f else zero for f in losses]), covered


def position_reference(head: Head, positions: Positions, ids, log_weights, *, keep_label=False):
    """log(exp s_ty + sum_k exp(c_tk + s_tk)) - s_ty over each position's ids ``[N, K]``."""
    s = head.post(raw_logits(head, positions.hidden))
    labels = positions.labels[:, None]
    label = s.gather(1, labels)
    terms = s.gather(1, ids) + log_weights
    if not keep_label:
        terms = terms.masked_fill(ids == labels, -torch.inf)
    return torch.logsumexp(torch.cat([label, terms], dim=1), dim=1) - label.squeeze(1)


def binary_reference(head: Head, positions: Positions, ids, *, beta=1.0):
    """-(log sigmoid(s_ty)^beta + sum_k log(1 - sigmoid(s_tk))) / (1 + K), negatives that are the
    label left out of the sum."""
    p = torch.sigmoid(head.post(raw_logits(head, positions.hidden)))
    labels = positions.labels[:, None]
    positive = (p.gather(1, labels) ** beta).log().squeeze(1)
    negative = torch.log(1 - p.gather(1, ids)).masked_fill(ids == labels, 0.0).sum(dim=1)
    return -(positive + negative) / (1 + ids.shape[1])


def kernel_reference(hidden, weight, *, alpha, power=2, bias=None, scale=1.0):
    """log q_tj of kernel-based sampling, ``[N, V]``: alpha·x^power + 1, normalised over classes."""
    mass = alpha * (scale * raw_logits(Head(weight, bias=bias), hidden)) ** power + 1
    return torch.log(mass / mass.sum(dim=1, keepdim=True))


def rece_reference(head: Head, positions: Positions, of_position, of_class, reach):
    """RECE as in arXiv 2408.02354, given each round's chunks of positions ``[R, N]`` and classes
    ``[R, V]``: a class met k times has k terms exp(s - log k)."""
    s = head.post(raw_logits(head, positions.hidden))
    labels = positions.labels
    met = (of_position[:, :, None] - of_class[:, None, :]).abs() <= reach  # [R, N, V]
    met.scatter_(2, labels[None, :, None].expand(len(met), -1, 1), False)
    k = met.sum(dim=0).to(s.dtype)
    terms = torch.where(met, s - k.log(), -torch.inf).permute(1, 0, 2).flatten(1)
    label = s.gather(1, labels[:, None])
    return torch.logsumexp(torch.cat([label, terms], dim=1), dim=1) - label.squeeze(1)
