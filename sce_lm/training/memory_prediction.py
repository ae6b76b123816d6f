"""What a run will hold in memory, told before it starts.

Parameters, their gradients and the optimiser's state follow from their sizes. What the backbone
keeps for its backward pass is counted on a part of a batch and scaled up. The loss is estimated:

    kept logits    3·4·N·V + 4·V·d        as transformers computes it: logits, softmax, gradient
    exact          block + 4·N·d + 4·V·d  streamed in blocks
    another        work + rows + 4·N·d + 4·V·d, or 8·d a row met where the gradient is row-sparse

with N positions, V classes and width d. Candidates are worked on in blocks of a fixed budget; the
rows that published SCE gathers for its buckets are held together with their gradient; BIR and XIR
weigh the labels of the batch for every position, 12·N·min(N, V); negatives of each position's own
take 64 bytes each. The estimates are within a factor of two of what was measured, which is what a
decision needs; kernel sampling's alone is far too low.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from sce_lm.candidates.center_softmax import CENTERS
from sce_lm.config import SCEConfig
from sce_lm.hf.adapter import lazy_logits
from sce_lm.objectives import Objective
from sce_lm.ops.exact_cross_entropy import BLOCK_ELEMENTS
from sce_lm.training.task import on_device

WORK = 16 * 2**20
"""What the losses over candidates hold besides rows of the head: blocks of logits and scores."""
OWN_WORK = 64
"""The same for each negative of each position, where every position has its own."""
PROBED_SHARE = 8
"""The backbone is tried on one part in so many of a batch's rows."""
MIB = 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device of one process."""

    parameters: int
    gradients: int
    """Of the parameters, without the head's, which is part of the loss."""
    optimizer: int
    backbone: int
    """What is kept for the backward pass of everything but the loss."""
    loss: int
    """The chosen objective, gradient of the head included."""
    exact_loss: int
    """Exact cross-entropy in its place, streamed."""
    stock_loss: int
    """Exact cross-entropy over kept logits in its place."""
    teacher: int
    """A model that is run beside it, and the divergence from it."""
    available: int
    """What is free now, parameters included."""

    @property
    def total(self) -> int:
        own = self.parameters + self.gradients + self.optimizer + self.backbone + self.loss
        return own + self.teacher

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    def to_mib(self) -> dict[str, int]:
        """Everything in MiB, for printing and JSON."""
        values = {**dataclasses.asdict(self), "total": self.total}
        return {name: round(value / MIB) for name, value in values.items()}

    def __str__(self) -> str:
        mib = {name: f"{value:,}" for name, value in self.to_mib().items()}
        teacher = f", teacher {mib['teacher']}" if self.teacher else ""
        return (
            f"Memory: about {mib['total']} MiB of {mib['available']} free: parameters "
            f"{mib['parameters']}, gradients {mib['gradients']}, optimiser {mib['optimizer']}, "
            f"backbone {mib['backbone']}, loss {mib['loss']} (exact {mib['exact_loss']}; over kept "
            f"logits, as transformers computes it, {mib['stock_loss']}){teacher}."
        )


