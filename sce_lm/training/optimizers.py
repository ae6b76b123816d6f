"""Optimisers of a run: AdamW or Adam, and for large catalogues a sparse one for the item matrix.

A step of training meets a few thousand rows of the item matrix W `[V, d]` (the input embedding and
the output head, tied or not): the ids that went in, the labels and the candidates. A dense
optimiser moves all V·d numbers all the same. With an objective that has `sparse_grad` and an input
embedding with `sparse=True`, W's gradient is a sparse tensor of just those rows from its making to
its use, and nothing in a step is as large as W:

    backward    autograd adds the sparse gradients of embedding, head and accumulated batches by
                putting their rows one after the other: a row that is met twice stands there twice
    average     rows are summed where their ids are equal (coalesced), and over the processes
    clip        the norm is taken over the coalesced rows and all dense gradients together
    step        only those rows and their part of the state move

State: `sparse_adam` 8 bytes a number of W (two moments), `rowwise_adagrad` 4 bytes an item.
Weight decay and momentum would move every row at every step: decay is left out for W, and the
moments of `sparse_adam` stand still while a row is not met.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from sce_lm.objectives import Objective
from sce_lm.training.train_config import DENSE, TrainConfig

DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""Ways to run in which every process holds the whole of every parameter."""


def check_optimizer(name: str, objective: Objective, distributed: DistributedType) -> None:
    """Raise ValueError unless the optimiser takes the gradients that this run will have."""
    sparse_grad = getattr(objective.config, "sparse_grad", None)
    if name in DENSE:
        if sparse_grad:
            raise ValueError(
                f"objective_options sets sparse_grad and the optimizer is {name}, which takes "
                "dense gradients; set optimizer to sparse_adam or rowwise_adagrad, or leave "
                "sparse_grad out."
            )
        return
    if sparse_grad is None:
        raise ValueError(
            f"The optimizer {name} takes row-sparse gradients and the objective "
            f"{objective.name!r} has none; choose optimizer adamw, or an objective with "
            "sparse_grad, such as sce."
        )
    if not sparse_grad:
        raise ValueError(
            f"The optimizer {name} takes row-sparse gradients; add sparse_grad: true to "
            "objective_options, or choose optimizer adamw."
        )
    if distributed not in DATA_PARALLEL:
        raise ValueError(
            f"The optimizer {name} was started under {distributed.value}; it needs one process, or "
            "plain data parallelism; choose another accelerate configuration, or optimizer adamw."
        )


def make_row_sparse(model: PreTrainedModel) -> list[nn.Parameter]:
    """Have the input embedding give sparse gradients, and return what is trained by rows.

    That is the input embedding's matrix and the output head's: one parameter where they are tied.
    DistributedDataParallel, which cannot tell that a head's gradient is sparse, is told to leave
    them to :func:`average_rows`.

    Raises ValueError if the input embedding is no nn.Embedding.
    """
    embedding: Any = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"The input embedding of {type(model).__name__} is a {type(embedding).__name__}, and "
            "only nn.Embedding gives row-sparse gradients; choose optimizer adamw without "
            "sparse_grad, or another model."
        )
    embedding.sparse = True
    head: Any = model.get_output_embeddings()
    matrices: list[Any] = [embedding.weight]
    if head.weight is not embedding.weight:
        matrices.append(head.weight)
    by_name = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in by_name if parameter in set(matrices)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return matrices


