"""Real interaction logs and text that may lie beside the repository; they are never part of it."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def shared_data(name: str) -> Path:
    """The path of a file of ``../shared/data``; skips the test where it is missing."""
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not in ../shared/data beside the repository")
    return path
