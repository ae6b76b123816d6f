"""Training a small model on one process or several (gloo), with the same global batches.

Run as a program it is one process of several: ``processes.py RANK WORLD_SIZE FOLDER NAME ...``
trains each named case and leaves ``FOLDER/NAME.pt`` with losses and parameters, and the sharded
checkpoint ``FOLDER/NAME``.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.launch import start
from support.models import VOCAB_SIZE, tiny_batch, tiny_model

from sce_lm import SCEConfig, apply_sce, objectives
from sce_lm.hf import objective_of

STEPS, ROWS = 5, 8
EMPTY_ROWS = slice(4, 8)
"""One of two processes, or two of four, have no label; the others unequal numbers of them."""
COVERING = SCEConfig(
    num_buckets=2, bucket_candidates=20, shared_frequent=10, tail_candidates=VOCAB_SIZE
)
"""Every class is a candidate, so that the loss is exact cross-entropy."""


@dataclass(frozen=True)
class Case:
    """A model and what it is wrapped in."""

    model: str
    engine: str = "ddp"
    """Or "fsdp", "zero3", or "tp": transformers' tensor parallelism, where all see all rows."""
    objective: str | None = "exact"
    """Or "sce", covering the vocabulary; None: the stock loss."""
    own_head: bool = False
    """FSDP2 shards the head by itself, and not with the embedding."""
    bf16: bool = False
    resumes: str | None = None
    """The case whose sharded checkpoint, of any number of processes, it goes on from."""


CASES = {
    "ddp": Case("gemma2"),
    "ddp_sce": Case("phi", objective="sce"),
    "fsdp_untied": Case("llama", "fsdp"),
    "fsdp_tied": Case("gemma3", "fsdp"),
    "fsdp_head": Case("phi", "fsdp", own_head=True),
    "fsdp_sce": Case("gemma3", "fsdp", objective="sce"),
    "fsdp_head_sce": Case("granite", "fsdp", objective="sce", own_head=True),
    "fsdp_bf16": Case("llama", "fsdp", bf16=True),
    "fsdp_bf16_stock": Case("llama", "fsdp", objective=None, bf16=True),
    "fsdp_tied_resumed": Case("gemma3", "fsdp", resumes="fsdp_tied"),
    "fsdp_head_sce_resumed": Case(
        "granite", "fsdp", objective="sce", own_head=True, resumes="fsdp_head_sce"
    ),
    "tp": Case("llama", "tp"),
    "tp_sce": Case("llama", "tp", objective="sce"),
    "tp_tied": Case("gemma3", "tp"),
    "tp_tied_sce": Case("gemma3", "tp", objective="sce"),
    "tp_bias_sce": Case("phi", "tp", objective="sce"),
    "zero3": Case("phi", "zero3"),
    "zero3_tied": Case("gemma3", "zero3"),
    "zero3_sce": Case("llama", "zero3", objective="sce"),
}


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """Rows with different numbers of labels; half of them have none."""
    batch = tiny_batch(step, batch=ROWS, length=12)
    for row in range(ROWS):
        batch["labels"][row, : row + step] = -100
    batch["labels"][EMPTY_ROWS] = -100
    return batch


def stock_model(case: Case, seed: int = 0) -> torch.nn.Module:
    """With heads that four processes can share."""
    return tiny_model(case.model, seed, num_key_value_heads=4)


def build(case: Case, folder: Path | None = None) -> torch.nn.Module:
    """The model with its objective; for tensor parallelism it goes through a folder."""
    model = stock_model(case)
    if case.engine == "tp" and folder is not None:
        model = tensor_parallel(model, folder / case.model)
    if case.objective is None:
        return model
    return apply_sce(model, COVERING if case.objective == "sce" else objectives.get("exact"))


def tensor_parallel(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    from transformers.distributed import DistributedConfig

    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(tp_size=dist.get_world_size())
    return type(model).from_pretrained(folder, distributed_config=config).train()


def wrap(model: torch.nn.Module, case: Case, world_size: int) -> torch.nn.Module:
    if case.engine == "tp":
        return model
    if case.engine == "ddp":
        return DistributedDataParallel(model)
    if case.engine == "zero3":
        return zero3(model)
    options = {
        "mesh": dist.init_device_mesh("cpu", (world_size,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16 if case.bf16 else None),
    }
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if case.own_head:
        fully_shard(model.lm_head, **options)
    return fully_shard(model, **options)


def zero3(model: torch.nn.Module) -> torch.nn.Module:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def train(model: torch.nn.Module, rank: int = 0, world_size: int = 1) -> list[float]:
    """Global losses of some SGD steps. Each process takes its rows of the batch, and its share of
    the sum of losses over all the labels there are; engines average gradients over processes."""
    share = ROWS // world_size
    rows = slice(rank * share, (rank + 1) * share)
    has_optimizer = hasattr(model, "step")  # DeepSpeed's engine
    # Sharded parameters and whole ones cannot be updated by one fused call.
    options = {"lr": 0.1, "foreach": False}
    optimizer = None if has_optimizer else torch.optim.SGD(model.parameters(), **options)
    losses = []
    for step in range(STEPS):
        batch = global_batch(step)
        items = (batch["labels"][:, 1:] != -100).sum()
        mine = {name: values[rows] for name, values in batch.items()}
        loss = model(**mine, num_items_in_batch=items).loss
        if optimizer is None:
            model.backward(loss * world_size)
            model.step()
        else:
            (loss * world_size).backward()
            optimizer.step()
            optimizer.zero_grad()
        total = loss.detach().clone().float()
        if world_size > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    return losses


def full_parameters(model: torch.nn.Module, case: Case) -> dict[str, torch.Tensor]:
    if case.engine == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.module.parameters())):
            return {name: value.clone() for name, value in model.module.state_dict().items()}
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def main() -> None:
    rank, world_size, folder = start()
    warnings.filterwarnings("error", message=".*without the objective.*")
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}  # which DeepSpeed reads
    os.environ.update({name: str(value) for name, value in ranks.items()}, DS_ACCELERATOR="cpu")
    for name in sys.argv[4:]:
        case = CASES[name]
        model = wrap(build(case, folder), case, world_size)
        if case.resumes is not None:
            state = get_model_state_dict(model)
            dcp.load(state, checkpoint_id=str(folder / case.resumes))
            set_model_state_dict(model, state)
        losses = train(model) if case.engine == "tp" else train(model, rank, world_size)
        if case.objective == "sce":
            has_labels = case.engine == "tp" or rank * ROWS // world_size < EMPTY_ROWS.start
            assert objective_of(model).state.step == (STEPS if has_labels else 0)
        if case.engine == "fsdp":
            dcp.save(get_model_state_dict(model), checkpoint_id=str(folder / name))
        parameters = full_parameters(model, case)
        if rank == 0:
            torch.save((losses, parameters), folder / f"{name}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
