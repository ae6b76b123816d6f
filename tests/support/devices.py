"""A device that is not here: tensors without memory, by the device "meta" or as fakes of "cuda"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses import FakeTensorMode

DEVICES = ("meta", "cuda")


@contextmanager
def absent(device: str) -> Iterator[None]:
    """Inside, tensors can be made on ``device``; whatever reads one, or meets another device,
    raises."""
    if device == "meta":
        yield
        return
    with FakeTensorMode():
        try:
            torch.empty(2, device="cuda")[:1]
        except RuntimeError:
            pytest.skip("this build of torch cannot slice fakes of a card that is not there")
        yield
