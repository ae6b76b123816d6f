"""What is answered about logits that are not there: exactly, with gradients, and without forming
them.

A record of logits s, of log-probabilities or of probabilities p is asked for

    logsumexp(s)                                log Z
    gather, take_along_dim, indices of classes  s_i,  s_i - log Z,  exp(s_i - log Z)
    argmax, max, amax, topk                     of s, likewise
    sum, mean over the classes                  of s, log p;  of p·log p: -H;  of p·s: E_p[s]
    cross_entropy, nll_loss                     log Z - s_y, label smoothing by the sum of s

and one stream over the vocabulary finds all of it, once for rows that are asked several things
(:mod:`sce_lm.hf.asked_logits`). ``ANSWERS`` is all that decides what is answered; what is not in
there, or what an answer declines, forms the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from sce_lm.hf.asked_logits import AskedLogits, Unanswered
from sce_lm.hf.logit_operations import named, result_dtype
from sce_lm.hf.recorded_logits import Reading, full_index
from sce_lm.hf.reduced_rows import Found

LOG_PROBABILITIES, PROBABILITIES = "log_softmax", "softmax"
ANY = (None, LOG_PROBABILITIES, PROBABILITIES)
"""Forms of a record (:class:`~sce_lm.hf.recorded_logits.Reading`); None: logits."""

# An answer gets the function and its arguments, whose names are torch's.


def answer(func: Callable, args: Any, kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives of lazy logits, or NotImplemented where they must be formed."""
    found = ANSWERS.get(func)
    if found is None:
        return NotImplemented
    try:
        bound = inspect.signature(found).bind(func, *args, **kwargs)
    except TypeError:  # `out` or the like
        return NotImplemented
    try:
        return found(*bound.args, **bound.kwargs)
    except Unanswered:
        return NotImplemented


def _logsumexp(func, input, dim, keepdim=False):
    asked = AskedLogits(input, None)
    asked.check_dim(dim)
    asked.check_bare()
    dtype = result_dtype(torch.logsumexp, input, -1)
    return asked.give(_reduced(asked.found().log_partition, keepdim), dtype)


def _reduced(column: torch.Tensor, keepdim: bool) -> torch.Tensor:
    return column if keepdim else column.squeeze(-1)


def _gather(func, input, dim, index, *, sparse_grad=False):
    asked = AskedLogits(input, *ANY)
    asked.check_dim(dim)
    asked.check_bare(factor=False)
    if index.shape[:-1] != input.shape[:-1] or index.dtype != torch.int64 or not index.numel():
        raise Unanswered
    if index.shape[-1] == 1:
        asked.ask_objective(index)
    return asked.give(asked.values(asked.at(index)), input.dtype)


def _take_along_dim(func, input, indices, dim=None):
    """``gather`` of indices that may be the same along leading dimensions."""
    if indices.dim() != input.dim() or any(
        size not in (1, of_input) for size, of_input in zip(indices.shape[:-1], input.shape)
    ):
        raise Unanswered
    return _gather(func, input, dim, indices.expand(*input.shape[:-1], -1))


def _getitem(func, x, index):
    """``x[..., ids]`` after integers and slices, and ``x[rows, ids]``, one row for each id."""
    asked = AskedLogits(x, *ANY)
    entries = index if isinstance(index, tuple) else (index,)
    full = full_index(entries, x.dim())
    asked.check_bare(factor=False)
    if full is None:
        raise Unanswered
    *places, ids = map(_as_ids, full)
    if not isinstance(ids, torch.Tensor):
        raise Unanswered
    ids = torch.where(ids < 0, ids + x.shape[-1], ids)
    if all(isinstance(place, torch.Tensor) for place in places) and places:
        *places, ids = torch.broadcast_tensors(*places, ids)
        return asked.give(asked.values_at(tuple(places), ids), x.dtype)
    if any(isinstance(place, torch.Tensor) for place in places):
        raise Unanswered
    if any(place != slice(None) for place in places):
        return x[(*places, slice(None))][..., ids]
    flat = ids.reshape(-1).expand(*x.shape[:-1], -1)
    return asked.give(asked.values(asked.at(flat)).view(*x.shape[:-1], *ids.shape), x.dtype)


def _as_ids(entry: Any) -> Any:
    """An integer, a slice or a tensor of ids."""
    if isinstance(entry, list) and all(type(i) is int for i in entry):
        entry = torch.tensor(entry)
    if isinstance(entry, torch.Tensor):
        is_index = entry.dtype == torch.int64 and entry.dim() > 0 and entry.numel() > 0
    else:
        is_index = isinstance(entry, slice) or type(entry) is int
    if not is_index:
        raise Unanswered
    return entry


def _argmax(func, input, dim=None, keepdim=False):
    asked = AskedLogits(input, *ANY)
    asked.check_dim(dim)
    asked.check_bare()
    indices = asked.found(top_k=1).top_indices
    assert indices is not None
    return asked.give(_reduced(indices, keepdim), torch.int64)


def _max(func, input, dim=None, keepdim=False):
    asked = AskedLogits(input, *ANY)
    asked.check_dim(dim)
    asked.check_bare()
    values, indices = _top(asked, asked.found(top_k=1), 1)
    return torch.return_types.max((_reduced(values, keepdim), _reduced(indices, keepdim)))


def _amax(func, input, dim=(), keepdim=False):
    return _max(func, input, dim, keepdim).values


