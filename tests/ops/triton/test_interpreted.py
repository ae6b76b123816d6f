"""Runs the files of ``interpreted/`` in processes of their own, under ``TRITON_INTERPRET=1``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
ROOT = Path(__file__).parents[3]
SHORT = ("catalogue_scan", "chunk_cross_entropy", "exact_cross_entropy")
"""One kernel of each kind, in half a minute; the others take that or more each."""
LONG = sorted(
    path.stem.removeprefix("test_")
    for path in FOLDER.glob("test_*.py")
    if path.stem.removeprefix("test_") not in SHORT
)


def run_interpreted(request: pytest.FixtureRequest, *paths: Path) -> None:
    # Without a choice of markers their own slow cases run too.
    fast_only = ["-m", "not slow"] if request.config.option.markexpr else []
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fast_only, *paths],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_in_the_interpreter(request):
    run_interpreted(request, *(FOLDER / f"test_{name}.py" for name in SHORT))


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_in_the_interpreter_at_length(name, request):
    run_interpreted(request, FOLDER / f"test_{name}.py")
