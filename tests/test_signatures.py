"""What belongs together travels together: `Head`, `Positions` and `Call` are passed whole, and
modules stay of a size that is read in one go."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sce_lm"

LOOSE = {"hidden", "hidden_states", "weight", "bias", "low_rank", "post", "labels"}
LOOSE |= {"position_weight", "backend"}
MOST_LOOSE = 3
"""Of these names, parameters of one function."""

FLAT = {
    "objectives/sce_loss.py sce_loss",
    "objectives/base.py Objective.__call__",
    "objectives/compile_operator.py head_loss",  # the same, in a graph that is being traced
    "distributed.py vocab_parallel_loss",
    "distributed.py vocab_parallel_scores",
    # Called as an objective is.
    "benchmarks/peers.py _torch_fused.loss",
    "benchmarks/peers.py _cut_cross_entropy.loss",
    "benchmarks/peers.py _liger.loss",
    "benchmarks/peers.py _quack.loss",
    "benchmarks/peers.py _trl.loss",
    "benchmarks/loss_cost.py stock.loss",
    # Launch a kernel, whose parameters are pointers.
    "ops/triton/backward_pass.py backward_pass",
    "ops/triton/candidate_forward.py list_sums",
    "ops/triton/logit_gradient.py logit_gradient",
}
"""Functions that take them one by one all the same."""
FLAT_BY_KIND = ("custom_op", "register_fake", "triton.jit")
"""Decorators of operators and kernels, whose parameters are tensors and numbers."""

LONGEST = 400
"""Lines of a module in `objectives`, `ops` and `hf`."""
LONGER: set[str] = set()
"""Modules that are over it still."""


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of a module, with its qualified name."""

    def inside(node: ast.AST, owner: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{owner}{child.name}"
                if isinstance(child, ast.FunctionDef):
                    yield name, child
                yield from inside(child, f"{name}.")
            else:
                yield from inside(child, owner)

    return inside(ast.parse(path.read_text()), "")


def loose_parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name in LOOSE]


def is_flat_by_kind(name: str, function: ast.FunctionDef) -> bool:
    """Whether it is an operator, a kernel, or the forward pass of an autograd function."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    if name.endswith(".forward") and function.args.args[0].arg == "ctx":
        return True
    return any(kind in decorator for kind in FLAT_BY_KIND for decorator in decorators)


FOUND = {
    f"{path.relative_to(PACKAGE)} {name}": loose_parameters(function)
    for path in sorted(PACKAGE.rglob("*.py"))
    for name, function in functions(path)
    if len(loose_parameters(function)) > MOST_LOOSE and not is_flat_by_kind(name, function)
}


def test_a_head_and_positions_are_passed_whole():
    taken_apart = {name: loose for name, loose in FOUND.items() if name not in FLAT}
    assert not taken_apart, "pass a Head, Positions or a Call"


def test_every_exception_is_needed():
    assert set(FOUND) == FLAT


@pytest.mark.parametrize("part", ["objectives", "ops", "hf"])
def test_modules_are_short(part):
    over = {
        str(path.relative_to(PACKAGE))
        for path in (PACKAGE / part).rglob("*.py")
        if len(path.read_text().splitlines()) > LONGEST
    }
    assert over == {name for name in LONGER if name.startswith(f"{part}/")}