def _top(asked: AskedLogits, found: Found, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    assert found.top_values is not None
    assert found.top_indices is not None
    values = asked.values(found.top_values[..., :k], found.log_partition)
    indices = asked.give(found.top_indices[..., :k], torch.int64)
    return asked.give(values, asked.x.dtype), indices


def _topk(func, input, k, dim=-1, largest=True, sorted=True):
    asked = AskedLogits(input, *ANY)
    asked.check_dim(dim)
    asked.check_bare()
    if not largest or not isinstance(k, int) or not 0 < k <= input.shape[-1] // 4:
        raise Unanswered
    return torch.return_types.topk(_top(asked, asked.found(top_k=k), k))


def _sum(func, input, dim=None, keepdim=False, *, dtype=None):
    asked = AskedLogits(input, *ANY)
    asked.check_dim(dim)
    dtype = dtype or result_dtype(torch.sum, input, -1)
    if not dtype.is_floating_point:
        raise Unanswered
    total = _total(asked) * asked.read.factor
    total = total / input.shape[-1] if func.__name__ == "mean" else total
    return asked.give(_reduced(total, keepdim), dtype)


def _total(asked: AskedLogits) -> torch.Tensor:
    """``[..., 1]`` sum over the classes of what the record is a multiple of."""
    read = asked.read
    if read.times is not None:
        other = Reading.of_steps(read.times._steps)
        assert other is not None
        found, forms = asked.found(entropy=True), {read.form, other.form}
        assert found.entropy is not None
        if forms == {PROBABILITIES, LOG_PROBABILITIES}:
            return -found.entropy * other.factor
        return (found.log_partition - found.entropy) * other.factor
    if read.form == PROBABILITIES:
        raise Unanswered
    found = asked.found(logit_sum=True)
    assert found.logit_sum is not None
    if read.form is None:
        return found.logit_sum
    return found.logit_sum - asked.x.shape[-1] * found.log_partition


def _cross_entropy(func, *args, **kwargs):
    given = _arguments_of(func, args, kwargs)
    return _loss(func, AskedLogits(given.input, None), given)


def _nll_loss(func, *args, **kwargs):
    given = _arguments_of(func, args, kwargs)
    asked = AskedLogits(given.input, LOG_PROBABILITIES)
    asked.check_bare(factor=False)
    return _loss(func, asked, given)


def _arguments_of(func: Callable, args: tuple, kwargs: dict[str, Any]) -> SimpleNamespace:
    """What a function of `torch.nn.functional` is called with, under its own names."""
    try:
        bound = inspect.signature(func).bind(*args, **kwargs)
    except TypeError:  # torch says what is wrong
        raise Unanswered from None
    bound.apply_defaults()
    return SimpleNamespace(**bound.arguments)


def _of_one_row(x: torch.Tensor, loss: Callable) -> torch.Tensor:
    return loss(x, torch.zeros(1, dtype=torch.int64, device=x.device))


def _loss(func: Callable, asked: AskedLogits, given: SimpleNamespace) -> torch.Tensor:
    """``w_y · (log Z - (1 - eps) s_y - eps/V · sum_j s_j)``, times the factor of a record of
    log-probabilities, reduced as torch does."""
    labels, weight, reduction = given.target, given.weight, given.reduction
    label_smoothing = getattr(given, "label_smoothing", 0.0)  # nll_loss has none
    x, vocab_size = asked.x, asked.x.shape[-1]
    if (
        given.size_average is not None  # the arguments that `reduction` stands for now
        or given.reduce is not None
        or x.dim() > 2
        or labels.shape != x.shape[:-1]
        or labels.dtype != torch.int64
        or reduction not in ("none", "mean", "sum")
        or (weight is not None and weight.requires_grad)
        or (label_smoothing and weight is not None)
    ):
        raise Unanswered
    labels = labels.to(x._hidden.device)
    valid = labels != given.ignore_index
    labels = labels.masked_fill(~valid, 0)
    logit = asked.at(labels.unsqueeze(-1), logit_sum=bool(label_smoothing)).squeeze(-1)
    found = asked.found(logit_sum=bool(label_smoothing))
    losses = found.log_partition.squeeze(-1) - (1.0 - label_smoothing) * logit
    if label_smoothing:
        assert found.logit_sum is not None
        losses = losses - (label_smoothing / vocab_size) * found.logit_sum.squeeze(-1)
    losses = losses * asked.read.factor
    shares = valid.to(losses.dtype)
    if weight is not None:
        shares = shares * weight.to(shares)[labels]
    losses = (losses * shares).masked_fill(~valid, 0.0)
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses = losses / shares.sum()
    return asked.give(losses, result_dtype(_of_one_row, given.input, func))


def _answers() -> dict[Callable, Callable]:
    rows = [
        (_logsumexp, [*named("logsumexp"), torch.special.logsumexp]),
        (_gather, named("gather")),
        (_take_along_dim, named("take_along_dim")),
        (_getitem, [torch.Tensor.__getitem__]),
        (_argmax, named("argmax")),
        (_max, named("max")),
        (_amax, named("amax")),
        (_topk, named("topk")),
        (_sum, named("sum", "mean")),
        (_cross_entropy, [functional.cross_entropy]),
        (_nll_loss, [functional.nll_loss]),
    ]
    return {function: found for found, functions in rows for function in functions}


ANSWERS = _answers()
"""What is answered, by which function."""
