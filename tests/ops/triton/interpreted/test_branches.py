"""The cases of the other tests take every branch that a kernel is compiled with, both ways."""

import ast
import inspect
import textwrap

import torch
from support.triton_cases import CASES, draw
from support.triton_interpreter import Launch, watched
from triton.runtime.interpreter import InterpretedFunction

from sce_lm.ops.head import Head
from sce_lm.ops.row_reductions import Asked
from sce_lm.ops.triton import (
    candidate_forward,
    catalogue_scan,
    hidden_gradient,
    logit_gradient,
    logit_math,
    merge_rows,
    priority_sample,
    row_dot,
    row_gradient,
    row_sum,
)
from sce_lm.ops.triton.candidate_cross_entropy import candidate_cross_entropy
from sce_lm.ops.triton.exact_cross_entropy import exact_cross_entropy
from sce_lm.ops.triton.row_reductions import row_reductions

MODULES = (
    candidate_forward,
    catalogue_scan,
    hidden_gradient,
    logit_gradient,
    merge_rows,
    row_dot,
    row_gradient,
    row_sum,
    priority_sample,
)


def conditions(function: InterpretedFunction) -> list[str]:
    """Conditions that the compiler decides: on arguments that are None, or constants."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
            if "is not None" in ast.unparse(node.test) or all(n.isupper() for n in names):
                found.append(ast.unparse(node.test))
    return found


def launched() -> list[Launch]:
    """What the tests of this folder launch, without running it."""
    launches = []
    for case in CASES:
        problem, _, candidates = draw(case)
        head, positions = problem.head(case.post), problem.positions()
        with watched(run=False) as found:
            loss = candidate_cross_entropy(head, positions, candidates).loss
            inputs = [t for t in problem.parameters if t.requires_grad]
            torch.autograd.grad(loss.sum(), inputs)
            exact = exact_cross_entropy(head, positions)
            torch.autograd.grad(exact.loss.sum(), inputs)
            ids = torch.zeros(len(positions), 3, dtype=torch.int64)
            read = row_reductions(head, positions.hidden, ids, Asked(True, True, True, 0))
            torch.autograd.grad(sum(part.sum() for part in read[:5]), inputs)
        launches += found
    problem = draw(CASES[2]).problem
    q, w = problem.hidden.detach(), problem.weight.detach()
    with watched(run=False) as found:
        catalogue_scan.catalogue_topk(q, Head(w, None, problem.bias), 7, excluded=torch.arange(20))
        catalogue_scan.catalogue_topk(q[:, :64], Head(w[:, :64]), 7)
        priority_sample.priority_sample(torch.zeros(300), 20, torch.Generator())
    return launches + found


def test_every_branch_is_taken_both_ways():
    launches = launched()
    shared = [
        condition
        for value in vars(logit_math).values()
        if isinstance(value, InterpretedFunction)
        for condition in conditions(value)
    ]
    assert {"bias is not None", "soft_cap is not None", "EVEN_WIDTH"} <= set(shared)
    for module in MODULES:
        for name, function in vars(module).items():
            if not name.endswith("_kernel"):
                continue
            ours = [launch for launch in launches if launch.kernel == name]
            assert ours, f"{name} is not launched"
            known = set(ours[0].arguments)
            for condition in [*conditions(function), *shared]:
                names = {n.id for n in ast.walk(ast.parse(condition)) if isinstance(n, ast.Name)}
                if names <= known:
                    taken = {bool(eval(condition, {}, launch.arguments)) for launch in ours}
                    assert taken == {True, False}, f"{name}: {condition} is always {taken}"