def build_optimizer(
    model: PreTrainedModel, config: TrainConfig, matrices: Sequence[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimiser that `config` names, its `matrices` (of :func:`make_row_sparse`) by rows.

    Weight decay is AdamW's, or of "adam" in the gradient, for matrices alone: vectors and what is
    trained by rows have none.
    """
    dense = [p for p in model.parameters() if p.requires_grad and p not in set(matrices)]
    betas = (config.betas[0], config.betas[1])
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    adam = kind(
        [
            {"params": [p for p in dense if p.dim() >= 2]},
            {"params": [p for p in dense if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=betas,
        weight_decay=config.weight_decay,
    )
    if config.optimizer in DENSE:
        return adam
    rate = config.sparse_learning_rate or config.learning_rate
    if config.optimizer == "sparse_adam":
        return CombinedOptimizer(adam, torch.optim.SparseAdam(matrices, lr=rate, betas=betas))
    return CombinedOptimizer(adam, RowwiseAdagrad(matrices, lr=rate))


class RowwiseAdagrad(torch.optim.Optimizer):
    r"""AdaGrad with one accumulator a row, for matrices with row-sparse gradients.

    For each row r of the gradient g, an average taken over its d entries:

        sum_r += mean(g_r²)
        w_r   -= lr · g_r / (sqrt(sum_r) + eps)

    as in DLRM and FBGEMM ("exact row-wise AdaGrad"). Rows without gradient, and rows whose gradient
    is 0, do not move. A row's step shrinks with what the row has met, not with the number of steps,
    so rare items keep a large one.

    Args:
        params: fp32 or fp64 matrices `[V, d]`; their state is `[V]` in the same dtype.
        lr: step size; a row's first step has this root mean square.
        eps: keeps the quotient finite.

    Raises TypeError for another dtype, in which the sums would stop growing, and RuntimeError in
    `step` for a dense gradient. A sparse gradient may name a row several times; its values are
    summed first.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.01, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.dtype not in (torch.float32, torch.float64):
                    raise TypeError(
                        f"RowwiseAdagrad got a {weight.dtype} parameter, in which small steps are "
                        "rounded away; keep it in float32."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the rows that have a gradient; a closure is evaluated first, its value returned."""
        loss = _evaluated(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if not weight.grad.is_sparse:
                    raise RuntimeError(
                        "RowwiseAdagrad got a dense gradient; it takes row-sparse ones, as "
                        "nn.Embedding(sparse=True) gives them."
                    )
                gradient = weight.grad.coalesce()
                rows, g = gradient.indices()[0], gradient.values()
                state = self.state[weight]
                if not state:
                    state["sum"] = weight.new_zeros(len(weight))
                total = state["sum"][rows] + g.square().mean(dim=1)
                state["sum"].index_copy_(0, rows, total)
                step = g / (total.sqrt() + group["eps"]).unsqueeze(1)
                weight.index_add_(0, rows, step, alpha=-group["lr"])
        return loss


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimisers, each with parameters of its own, that step and are saved as one.

    Groups and state are shared: the parts' own are parts of this one's. So a scheduler sees all
    groups, a gradient scaler skips the step of all or of none, and `state_dict` is an ordinary one.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What `load_state_dict` ends with: groups and state are new objects."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each part; a closure is evaluated first, its value returned."""
        loss = _evaluated(closure)
        for part in self.parts:
            part.step()
        return loss


def _evaluated(closure: Callable[[], Any] | None) -> Any:
    """What the step's closure returns, with gradients; None where there is none."""
    with torch.enable_grad():
        return closure() if closure is not None else None


@torch.no_grad()
def average_rows(matrices: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Coalesce the sparse gradients, and average them over the processes.

    Rows travel, not matrices: each process gathers the ids and values of all, in the order of the
    processes, so that all of them hold the same sums to the last bit. It is what
    DistributedDataParallel does with dense gradients, on any backend (NCCL reduces no sparse ones).

    Raises RuntimeError for a dense gradient.
    """
    for weight in matrices:
        gradient = weight.grad
        if gradient is None:
            continue
        if not gradient.is_sparse:
            raise RuntimeError(
                f"The item matrix {list(weight.shape)} got a dense gradient, although the "
                "objective's and the embedding's are sparse: the model uses it in another way (or "
                "computes its loss from full logits, which a warning would say); choose optimizer "
                "adamw without sparse_grad."
            )
        gradient = gradient.coalesce()
        if accelerator.num_processes > 1:
            ids: Any = accelerator.pad_across_processes(gradient.indices()[0], pad_index=-1)
            rows: Any = accelerator.pad_across_processes(gradient.values())
            ids, rows = accelerator.gather((ids, rows))
            is_row = ids >= 0
            ids, rows = ids[is_row], rows[is_row] / accelerator.num_processes
            gradient = torch.sparse_coo_tensor(
                ids.unsqueeze(0), rows, weight.shape, check_invariants=False
            ).coalesce()
        weight.grad = gradient


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """`torch.nn.utils.clip_grad_norm_` where some gradients are sparse: they count as the dense
    ones that they stand for.

    Returns:
        The 2-norm of all gradients together before clipping, 0-dim.
    """
    values = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    norm = get_total_norm(values)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(factor.to(value.device))
    return norm
