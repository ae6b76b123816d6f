"""Imports run one way: hf, recsys and training -> objectives -> candidates, config, ops."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sce_lm"

MAY_IMPORT = {
    "ops": set(),
    "config": {"ops"},
    "files": set(),
    "requirements": set(),
    "png": {"files", "requirements"},
    "candidates": {"config", "files", "ops"},
    "objectives": {"candidates", "config", "ops"},
    "distributed": {"objectives", "candidates", "config", "ops"},
    "distillation": {"objectives", "candidates", "config", "ops"},
    "teacher_files": {"distillation", "files", "ops"},
    "teacher_folder": {"distillation", "files", "ops"},
    "hf": {"distillation", "distributed", "objectives", "candidates", "config", "files", "ops"},
    "recsys": {"hf", "objectives", "candidates", "config", "files", "ops", "requirements"},
    "training": {
        *("recsys", "hf", "objectives", "candidates", "config", "files", "png", "ops"),
        *("distillation", "requirements", "teacher_files", "teacher_folder"),
    },
    "benchmarks": {
        *("training", "recsys", "hf", "distillation", "distributed", "objectives", "candidates"),
        *("config", "files", "png", "ops"),
    },
    "__main__": {"commands"},
}
MAY_IMPORT["commands"] = {*MAY_IMPORT} - {"__main__"}
"""What each part of the package may import from the others."""

ONLY_IN = {
    "transformers": {"hf", "recsys", "training", "benchmarks", "commands"},
    "peft": {"hf", "training"},
    "trl": {"hf", "benchmarks"},
    "datasets": {"recsys", "training"},
    "polars": {"recsys", "teacher_files", "training"},
    "accelerate": {"training"},
    "matplotlib": {"png"},
}
"""Parts that may know a library."""


def imported_names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported_names(path):
        top, *rest = name.split(".")
        if top == "sce_lm":
            assert rest[0] in MAY_IMPORT[part] | {part}, f"{path.name} imports {name}"
        elif top in ONLY_IN:
            assert part in ONLY_IN[top], f"{path.name} imports {name}"


def test_the_check_sees_every_part():
    parts = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in FILES}
    assert parts == set(MAY_IMPORT)
