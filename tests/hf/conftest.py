"""Settings for the tests with models of transformers."""

import pytest


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """The Trainer of transformers 4 writes its precision here, for every Trainer after it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
