"""Poisson sampling by weight classes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sce_lm.candidates.weight_classes import WeightClasses, _inclusion


def counts_of(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = (torch.rand(size, generator=generator) * 6).exp().long()
    return counts * (torch.rand(size, generator=generator) < 0.7)


def draw(classes, counts, size, excluded, generator, power=0.75, floor=0.3):
    return classes.sample(size, counts, excluded, generator, power=power, uniform_floor=floor)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 320),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.1, 1.0]),
    st.integers(0, 10**6),
)
def test_sample_is_distinct_allowed_and_weighted(vocab_size, size, power, floor, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = counts_of(vocab_size, seed)
    excluded = (torch.rand(vocab_size, generator=generator) < 0.3).nonzero().squeeze(1)
    classes = WeightClasses.build(counts, int(counts.sum()))
    assert sorted(classes.order.tolist()) == list(range(vocab_size))
    grown = counts + torch.randint(0, 3, counts.shape, generator=generator)
    ids, c = draw(classes, grown, size, excluded, generator, power, floor)
    assert len(ids.unique()) == len(ids) == len(c)
    assert not torch.isin(ids, excluded).any()
    assert (c >= 0).all()
    if size >= vocab_size:
        assert len(ids) == vocab_size - len(excluded)
        assert (c == 0).all()


def test_groups_are_sorted_and_alike():
    counts = counts_of(2000)
    classes = WeightClasses.build(counts, 1)
    groups = counts[classes.order.long()].split(classes.sizes.tolist())
    assert (groups[0] == 0).all()
    assert len(groups[0]) == (counts == 0).sum()
    for group, mean in zip(groups[1:], classes.mean_counts[1:]):
        if len(group):
            assert group.max() <= group.min() * 2**0.5 + 1e-9
            assert mean == pytest.approx(group.double().mean().item())


@pytest.mark.parametrize("floor", [0.2, 1.0])
def test_sums_and_sizes_are_what_they_should_be(floor):
    """Unbiased for an f that the proposal does not know; 60 of 500 expected."""
    counts = counts_of(500)
    excluded = torch.arange(0, 500, 11)
    classes = WeightClasses.build(counts, int(counts.sum()))
    generator = torch.Generator().manual_seed(1)
    f = torch.rand(500, generator=generator, dtype=torch.float64)
    f[excluded] = 0.0
    sums, sizes = [], []
    for _ in range(3000):
        ids, c = draw(classes, counts, 60, excluded, generator, floor=floor)
        sums.append((f[ids] * c.exp()).sum() / f.sum())
        sizes.append(float(len(ids)))
    for values, expected in ((torch.stack(sums), 1.0), (torch.tensor(sizes), 60.0)):
        error = values.std() / len(values) ** 0.5
        assert error < 0.007 * expected
        assert abs(values.mean() - expected) < 5 * error


def test_each_class_is_drawn_as_often_as_its_weight_says():
    counts = counts_of(40, seed=5)
    classes = WeightClasses.build(counts, int(counts.sum()))
    generator = torch.Generator().manual_seed(2)
    draws, hits = 4000, torch.zeros(40)
    weight = torch.full((40,), torch.nan, dtype=torch.float64)
    for _ in range(draws):
        ids, c = draw(classes, counts, 15, torch.arange(0), generator)
        hits[ids] += 1
        weight[ids] = c
    inclusion = (-weight).exp()
    deviation = (inclusion * (1 - inclusion) / draws).sqrt()
    assert ((hits / draws - inclusion).abs() <= 5 * deviation + 1e-9).all()
    assert inclusion.sum() == pytest.approx(15.0)


def test_inclusion_has_the_size_asked_for():
    proposal, left = [0.001, 0.01, 0.2], [400, 40, 1]
    inclusion = _inclusion(proposal, left, 50)
    assert sum(n * p for n, p in zip(left, inclusion)) == pytest.approx(50)
    assert inclusion[2] == 1.0
    assert inclusion[1] / inclusion[0] == pytest.approx(10)
