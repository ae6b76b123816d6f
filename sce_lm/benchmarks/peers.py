"""What a user would pick instead: losses of torch and of other packages, all of them exact."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from sce_lm.benchmarks.loss_cost import Loss, stock
from sce_lm.ops.logits import LogitTransform
from sce_lm.training.measure import available_bytes


@dataclass(frozen=True)
class Peer:
    """A loss that is not ours."""

    label: str
    """In tables and plots."""
    build: Callable[[LogitTransform, str], Loss]
    """From logit transform and device ("cpu", "cuda") to the loss."""
    logit_buffers: dict[str, int] = dataclasses.field(default_factory=dict)
    """Device and number of ``[N, V]`` fp32 buffers that are alive at once; 0 where not named."""
    package: str | None = None
    """The package that pip installs; None: torch itself."""
    module: str | None = None
    """What it is imported as."""
    function: str | None = None
    """Of ``torch.nn.functional``, which older versions lack."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """Where it runs."""

    @property
    def version(self) -> str:
        """Of the package, or of torch."""
        return version(self.package) if self.package else torch.__version__

    def unavailable(self, num_logits: int, device: str) -> str | None:
        """Why it cannot run on ``num_logits = N·V`` logits, and what to do; None if it can."""
        if self.module and importlib.util.find_spec(self.module) is None:
            return f"not installed: pip install {self.package}"
        if self.function and not hasattr(torch.nn.functional, self.function):
            return f"torch {torch.__version__} has no {self.function}; install a newer one"
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        free = free_memory(device)
        needed = 4 * num_logits * self.logit_buffers.get(device, 0)
        if needed > free:
            return f"needs {needed / 2**30:.0f} GiB for its logits; {free / 2**30:.0f} GiB are free"
        return None


def _compiled_stock(post: LogitTransform, device: str) -> Loss:
    return torch.compile(stock(post))


def _torch_fused(post: LogitTransform, device: str) -> Loss:
    _refuse_soft_cap(post, "torch.nn.functional.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(hidden_states, weight, labels, bias=None):
        return torch.nn.functional.linear_cross_entropy(
            hidden_states * post.scale,
            weight,
            labels,
            linear_bias=_scaled(bias, post),
            options=options,
        )

    return loss


def _cut_cross_entropy(post: LogitTransform, device: str) -> Loss:
    cut_cross_entropy = importlib.import_module("cut_cross_entropy")
    implementation = "cce" if device == "cuda" else "torch_compile"

    def loss(hidden_states, weight, labels, bias=None):
        if bias is not None:
            raise ValueError("cut_cross_entropy.linear_cross_entropy is not given a bias here.")
        return cut_cross_entropy.linear_cross_entropy(
            _scaled(hidden_states, post),
            weight,
            labels,
            softcap=post.soft_cap,
            impl=implementation,
        )

    return loss


def _liger(post: LogitTransform, device: str) -> Loss:
    liger = importlib.import_module("liger_kernel.transformers")
    fused = liger.LigerFusedLinearCrossEntropyLoss(softcap=post.soft_cap)

    def loss(hidden_states, weight, labels, bias=None):
        return fused(weight, _scaled(hidden_states, post), labels, _scaled(bias, post))

    return loss


def _quack(post: LogitTransform, device: str) -> Loss:
    _refuse_soft_cap(post, "quack's chunked_linear_cross_entropy")
    quack = importlib.import_module("quack.linear_cross_entropy")

    def loss(hidden_states, weight, labels, bias=None):
        if bias is not None:
            raise ValueError("quack's chunked_linear_cross_entropy takes no bias.")
        return quack.chunked_linear_cross_entropy(_scaled(hidden_states, post), weight, labels)

    return loss


def _trl(post: LogitTransform, device: str) -> Loss:
    kernels = importlib.import_module("trl.kernels")
    temperature, classes_a_chunk = 1.0, 32768  # as in trl.trainer.utils.add_fused_lm_head

    def loss(hidden_states, weight, labels, bias=None):
        log_probs = kernels.ChunkedLogProbFunction.apply(
            hidden_states,
            weight,
            bias,
            labels,
            temperature,
            classes_a_chunk,
            post.soft_cap,
            post.scale,
            ("log_probs",),
        )[0]
        return -log_probs.mean()

    return loss


def _refuse_soft_cap(post: LogitTransform, name: str) -> None:
    if post.soft_cap is not None:
        raise ValueError(f"{name} has no soft cap, and this model's is {post.soft_cap}.")


def _scaled(tensor: Any, post: LogitTransform) -> Any:
    """For losses that know no scale: scale·(h·w + b) = (scale·h)·w + scale·b."""
    return tensor if tensor is None or post.scale == 1.0 else tensor * post.scale


STOCK = "stock"
"""Plain cross-entropy over logits that are kept, as transformers computes it."""

PEERS = {
    STOCK: Peer("stock", lambda post, device: stock(post), {"cpu": 3, "cuda": 3}),
    "compile": Peer("torch.compile of stock", _compiled_stock, {"cpu": 2, "cuda": 2}),
    "torch_fused": Peer("F.linear_cross_entropy", _torch_fused, function="linear_cross_entropy"),
    "cce": Peer(
        "Cut Cross-Entropy",
        _cut_cross_entropy,
        {"cpu": 2},
        "cut-cross-entropy",
        "cut_cross_entropy",
    ),
    "liger": Peer("Liger", _liger, {}, "liger-kernel", "liger_kernel", devices=("cuda",)),
    "quack": Peer("quack, chunked", _quack, {}, "quack-kernels", "quack", devices=("cuda",)),
    "trl": Peer("TRL, chunked", _trl, {}, "trl", "trl"),
}
"""By the name in a method's specification."""


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on a device."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else available_bytes()
