"""SCEState: counts, averages, files."""

import pytest
import torch

from sce_lm import SCEState


def used_state():
    state = SCEState()
    state.begin_call(torch.tensor([1, 1, 4]), 6, seed=1)
    state.average(variance_plain=0.04, variance_control=0.01, coverage=1.0)
    return state


def test_counts_and_averages():
    state = used_state()
    assert state.counts.tolist() == [0, 2, 0, 0, 1, 0]
    assert state.step == 1
    assert not state.is_new
    assert state.prefer_control_variate
    assert state.summary() == {"coverage": 1.0, "relative_error": pytest.approx(0.1)}
    for _ in range(50):
        state.average(variance_plain=0.001)
    assert not state.prefer_control_variate


def test_averages_begin_as_means_and_then_forget():
    """Decay .9: the first ten values weigh the same, so an untrained model's first one is not all
    there is."""
    state = SCEState()
    for n in range(10):
        state.average(coverage=float(n))
        assert state.averages["coverage"] == pytest.approx(n / 2)
    state.average(coverage=24.5)
    assert state.averages["coverage"] == pytest.approx(0.9 * 4.5 + 0.1 * 24.5)


def test_no_grad_does_not_count():
    state = used_state()
    with torch.no_grad():
        counts, _, counted = state.begin_call(torch.tensor([5]), 6, seed=2)
    assert not counted
    assert counts.tolist() == [0, 2, 0, 0, 1, 1]
    assert state.counts.tolist() == [0, 2, 0, 0, 1, 0]


def test_a_seed_that_comes_back_sees_the_past_it_saw():
    state = SCEState()
    first = state.begin_call(torch.tensor([1, 2]), 6, seed=1)[0].tolist()
    state.begin_call(torch.tensor([3]), 6, seed=2)
    counts, _, counted = state.begin_call(torch.tensor([1, 2]), 6, seed=1)
    assert not counted
    assert counts.tolist() == first
    assert state.counts.tolist() == [0, 1, 1, 1, 0, 0]


def test_a_run_that_begins_again_counts_again():
    state = used_state()
    state.forget_calls()
    assert state.begin_call(torch.tensor([1, 1, 4]), 6, seed=1)[2]
    assert state.counts.tolist() == [0, 4, 0, 0, 2, 0]


def test_saved_and_loaded(tmp_path):
    state = used_state()
    path = tmp_path / "state.safetensors"
    state.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    again = SCEState()
    assert again.is_new
    again.load(path)
    assert again.counts.tolist() == state.counts.tolist()
    assert (again.step, again.averages) == (state.step, state.averages)
    for each in (state, again):
        each.average(coverage=0.0)
    assert again.averages == state.averages
    assert again.averages["coverage"] == 0.5
    SCEState().save(path)
    again.load(path)
    assert again.is_new
    assert again.summary() == {}


def test_bad_files_and_other_vocabularies(tmp_path):
    state = used_state()
    path = tmp_path / "state.safetensors"
    state.save(path)
    with pytest.raises(ValueError, match="an SCEState of its own"):
        state.begin_call(torch.tensor([1]), 7, seed=3)
    other = SCEState()
    other.begin_call(torch.tensor([1]), 9, seed=3)
    with pytest.raises(ValueError, match="counts 6 classes but this model has 9"):
        other.load(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="not a complete SCEState file"):
        SCEState().load(path)
    with pytest.raises(FileNotFoundError):
        SCEState().load(tmp_path / "none")


@pytest.mark.parametrize("size", [4, 6, 9])
def test_resized(size, tmp_path):
    """Counts of the classes that stay, also through a file and where nothing was counted yet."""
    state = used_state()
    state.most_frequent(state.counts, torch.tensor([1]), 2)
    state.memory["drawn"] = torch.tensor([5])
    state.resize(size)
    assert state.counts.tolist() == [0, 2, 0, 0, 1, 0, 0, 0, 0][:size]
    assert state.num_labels == int(state.counts.sum())
    assert (state.step, state.summary()["coverage"]) == (1, 1.0)
    assert not state.memory
    labels = torch.tensor([0, size - 1])
    counts, _, counted = state.begin_call(labels, size, seed=1)  # a seed from before counts anew
    assert counted
    assert state.most_frequent(counts, labels, 2).max() < size
    state.save(tmp_path / "state.safetensors")
    again = SCEState()
    again.load(tmp_path / "state.safetensors")
    assert torch.equal(again.counts, state.counts)
    new = SCEState()
    new.resize(size)
    assert new.is_new
    assert new.counts is None


def test_what_a_call_read_is_read_again_by_its_replay_alone():
    state = used_state()
    state.memory["drawn"] = torch.tensor([3])
    read = [state.once(1, "drawn", lambda: state.memory["drawn"].tolist())]
    state.memory["drawn"] = torch.tensor([4])
    state.begin_call(torch.tensor([2]), 6, seed=2)
    for seed in (1, 2):
        read.append(state.once(seed, "drawn", lambda: state.memory["drawn"].tolist()))
    assert read == [[3], [3], [4]]


def test_memory_is_saved_with_the_counts(tmp_path):
    state = used_state()
    state.memory["occurrences"] = torch.arange(6.0)
    state.save(tmp_path / "state.safetensors")
    again = SCEState()
    again.memory["old"] = torch.zeros(1)
    again.load(tmp_path / "state.safetensors")
    assert list(again.memory) == ["occurrences"]
    assert torch.equal(again.memory["occurrences"], torch.arange(6.0))


def test_lists_of_large_catalogues_are_saved(tmp_path):
    """What was derived from past counts comes back as it was, not as today's counts give it."""
    state = SCEState()
    counts = state.begin_call(torch.tensor([1, 1, 4, 2]), 6, seed=1)[0]
    first = state.weight_classes(counts)
    frequent = state.most_frequent(counts, torch.tensor([1, 1, 4, 2]), 2)
    labels = torch.tensor([3])
    counts = state.begin_call(labels, 6, seed=2)[0]
    assert state.weight_classes(counts) is first  # a quarter more is not half more
    state.save(tmp_path / "state.safetensors")
    again = SCEState()
    again.load(tmp_path / "state.safetensors")
    assert again.num_labels == state.num_labels == 5
    assert torch.equal(again.weight_classes(again.counts).order, first.order)
    assert torch.equal(again.most_frequent(again.counts, labels[:0], 2), frequent)
    counts = state.begin_call(torch.tensor([3, 3, 3]), 6, seed=3)[0]
    assert state.weight_classes(counts) is not first
    assert state.most_frequent(counts, torch.tensor([3, 3, 3]), 2).tolist()[0] == 3