def estimate_memory(
    model: PreTrainedModel,
    objective: Objective,
    batch: dict[str, torch.Tensor],
    optimizer: str,
    by_rows: Iterable[torch.nn.Parameter],
    teacher_bytes: int | None = None,
) -> MemoryEstimate:
    """What training will hold.

    Args:
        model: patched by ``apply_sce``, on the device where it will train.
        objective: what it trains with.
        batch: the first batch of one process.
        optimizer: its name in the configuration.
        by_rows: parameters that it trains by rows.
        teacher_bytes: of the parameters of a teacher; 0: its best classes are stored, None: there
            is none.
    """
    rows = {id(p) for p in by_rows}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    dense = sum(
        p.numel() * p.element_size()
        for p in model.parameters()
        if p.requires_grad and id(p) not in rows
    )
    state = 2 * dense
    for parameter in (p for p in model.parameters() if id(p) in rows):
        state += 4 * len(parameter) if optimizer == "rowwise_adagrad" else 8 * parameter.numel()
    output: Any = model.get_output_embeddings()
    head = output.weight
    positions = int((batch["labels"][:, 1:] != -100).sum())
    free = (
        torch.cuda.mem_get_info(model.device)[0]
        if model.device.type == "cuda"
        else psutil.virtual_memory().available
    )
    is_dense = head.requires_grad and id(head) not in rows
    # What the losses' figures have for the gradient of a head that has none.
    frozen = 0 if head.requires_grad else 4 * head.numel()
    return MemoryEstimate(
        parameters=parameters,
        gradients=dense - (head.numel() * head.element_size() if is_dense else 0),
        optimizer=state,
        backbone=_kept_bytes(model, batch),
        loss=loss_bytes(objective, positions, *head.shape) - frozen,
        exact_loss=_exact_bytes(positions, *head.shape) - frozen,
        teacher=0
        if teacher_bytes is None
        else teacher_bytes + _exact_bytes(positions, *head.shape) - frozen,
        stock_loss=12 * positions * head.shape[0] + 4 * head.numel() - frozen,
        available=free + parameters,
    )


def loss_bytes(objective: Objective, positions: int, vocab_size: int, width: int) -> int:
    """Peak of a forward and backward pass of a loss with a trainable head, over its inputs."""
    if objective.name == "exact":
        return _exact_bytes(positions, vocab_size, width)
    candidates = _gathered_rows(objective, positions, vocab_size, width)
    rows = 8 * candidates * width  # the rows and their gradient
    gradient = 4 * vocab_size * width
    if getattr(objective.config, "sparse_grad", False):
        gradient = 4 * (candidates + positions) * width
    if isinstance(objective.config, SCEConfig):
        gradient += _at_centers_bytes(objective.config, positions, vocab_size, width)
    own = getattr(objective.config, "shared", True) is False
    negatives = getattr(objective.config, "num_negatives", 0)
    work = OWN_WORK * positions * negatives if own else WORK
    if objective.name in ("bir", "xir"):
        work += 12 * positions * min(positions, vocab_size)
    return work + rows + gradient + 4 * positions * width


def _exact_bytes(positions: int, vocab_size: int, width: int) -> int:
    block = 4 * min(BLOCK_ELEMENTS, positions * vocab_size)
    return block + 4 * (positions + vocab_size) * width


def _at_centers_bytes(config: SCEConfig, positions: int, vocab_size: int, width: int) -> int:
    """Twice the softmax at the centres, where it is asked for."""
    sizes = config.resolve(positions, vocab_size, width=width)
    softmax = 8 * vocab_size * (sizes.num_buckets or CENTERS)
    has_softmax = sizes.row_control_variate or sizes.bucket_sampling == "priority"
    return softmax if has_softmax else 0


def _gathered_rows(objective: Objective, positions: int, vocab_size: int, width: int) -> int:
    """Rows of the head that are gathered in a call, about."""
    config = objective.config
    if isinstance(config, SCEConfig):
        sizes = config.resolve(positions, vocab_size, width=width)
        labels = min(positions, vocab_size) if config.shared_labels else 0
        buckets = sizes.num_buckets * sizes.bucket_candidates
        return labels + sizes.shared_frequent + sizes.tail_candidates + buckets
    negatives = getattr(config, "num_negatives", positions)
    return positions + (negatives if isinstance(negatives, int) else positions)


def _kept_bytes(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd keeps of the backbone for a whole batch."""
    num_rows = len(batch["labels"])
    probed = -(-num_rows // PROBED_SHARE)
    inputs = on_device({name: rows[:probed] for name, rows in batch.items()}, model.device)
    del inputs["labels"]
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    model.train()
    try:
        with lazy_logits(model), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            output = model(**inputs, use_cache=False)  # kept alive until its tensors are counted
    finally:
        model.train(was_training)
    del output
    return sum(kept.values()) * num_rows // probed
