"""Settings for the tests with models of transformers."""

import pytest
import torch


@pytest.fixture(autouse=True)
def own_precision(monkeypatch):
    """The Trainer of transformers 4 writes its precision here, for every Trainer after it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
