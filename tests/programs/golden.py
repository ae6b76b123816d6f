"""Twenty training steps of every objective and option, for the golden files of `tests/golden`.

A case is an objective, its options and what surrounds it: a bias with a soft cap, ignored rows, a
low-rank operand. A step's record is its loss and the norm of each gradient. Run as a program, this
writes the golden files anew, which is right only where a change of results is wanted and explained:

    python tests/programs/golden.py

With a head cut over two ranks it is a program of `support.launch`, whose first rank leaves its
records in FOLDER/ranks.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.launch import run, start

from sce_lm import LogitTransform, objectives
from sce_lm.distributed import own_rows, vocab_parallel_loss

FOLDER = Path(__file__).resolve().parents[1] / "golden"
STEPS = 20
VOCAB, WIDTH, POSITIONS, RANK = 600, 16, 48, 3
LEARNING_RATE = 0.2
BUCKETS = {
    "num_buckets": 4,
    "bucket_candidates": 32,
    "shared_frequent": 16,
    "tail_candidates": 64,
}
TAIL = {"num_buckets": 0, "shared_frequent": 16, "tail_candidates": 64}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "exact": {"name": "exact"},
    "sce default": {"name": "sce"},
    "sce buckets": {"name": "sce", **BUCKETS},
    "sce tail": {"name": "sce", **TAIL},
    "sce plain tail": {"name": "sce", **TAIL, "control_variate": False},
    "sce control variate": {"name": "sce", **BUCKETS, "control_variate": True},
    "sce no tail": {"name": "sce", **BUCKETS, "tail_candidates": 0, "control_variate": False},
    "sce uniform": {"name": "sce", **TAIL, "prior": "uniform"},
    "sce gradient": {"name": "sce", **TAIL, "prior": "gradient"},
    "sce gradient rows": {"name": "sce", **TAIL, "prior": "gradient", "row_control_variate": True},
    "sce bucket rows": {"name": "sce", **BUCKETS, "row_control_variate": True},
    "sce labels first": {"name": "sce", **TAIL, "labels_first": 5},
    "sce sparse": {"name": "sce", **BUCKETS, "sparse_grad": True},
    "sce target": {"name": "sce", **TAIL, "target_relative_error": 0.2},
    "published": {"name": "sce", "published": True, "bucket_candidates": 64},
    "published random": {"name": "sce", "published": True, "bucket_candidates": 64, "mix": False},
    "published mean": {"name": "sce", "published": True, "bucket_candidates": 64, "reduce": "mean"},
    "sampled_softmax": {"name": "sampled_softmax", "num_negatives": 64},
    "sampled_softmax log_uniform": {
        "name": "sampled_softmax",
        "num_negatives": 64,
        "proposal": "log_uniform",
        "sampling": "distinct",
    },
    "sampled_softmax priority": {
        "name": "sampled_softmax",
        "num_negatives": 64,
        "sampling": "priority",
    },
    "sampled_softmax rows": {"name": "sampled_softmax", "num_negatives": 16, "shared": False},
    "in_batch": {"name": "in_batch"},
    "in_batch streaming": {"name": "in_batch", "frequency": "streaming"},
    "in_batch plain": {"name": "in_batch", "logq": False},
    "bce": {"name": "bce", "num_negatives": 4},
    "gbce": {"name": "gbce", "num_negatives": 32},
    "gbce shared": {"name": "gbce", "num_negatives": 32, "shared": True},
    "bir": {"name": "bir"},
    "bir importance": {"name": "bir", "correction": "importance"},
    "xir": {"name": "xir"},
    "xir importance": {"name": "xir", "correction": "importance"},
    "kernel": {"name": "kernel", "num_negatives": 16},
    "kernel shared": {"name": "kernel", "num_negatives": 64, "shared": True},
    "rece": {"name": "rece"},
    "rece rounds": {"name": "rece", "rounds": 2},
}
"""What stays, by a name of its own: the arguments of `objectives.get`."""

ON_RANKS = ("exact", "sce buckets", "sce tail", "sce plain tail", "sce uniform")
"""Those that are also run on a head cut over two ranks."""


@dataclass(frozen=True)
class Surroundings:
    """What stands around the objective."""

    post: LogitTransform = field(default_factory=LogitTransform)
    has_bias: bool = False
    has_low_rank: bool = False
    ignored: bool = False


SURROUNDINGS = {
    "plain": Surroundings(),
    "bias and cap": Surroundings(LogitTransform(1.3, 8.0), has_bias=True),
    "low rank": Surroundings(has_bias=True, has_low_rank=True),
    "ignored": Surroundings(ignored=True),
}


Records = list[dict[str, float]]


def train(
    options: dict[str, Any],
    around: Surroundings,
    dtype: torch.dtype,
    *,
    checkpointed: bool = False,
    by_rank: bool = False,
) -> Records:
    """The records of `STEPS` steps of gradient descent from a seeded start.

    Args:
        checkpointed: hidden states and loss are computed again in the backward pass.
        by_rank: this process has its own rows of the head, and the records are of these.
    """
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    draft = {"body": normal(WIDTH, WIDTH, scale=WIDTH**-0.5), "weight": normal(VOCAB, WIDTH)}
    if around.has_bias:
        draft["bias"] = normal(VOCAB, scale=0.5) + 0.3
    if around.has_low_rank:
        draft["low_rank_a"] = normal(RANK, WIDTH, scale=WIDTH**-0.5)
        draft["low_rank_b"] = normal(VOCAB, RANK, scale=0.2)
    if by_rank:
        rows = own_rows(VOCAB)
        draft |= {name: draft[name][rows] for name in ("weight", "bias", "low_rank_b")}
    parameters = {name: value.to(dtype).requires_grad_() for name, value in draft.items()}
    objective = objectives.get(**options)
    head = {"post": around.post}
    if by_rank:
        call, head = vocab_parallel_loss, {**head, "vocab_size": VOCAB, "config": objective}
    else:
        call = objective

    def loss_of(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(inputs @ parameters["body"])
        if around.has_low_rank:
            hidden = torch.cat([hidden, 2.0 * hidden @ parameters["low_rank_a"].T], dim=-1)
        return call(
            hidden,
            parameters["weight"],
            labels,
            bias=parameters.get("bias"),
            low_rank=parameters.get("low_rank_b"),
            **head,
        )

    records = []
    for _ in range(STEPS):
        inputs = normal(POSITIONS, WIDTH).to(dtype)
        share = torch.rand(POSITIONS, generator=generator, dtype=torch.float64)
        labels = (share**3 * VOCAB).long()
        if around.ignored:
            labels[::5] = -100
        if checkpointed:
            loss = checkpoint(loss_of, inputs, labels, use_reentrant=False)
        else:
            loss = loss_of(inputs, labels)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        objective.end_step(torch.device("cpu"))
        record = {"loss": loss.item()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                assert parameter.grad is not None, name
                gradient = parameter.grad.to_dense()
                record[name] = gradient.norm().item()
                parameter -= LEARNING_RATE * gradient
                parameter.grad = None
        records.append(record)
    return records


def golden_file(name: str) -> Path:
    return FOLDER / f"{name}.json"


def read(name: str) -> dict[str, Records]:
    """The records of each case of a golden file."""
    return {
        case: [dict(zip(found["names"], step)) for step in found["steps"]]
        for case, found in json.loads(golden_file(name).read_text()).items()
    }


def write(path: Path, records: dict[str, Records]) -> None:
    """A line a case: names once, then a row a step."""
    lines = [
        f"{json.dumps(case)}: "
        + json.dumps({"names": list(steps[0]), "steps": [list(step.values()) for step in steps]})
        for case, steps in records.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def case_name(around: str, objective: str) -> str:
    return f"{around}: {objective}"


def train_all(dtype: torch.dtype) -> dict[str, Records]:
    return {
        case_name(around, name): train(options, SURROUNDINGS[around], dtype)
        for around in SURROUNDINGS
        for name, options in OBJECTIVES.items()
    }


def train_on_ranks() -> None:
    """One of the processes of `run(golden.__file__, 2, folder, ["ranks"])`."""
    rank, _, folder = start()
    records = {
        name: train(OBJECTIVES[name], SURROUNDINGS["low rank"], torch.float64, by_rank=True)
        for name in ON_RANKS
    }
    if rank == 0:
        write(folder / "ranks.json", records)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        train_on_ranks()
    else:
        FOLDER.mkdir(exist_ok=True)
        for chosen in (torch.float64, torch.float32):
            write(golden_file(str(chosen).removeprefix("torch.")), train_all(chosen))
        with tempfile.TemporaryDirectory() as temporary:
            run(__file__, 2, Path(temporary), ["ranks"])
            golden_file("ranks").write_text((Path(temporary) / "ranks.json").read_text())
