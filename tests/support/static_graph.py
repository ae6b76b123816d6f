"""A training step's loss on a card that is not here: what it asks the card to do, counted.

Tensors are fakes: they have shapes and no numbers, so whatever reads one on
the host (``.item()``, ``nonzero``, ``unique``, an index by a mask) raises, and so does an operation
on tensors of two devices.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from support.devices import CARD, absent
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from sce_lm.objectives import call, labels

VIEWS = {
    *("view", "_unsafe_view", "as_strided", "expand", "t", "transpose", "permute", "slice"),
    *("select", "unsqueeze", "squeeze", "split", "split_with_sizes", "detach", "alias", "unbind"),
    *(
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "lift_fresh",
        "_reshape_alias",
        "diagonal",
    ),
    *("new_empty_strided", "unfold", "is_same_size"),
}
"""Operations that ask nothing of the card."""


class Noise(torch.Generator):
    """Random numbers of the card, in name: a build for CPUs has no generator there."""

    device = property(lambda self: torch.device(CARD))  # pyright: ignore


class Counts(TorchDispatchMode):
    """Operations on tensors of the card by name, those inside our operators too, and launches."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.operations.total() + self.launches.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "sce_lm":  # the operator's own code, in place of its fake
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if namespace != "aten":
            return func(*args, **kwargs)
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if name not in VIEWS:
            self.operations[name] += 1
        return func(*args, **kwargs)

    def launch(self, kernel, arguments) -> None:
        """Take down what would be launched."""
        assert all(x.device.type == CARD for x in arguments if torch.is_tensor(x)), kernel
        self.launches[kernel.__name__] += 1


@contextmanager
def a_card(*head_sizes: int) -> Iterator[Counts]:
    """Inside, tensors can be made on it, and what is asked of it is counted. Labels for heads
    of these sizes have been looked at before."""
    counts = Counts()
    seen = {(torch.device(CARD), size) for size in head_sizes}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(labels, "looked_at", seen))
        stack.enter_context(mock.patch.object(call, "draw_seed", side_effect=itertools.count()))
        stack.enter_context(mock.patch.object(call, "stream", return_value=Noise()))
        stack.enter_context(mock.patch.object(torch, "autocast", return_value=nullcontext()))
        stack.enter_context(_launches(counts))
        stack.enter_context(absent(CARD))
        stack.enter_context(counts)
        yield counts


def _launches(counts: Counts):
    try:
        from triton.runtime.jit import JITFunction
    except ImportError:
        return nullcontext()
    from sce_lm.ops.triton.configurations import ARCHITECTURES, compiling_for

    def run(kernel, *arguments, grid, warmup, **options):
        counts.launch(kernel, arguments)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(JITFunction, "run", run))
    stack.enter_context(mock.patch.object(torch.cuda, "device_of", return_value=nullcontext()))
    stack.enter_context(compiling_for(ARCHITECTURES["sm_90"]))
    return stack
