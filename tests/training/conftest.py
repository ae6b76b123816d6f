import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from support.training import write_text


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with `text.jsonl` and `tokenizer`; runs and caches go beside them."""
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from threads, and lose much where processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_accelerator_state():
    """accelerate keeps one state a process; each test starts with none."""
    datasets.disable_progress_bars()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
