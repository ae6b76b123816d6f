"""These tests run the kernels in Triton's interpreter, which must be chosen before Triton is
imported: ``test_interpreted.py`` starts a process for each file. In others they are not there."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """An output that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
