"""A device that is not here: tensors without memory, on "meta" or as fakes of another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode

DEVICES = ("meta", "cuda")
CARD = "lazy"
"""A device whose fakes a build for CPUs can slice and differentiate, as it cannot those of "cuda":
autograd looks for no stream there."""


@contextmanager
def absent(device: str) -> Iterator[None]:
    """Inside, tensors can be made on ``device``; whatever reads one, or meets another device,
    raises."""
    if device == "meta":
        yield
        return
    with FakeTensorMode():
        try:
            torch.empty(2, device=device, requires_grad=True)[:1].sum().backward()
        except RuntimeError:
            pytest.skip("this build of torch cannot slice or differentiate fakes of a card")
        yield
