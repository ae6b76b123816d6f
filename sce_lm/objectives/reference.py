"""Every loss once more, in straight-line PyTorch that reads like its equations.

These keep ``[N, V]`` logits and leave gradients to autograd; the fast paths are tested against
them. ``hidden [N, d]``, ``weight [V, d]``, ``labels [N]`` without ignored ones, ``bias [V]`` or
None; each returns ``[N]`` losses.
"""

from __future__ import annotations

import torch

from sce_lm.ops.candidates import Candidates
from sce_lm.ops.logits import LogitTransform


def raw_logits(hidden, weight, bias=None):
    """x_tj = h_t·w_j + b_j."""
    return hidden @ weight.T if bias is None else hidden @ weight.T + bias


def exact_reference(hidden, weight, labels, *, bias=None, post=LogitTransform()):
    """log Z_t - s_ty, Z_t = sum_j exp s_tj."""
    s = post(raw_logits(hidden, weight, bias))
    return torch.logsumexp(s, dim=1) - s.gather(1, labels[:, None]).squeeze(1)


def candidate_reference(
    hidden, weight, labels, candidates: Candidates, *, bias=None, post=LogitTransform()
):
    """log Zhat_t - s_ty with the strata's inclusion weights written out for all V classes."""
    x = raw_logits(hidden, weight, bias)
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
    hidden,
    weight,
    labels,
    centers,
    bucket_positions,
    bucket_candidates,
    *,
    bias=None,
    post=LogitTransform(),
    reduce="max",
):
    """SCE as in arXiv 2409.18721; also returns the ``[N]`` coverage mask (loss 0 outside it)."""
    with torch.no_grad():
        in_bucket = torch.topk(centers @ hidden.T, bucket_positions).indices  # [n_b, b_x]
        items = torch.topk(raw_logits(centers, weight, bias), bucket_candidates).indices
    losses = [[] for _ in labels]
    for positions, own in zip(in_bucket, items):
        for t in positions.tolist():
            rows, y = weight[own], labels[t]
            s = post(raw_logits(hidden[t : t + 1], rows, None if bias is None else bias[own]))[0]
            s = s.masked_fill(own == y, -torch.inf)
            label_bias = None if bias is None else bias[y]
            label = post(raw_logits(hidden[t : t + 1], weight[y : y + 1], label_bias))[0]
            losses[t].append(torch.logsumexp(torch.cat([s, label]), dim=0) - label[0])
    covered = torch.tensor([bool(found) for found in losses])
    combine = torch.amax if reduce == "max" else torch.mean
    zero = hidden.new_zeros(())
    return torch.stack([combine(torch.stack(f), 0) if f else zero for f in losses]), covered


def position_reference(
    hidden,
    weight,
    labels,
    ids,
    log_weights,
    *,
    bias=None,
    post=LogitTransform(),
    keep_label=False,
):
    """log(exp s_ty + sum_k exp(c_tk + s_tk)) - s_ty over each position's ids ``[N, K]``."""
    s = post(raw_logits(hidden, weight, bias))
    label = s.gather(1, labels[:, None])
    terms = s.gather(1, ids) + log_weights
    if not keep_label:
        terms = terms.masked_fill(ids == labels[:, None], -torch.inf)
    return torch.logsumexp(torch.cat([label, terms], dim=1), dim=1) - label.squeeze(1)


def binary_reference(hidden, weight, labels, ids, *, beta=1.0, bias=None, post=LogitTransform()):
    """-(log sigmoid(s_ty)^beta + sum_k log(1 - sigmoid(s_tk))) / (1 + K), negatives that are the
    label left out of the sum."""
    p = torch.sigmoid(post(raw_logits(hidden, weight, bias)))
    positive = (p.gather(1, labels[:, None]) ** beta).log().squeeze(1)
    negative = torch.log(1 - p.gather(1, ids)).masked_fill(ids == labels[:, None], 0.0).sum(dim=1)
    return -(positive + negative) / (1 + ids.shape[1])


def kernel_reference(hidden, weight, *, alpha, power=2, bias=None, scale=1.0):
    """log q_tj of kernel-based sampling, ``[N, V]``: alpha·x^power + 1, normalised over classes."""
    mass = alpha * (scale * raw_logits(hidden, weight, bias)) ** power + 1
    return torch.log(mass / mass.sum(dim=1, keepdim=True))


def rece_reference(
    hidden, weight, labels, of_position, of_class, reach, *, bias=None, post=LogitTransform()
):
    """RECE as in arXiv 2408.02354, given each round's chunks of positions ``[R, N]`` and classes
    ``[R, V]``: a class met k times has k terms exp(s - log k)."""
    s = post(raw_logits(hidden, weight, bias))
    met = (of_position[:, :, None] - of_class[:, None, :]).abs() <= reach  # [R, N, V]
    met.scatter_(2, labels[None, :, None].expand(len(met), -1, 1), False)
    k = met.sum(dim=0).to(s.dtype)
    terms = torch.where(met, s - k.log(), -torch.inf).permute(1, 0, 2).flatten(1)
    label = s.gather(1, labels[:, None])
    return torch.logsumexp(torch.cat([label, terms], dim=1), dim=1) - label.squeeze(1)
