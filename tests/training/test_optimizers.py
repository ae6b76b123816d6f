"""Training by rows: each piece against its dense form, and no step as large as the item matrix."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from hypothesis import given
from hypothesis import strategies as st
from support.models import tiny_batch, tiny_model
from support.training import NO_DROPOUT, SMALL_SCE, figures, lm_fields
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import get_scheduler

from sce_lm import apply_sce, objectives
from sce_lm.training.loop import Run
from sce_lm.training.optimizers import (
    CombinedOptimizer,
    RowwiseAdagrad,
    average_rows,
    build_optimizer,
    check_optimizer,
    clip_grad_norm_,
    make_row_sparse,
)
from sce_lm.training.run_building import build_run
from sce_lm.training.train_config import TrainConfig

SPARSE = ("sparse_adam", "rowwise_adagrad")
EVERYTHING = {"num_buckets": 0, "tail_candidates": 10**6, "control_variate": False}
"""Options of SCE with the whole vocabulary as candidates: the loss is exact."""


def train(fields) -> Run:
    run = build_run(TrainConfig(**fields))
    run.train()
    return run


def random_rows(generator, vocab_size, width, count, scale=1.0) -> torch.Tensor:
    """A sparse gradient that names some rows several times."""
    ids = torch.randint(vocab_size, (1, count), generator=generator)
    values = torch.randn(count, width, generator=generator, dtype=torch.float64) * scale
    return torch.sparse_coo_tensor(ids, values, (vocab_size, width), check_invariants=True)


# -- the optimisers --------------------------------------------------------------------------------


@given(
    vocab_size=st.integers(1, 40),
    width=st.integers(1, 9),
    count=st.integers(0, 60),
    steps=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_rowwise_adagrad_is_its_equation(vocab_size, width, count, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = RowwiseAdagrad([weight], lr=0.3, eps=1e-3)
    w, total = start.clone(), torch.zeros(vocab_size, dtype=torch.float64)
    for _ in range(steps):
        weight.grad = random_rows(generator, vocab_size, width, count)
        g = weight.grad.to_dense()
        optimizer.step()
        for r in range(vocab_size):
            total[r] += (g[r] ** 2).mean()
            w[r] -= 0.3 * g[r] / (total[r].sqrt() + 1e-3)
    torch.testing.assert_close(weight.detach(), w, rtol=1e-12, atol=1e-12)


def test_rowwise_adagrad_keeps_one_number_a_row_and_refuses_what_it_cannot_do():
    weight = nn.Parameter(torch.ones(7, 3))
    optimizer = RowwiseAdagrad([weight])
    values = torch.tensor([[1.0] * 3, [0.0] * 3])
    weight.grad = torch.sparse_coo_tensor([[2, 5]], values, (7, 3), check_invariants=True)
    optimizer.step()
    assert optimizer.state[weight]["sum"].tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert (weight != 1).any(dim=1).tolist() == [False, False, True, False, False, False, False]
    weight.grad = torch.ones(7, 3)
    with pytest.raises(RuntimeError, match="got a dense gradient"):
        optimizer.step()
    with pytest.raises(TypeError, match="bfloat16 parameter"):
        RowwiseAdagrad([nn.Parameter(torch.ones(7, 3, dtype=torch.bfloat16))])


def combined(model: nn.Sequential) -> CombinedOptimizer:
    return CombinedOptimizer(
        torch.optim.AdamW(model[1].parameters(), lr=0.1),
        torch.optim.SparseAdam(model[0].parameters(), lr=0.2),
    )


def test_a_combined_optimizer_is_scheduled_and_restored_as_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4))
    optimizer = combined(model)

    def train_for(steps):
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.tensor([step % 9, 3])).square().sum().backward()
            optimizer.step()

    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=4, num_training_steps=9)
    train_for(3)
    scheduler.step()
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [0.1 / 4, 0.2 / 4]
    assert len(optimizer.state) == 3

    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train_for(4)
    expected = copy.deepcopy(model.state_dict())
    model.load_state_dict(before[0])
    optimizer = combined(model)
    optimizer.load_state_dict(before[1])
    assert optimizer.parts[1].param_groups[0]["lr"] == 0.2 / 4
    train_for(4)
    assert all(model.state_dict()[name].equal(expected[name]) for name in expected)


# -- clipping --------------------------------------------------------------------------------------


@given(
    limit=st.sampled_from([0.01, 1.0, 30.0, 1e9]),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    with_dense=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clipping_is_that_of_the_dense_gradients(limit, counts, with_dense, seed):
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(11, 5, dtype=torch.float64)) for _ in counts]
    for parameter, count in zip(parameters, counts):
        parameter.grad = random_rows(generator, 11, 5, count)
    if with_dense:
        parameters.append(nn.Parameter(torch.zeros(3, dtype=torch.float64)))
        parameters[-1].grad = torch.randn(3, generator=generator, dtype=torch.float64)
    parameters.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    dense = [nn.Parameter(p.detach().clone()) for p in parameters]
    for copied, parameter in zip(dense, parameters):
        copied.grad = None if parameter.grad is None else parameter.grad.to_dense().clone()

    norm = clip_grad_norm_(parameters, limit)
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(dense, limit).item(), rel=1e-12)
    for copied, parameter in zip(dense[:-1], parameters):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.to_dense(), copied.grad, rtol=1e-12, atol=0)
        assert parameter.grad.is_sparse == (parameter.dim() == 2)


# -- gradients of a model --------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_sparse_gradients_of_embedding_and_head_add_up_to_the_dense_ones(name, tied):
    """Over two accumulated batches, with ignored labels, and padding whose row has no gradient."""
    dense = tiny_model(name, tie_word_embeddings=tied)
    sparse = tiny_model(name, tie_word_embeddings=tied)
    apply_sce(dense, objectives.get("sce", **EVERYTHING))
    apply_sce(sparse, objectives.get("sce", **EVERYTHING, sparse_grad=True))
    matrices = make_row_sparse(sparse)
    assert len(matrices) == (1 if tied else 2)
    batches = [tiny_batch(seed) for seed in range(2)]
    batches[1]["input_ids"][0, :4] = 0
    for model in (dense, sparse):
        torch.manual_seed(0)
        for batch in batches:
            model(**batch).loss.backward()
    given = matrices[0].grad
    assert given is not None
    assert not given.is_coalesced()
    average_rows(matrices, Accelerator(cpu=True))
    assert all(m.grad is not None and m.grad.is_coalesced() for m in matrices)
    expected = dict(dense.named_parameters())
    for key, parameter in sparse.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.is_sparse == any(parameter is m for m in matrices)
        torch.testing.assert_close(
            parameter.grad.to_dense(), expected[key].grad, rtol=1e-4, atol=1e-6
        )


def test_a_dense_gradient_of_the_item_matrix_is_refused():
    model = tiny_model("llama", tie_word_embeddings=True)
    matrices = make_row_sparse(model)
    model(**tiny_batch()).loss.backward()  # without apply_sce: full logits
    with pytest.raises(RuntimeError, match="got a dense gradient"):
        average_rows(matrices, Accelerator(cpu=True))


def test_every_parameter_has_one_optimizer_and_rows_no_weight_decay():
    model = tiny_model("llama")
    matrices = make_row_sparse(model)
    config = TrainConfig(model="any", optimizer="sparse_adam", sparse_learning_rate=1)
    optimizer = build_optimizer(model, config, matrices)
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, model.parameters()))
    by_rows = optimizer.param_groups[-1]
    assert list(map(id, by_rows["params"])) == list(map(id, matrices))
    assert by_rows["lr"] == 1
    assert "weight_decay" not in by_rows
    assert [group["weight_decay"] for group in optimizer.param_groups[:-1]] == [0.1, 0.0]


# -- whole runs ------------------------------------------------------------------------------------


def test_sparse_adam_over_every_row_is_adam(corpus, tmp_path):
    """Each step meets every row here, so that being lazy makes no difference."""
    changes = {
        "model_config": {**lm_fields(corpus)["model_config"], **NO_DROPOUT},
        "objective": "sce",
        "weight_decay": 0.0,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
    }
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    fields = lm_fields(corpus, output_dir=str(dense), **changes)
    train({**fields, "objective_options": EVERYTHING})
    by_rows = {"output_dir": str(sparse), "optimizer": "sparse_adam"}
    train({**fields, **by_rows, "objective_options": {**EVERYTHING, "sparse_grad": True}})
    for left, right in zip(figures(dense), figures(sparse)):
        left = {k: v for k, v in left.items() if not k.startswith("objective/")}
        assert {k: right[k] for k in left} == pytest.approx(left, rel=2e-4)


@pytest.mark.parametrize("optimizer", ["adamw", *SPARSE])
def test_a_run_resumes_bit_for_bit(corpus, tmp_path, optimizer):
    fields = lm_fields(
        corpus,
        objective="sce",
        objective_options={**SMALL_SCE, "sparse_grad": optimizer != "adamw"},
        optimizer=optimizer,
        gradient_accumulation_steps=2,
        eval_every=0,
        checkpoint_every=3,
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train({**fields, "output_dir": str(whole)})
    train({**fields, "output_dir": str(stopped)})
    for path in (stopped / "checkpoints" / "step-00000006").iterdir():
        path.unlink()
    (stopped / "checkpoints" / "step-00000006").rmdir()
    (stopped / "summary.json").unlink()

    resumed = build_run(TrainConfig(**{**fields, "output_dir": str(stopped)}))
    assert resumed.step == 3
    resumed.train()
    assert figures(stopped) == figures(whole)
    for name in ("optimizer.safetensors", "model.safetensors", "random_rank0.safetensors"):
        left, right = (
            (folder / "checkpoints" / "step-00000006" / name).read_bytes()
            for folder in (stopped, whole)
        )
        assert left == right


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", SPARSE)
def test_nothing_in_a_step_is_as_large_as_the_item_matrix(corpus, tmp_path, optimizer, tied):
    """Every allocation of forward, backward, clipping and step, as the allocator reports them."""
    model_config = {**lm_fields(corpus)["model_config"], "vocab_size": 50_000}
    fields = lm_fields(
        corpus,
        output_dir=str(tmp_path),
        model_config={**model_config, "tie_word_embeddings": tied},
        objective="sce",
        objective_options={"num_buckets": 0, "tail_candidates": 32, "sparse_grad": True},
        optimizer=optimizer,
        gradient_accumulation_steps=2,
    )
    run = build_run(TrainConfig(**fields))
    matrix = 50_000 * 32 * 4
    # The watcher sees the state that the first step makes.
    assert (largest_allocation(run) >= matrix) == (optimizer == "sparse_adam")
    run.step += 1
    assert largest_allocation(run) < matrix / 2


def largest_allocation(run: Run) -> int:
    """Bytes of the largest piece of memory that one optimiser step asks for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watcher:
        run.learner.step(run._next_batches())
    assert watcher.profiler is not None
    assert watcher.profiler.kineto_results is not None
    events = watcher.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "objective", "options", "message"),
    [
        ("adamw", "sce", {"sparse_grad": True}, "adamw, which takes dense gradients"),
        ("sparse_adam", "sce", {}, "sparse_adam takes .*; add sparse_grad: true"),
        ("rowwise_adagrad", "exact", {}, "the objective 'exact' has none"),
    ],
)
def test_an_optimizer_that_does_not_fit_the_objective_is_refused(
    corpus, tmp_path, optimizer, objective, options, message
):
    fields = lm_fields(corpus, output_dir=str(tmp_path / "run"), optimizer=optimizer)
    config = TrainConfig(**{**fields, "objective": objective, "objective_options": options})
    with pytest.raises(ValueError, match=message) as caught:
        build_run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_parameters_in_pieces_are_refused():
    objective = objectives.get("sce", sparse_grad=True)
    with pytest.raises(ValueError, match="was started under FSDP"):
        check_optimizer("sparse_adam", objective, DistributedType.FSDP)


class _Hashed(nn.Module):
    """An input embedding of another kind."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


def test_an_input_embedding_of_another_kind_is_refused():
    model = tiny_model("llama")
    model.set_input_embeddings(_Hashed(model.get_input_embeddings().weight))
    with pytest.raises(ValueError, match="input embedding of LlamaForCausalLM is a _Hashed"):
        make_row_sparse(model)
