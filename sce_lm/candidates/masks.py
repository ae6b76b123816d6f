"""Masked classes: those that a bias keeps out of the softmax.

Padding, retired items and forbidden tokens get a bias of -inf, or of -1e4, -1e9 or ``finfo.min``
where -inf was feared. Their probability is 0, and all that they can do to a sampler is harm: a mean
over the catalogue that holds -1e9 is the mean of nothing, and what is drawn among them is lost. So
they are found once a call, by this one rule, and left out of everything that stands for the
catalogue: means, centroids, priors, lists and counts. A label among them keeps its loss, which is
infinite or huge, as without sampling.

    j is masked  if  scale·b_j = -inf  or  scale·b_j < max_k scale·b_k - FAR_BELOW

A soft cap takes every logit back to at least -soft_cap, so that a masked class still holds
``exp(-soft_cap)`` and none is left out. There a bias that is beyond the reach of any hidden state
is brought to where tanh is at its end already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from sce_lm.ops.logits import LogitTransform

FAR_BELOW = 500.0
"""Nats below the largest bias. ``exp`` is 0 from 104 on in fp32: the products of hidden states and
rows would have to make up for four times as much, and -1e4 counts as a mask down to a scale of
0.05."""
CAPS = 20.0
"""Soft caps beyond which tanh is 1, in fp64 too."""
_found_nothing = WeakTensorKeyDictionary()
"""Bias on a device to whether it was seen to mask nothing."""


def is_masked(
    bias: torch.Tensor,
    post: LogitTransform,
    largest_of: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor | None:
    """``[V]`` bool, or None under a soft cap. Does not wait for the device.

    Args:
        bias: ``[V]``.
        post: what follows it.
        largest_of: from the largest of these biases to that of the whole head, where its rows are
            cut over several processes.
    """
    if post.soft_cap is not None:
        return None
    s = bias.detach().to(torch.promote_types(bias.dtype, torch.float32)) * post.scale
    top = largest_of(s.amax())
    # A largest bias of +inf is no measure for the others.
    least = torch.where(top < torch.inf, top - FAR_BELOW, -torch.inf)
    return (s < least) | (s == -torch.inf)


def masks_nothing(bias: torch.Tensor, is_out: torch.Tensor) -> bool:
    """Whether this bias masks no class. Waits for the device at its first call; from then on the
    device stops the program if the answer was yes and is no longer.

    Args:
        is_out: ``[V]`` from :func:`is_masked`.
    """
    if bias not in _found_nothing:
        _found_nothing[bias] = not is_out.any()
    if _found_nothing[bias]:
        torch.ops.aten._assert_async.msg(
            ~is_out.any(),
            "bias masks classes and did not at its first call; set its masks before training, or "
            "give the head a new tensor for its bias.",
        )
    return _found_nothing[bias]


def within_reach(bias: torch.Tensor, post: LogitTransform) -> torch.Tensor:
    """``[V]`` finite biases with the same logits under a soft cap; without one, ``bias``."""
    if post.soft_cap is None:
        return bias
    limit = (FAR_BELOW + CAPS * post.soft_cap) / abs(post.scale)
    return bias.clamp(-limit, limit)
