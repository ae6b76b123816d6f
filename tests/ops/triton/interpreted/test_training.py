"""A small causal language model trained with the kernels follows the one trained without them."""

import pytest
import torch
from support.models import tiny_batch, tiny_model
from support.problems import make_problem
from support.triton_cases import CASES, draw
from torch.utils.checkpoint import checkpoint

import sce_lm.candidates.priority as priority
import sce_lm.objectives.sampled_softmax as sampled_softmax_objective
import sce_lm.objectives.sce as sce_objective
from sce_lm import apply_sce, objectives
from sce_lm.ops import dispatch
from sce_lm.ops.head import Head
from sce_lm.ops.positions import LossTerms, Positions
from sce_lm.ops.triton.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.triton.exact_cross_entropy import exact_cross_entropy

STEPS = 5
SCE = {
    "name": "sce",
    "num_buckets": 3,
    "bucket_candidates": 10,
    "shared_frequent": 4,
    "tail_candidates": 12,
    "control_variate": True,
}
BOTH = {"candidate_cross_entropy", "catalogue_topk"}


@pytest.fixture
def _same_sample(monkeypatch):
    """Tails with the kernel's noise, whatever the backend of the loss."""

    def by_the_kernel(*arguments, backend):
        return priority.priority_sample(*arguments, backend="triton")

    for module in (sce_objective, sampled_softmax_objective):
        monkeypatch.setattr(module, "priority_sample", by_the_kernel)


@pytest.fixture
def used(monkeypatch):
    """Operations that ran as kernels, the sample's aside."""
    found, kernels = set(), dispatch.kernels

    def watched(operation, *arguments):
        run = kernels(operation, *arguments)
        if run is not None:
            found.add(operation)
        return run

    for module in (
        "candidate_cross_entropy",
        "catalogue_scan",
        "chunk_cross_entropy",
        "exact_cross_entropy",
    ):
        monkeypatch.setattr(f"sce_lm.ops.{module}.kernels", watched)
    return found


def losses(family: str, specification: dict, backend: str) -> torch.Tensor:
    """Training losses of a few steps, and the exact loss in ``eval()``."""
    model = tiny_model(family, num_hidden_layers=1)
    apply_sce(model, objectives.get(**specification, backend=backend))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    batch = tiny_batch(batch=2, length=12)
    torch.manual_seed(3)
    found = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    with torch.no_grad():
        found.append(model.eval()(**batch).loss)
    return torch.stack(found)


@pytest.mark.usefixtures("_same_sample")
@pytest.mark.parametrize(
    ("family", "specification", "operations"),
    [
        ("llama", SCE, BOTH),
        ("llama", SCE | {"row_control_variate": True}, BOTH),
        ("llama", {"name": "exact"}, set()),
        pytest.param("gemma2", SCE, BOTH, marks=pytest.mark.slow),
        pytest.param(
            *("llama", {"name": "sce", "published": True, "bucket_candidates": 20}, BOTH),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("llama", {"name": "sampled_softmax", "sampling": "priority", "num_negatives": 20}),
            {"candidate_cross_entropy"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "llama", {"name": "in_batch"}, {"candidate_cross_entropy"}, marks=pytest.mark.slow
        ),
        pytest.param("llama", {"name": "rece"}, {"chunk_cross_entropy"}, marks=pytest.mark.slow),
    ],
    ids=["sce", "row control", "exact", "soft cap", "published", "sampled", "in-batch", "rece"],
)
def test_five_steps_equal_those_of_torch(family, specification, operations, used):
    expected = losses(family, specification, "torch")
    assert not used
    found = losses(family, specification, "triton")
    assert used == operations | {"exact_cross_entropy"}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found[STEPS - 1] < found[0]


@pytest.mark.parametrize("specification", [SCE, {"name": "exact"}], ids=["sce", "exact"])
def test_a_checkpointed_call_is_replayed(specification):
    """The draws of the second run are those of the first, and are not counted again."""
    problem = make_problem(20, 60, 8, dtype=torch.float32)
    results = []
    for checkpointed in (False, True):
        objective = objectives.get(**specification, backend="triton")

        def loss(hidden, weight, objective=objective):
            return objective(hidden, weight, problem.labels)

        torch.manual_seed(5)
        if checkpointed:
            value = checkpoint(loss, *problem[:2], use_reentrant=False)
        else:
            value = loss(*problem[:2])
        results.append([value, *torch.autograd.grad(value, problem[:2])])
        assert objective.state is None or objective.state.step == 1
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_on_a_cpu_auto_is_torch_also_in_the_interpreter(used):
    problem = make_problem(6, 20, 4, dtype=torch.float32)
    assert objectives.get("exact")(*problem[:3]).isfinite()
    assert not used


def test_what_the_kernels_do_not_take():
    problem = make_problem(6, 20, 4, with_bias=False)
    with pytest.raises(ValueError, match=r"a weight of torch.float64 is not one of"):
        objectives.get("exact", backend="triton")(*problem[:3])
    assert objectives.get("exact")(*problem[:3]).dtype == torch.float64
    single = make_problem(6, 20, 4, dtype=torch.float32)
    beside = torch.cat([single.hidden, torch.ones(6, 1)], dim=1)
    exact = objectives.get("exact", backend="triton")
    with pytest.raises(ValueError, match="a low-rank operand"):
        exact(beside, single.weight, single.labels, low_rank=torch.ones(20, 1))


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("tail only", "all lists")], ids=str
)
def test_operations_are_registered_for_the_compiler(case):
    """Schema, fake tensors and gradients, as ``torch.compile`` uses them."""
    problem, _, c = draw(case)
    arguments = (
        problem.hidden,
        problem.weight,
        problem.bias,
        problem.labels,
        c.shared,
        c.tail,
        c.tail_log_weights,
        c.bucket_items,
        c.bucket_of,
        *[None] * 6,
        1.0,
        None,
        c.control_variate,
        False,
        0.1,
        0.1,
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.sce_lm.candidate_forward, arguments, test_utils=checks)
    ids = problem.labels.unsqueeze(1)
    rows = (*problem[:2], problem.bias, ids, 1.0, None, True, True, True)
    torch.library.opcheck(torch.ops.sce_lm.row_reductions_forward, rows, test_utils=checks)


def test_selections_are_registered_for_the_compiler():
    problem = make_problem(5, 60, 8, dtype=torch.float32)
    scan = (problem.hidden.detach(), problem.weight.detach(), None, torch.arange(5), 7)
    sample = (torch.zeros(60), 20, torch.tensor([3]))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sce_lm.catalogue_topk, scan, test_utils=checks)
    torch.library.opcheck(torch.ops.sce_lm.priority_sample, sample, test_utils=checks)


def test_a_compiled_call_is_one_graph():
    problem, _, candidates = draw(CASES[0])
    terms = LossTerms()  # the compiler cannot make a dataclass's default itself

    def loss(hidden, weight):
        head, positions = Head(weight), Positions(hidden * 2.0, problem.labels, terms=terms)
        result = candidate_cross_entropy(head, positions, candidates)
        exact = exact_cross_entropy(head, positions)
        return result.loss.mean() + exact.loss.mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = problem.parameters
    want, found = loss(*inputs), compiled(*inputs)
    torch.testing.assert_close(found, want)
    for actual, expected in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(want, inputs)
    ):
        torch.testing.assert_close(actual, expected)
