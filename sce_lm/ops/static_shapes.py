"""Where a call must not wait: on a device, no shape and no branch may depend on data.

A wait empties the queue of work that the host has put together, and a shape that depends on data
forbids graphs and fusion. So ignored positions stay where they are with the weight 0, repeated
classes stay in sorted lists with the weight 0, and what the host need not know stays on the device.
On a CPU there is no queue, and leaving such places out is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_everywhere: ContextVar[bool] = ContextVar("everywhere", default=False)


def needs_static_shapes(device: torch.device) -> bool:
    """Whether code on tensors of this device depends on data in no shape and no branch."""
    return device.type != "cpu" or _everywhere.get()


@contextmanager
def static_shapes() -> Iterator[None]:
    """Inside, that holds on a CPU too, so that the results of the two ways can be compared."""
    kept = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(kept)
