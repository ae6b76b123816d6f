"""Runs every file of ``interpreted/`` in a process of its own, under ``TRITON_INTERPRET=1``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_in_the_interpreter(path, request):
    markers = request.config.option.markexpr
    chosen = ["-m", markers] if markers else []
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, path],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_there_are_such_files():
    assert len(FILES) >= 5
