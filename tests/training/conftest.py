import datasets
import pytest
from accelerate.state import AcceleratorState
from support.training import write_text


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with `text.jsonl` and `tokenizer`; runs and caches go beside them."""
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder)
    return folder


@pytest.fixture(autouse=True)
def own_accelerator_state():
    """accelerate keeps one state a process; each test starts with none."""
    datasets.disable_progress_bars()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
