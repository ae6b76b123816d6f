"""Priority sampling and the prior it draws from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sce_lm.candidates.noise import draw_seed, stream
from sce_lm.candidates.prior import log_label_prior
from sce_lm.candidates.priority import priority_sample

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(1, 70), st.integers(3, 80), st.integers(0, 10**6))
def test_sample_is_distinct_allowed_and_weighted(size, m, tile, seed):
    generator = torch.Generator().manual_seed(seed)
    proposal = torch.randn(size, generator=generator, dtype=torch.float64)
    proposal[torch.rand(size, generator=generator) < 0.3] = -torch.inf
    proposal[0] = 0.0
    ids, c = priority_sample(proposal, m, generator, tile=tile)
    available = int(torch.isfinite(proposal).sum())
    assert len(ids.unique()) == len(ids) == len(c)
    assert torch.isfinite(proposal[ids]).all()
    assert (c >= 0).all()
    if tile >= size:
        assert len(ids) == min(m, available)
    if m >= available:  # whatever the tiles
        assert sorted(ids.tolist()) == torch.isfinite(proposal).nonzero().squeeze(1).tolist()
        assert (c == 0).all()


@pytest.mark.parametrize("tile", [10, 3], ids=["whole", "tiles"])
def test_nothing_is_drawn_where_every_class_is_left_out(tile):
    proposal = torch.full((10,), -torch.inf, dtype=torch.float64)
    ids, c = priority_sample(proposal, 4, torch.Generator().manual_seed(0), tile=tile)
    assert len(ids) == len(c) == 0


@pytest.mark.parametrize("tile", [1000, 13], ids=["whole", "tiles"])
def test_sums_are_unbiased(tile):
    proposal = torch.linspace(-3, 0, 60, dtype=torch.float64)
    f = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    sums = []
    for _ in range(6000):
        ids, c = priority_sample(proposal, 12, generator, tile=tile)
        sums.append((f[ids] * c.exp()).sum())
    sums = torch.stack(sums) / f.sum()
    error = sums.std() / len(sums) ** 0.5
    assert error < 0.01
    assert abs(sums.mean() - 1) < 5 * error


def test_left_out_classes_do_not_move_the_others_noise():
    proposal = torch.zeros(50, dtype=torch.float64)
    ids, _ = priority_sample(proposal, 10, torch.Generator().manual_seed(4))
    fewer = proposal.clone()
    fewer[[i for i in range(50) if i not in ids.tolist()][:20]] = -torch.inf
    again, _ = priority_sample(fewer, 10, torch.Generator().manual_seed(4))
    assert sorted(again.tolist()) == sorted(ids.tolist())


def test_prior_is_the_formula():
    counts = torch.tensor([0, 3, 0, 12])
    p = counts.double() ** 0.5
    expected = torch.log(0.8 * p / p.sum() + 0.2 / 4)
    torch.testing.assert_close(log_label_prior(counts, 0.5, 0.2), expected)
    flat = log_label_prior(counts, 0.0, 0.2).exp()
    torch.testing.assert_close(flat, torch.tensor([0.05, 0.45, 0.05, 0.45]).double())


def test_streams_are_keyed_by_seed_and_use():
    def numbers(seed, name):
        return torch.rand(4, generator=stream(seed, name, CPU)).tolist()

    assert numbers(1, "tail") == numbers(1, "tail")
    assert numbers(1, "tail") != numbers(1, "buckets")
    assert numbers(1, "tail") != numbers(2, "tail")
    torch.manual_seed(0)
    first = draw_seed(None), draw_seed(None)
    torch.manual_seed(0)
    assert first == (draw_seed(None), draw_seed(None))
    assert first[0] != first[1]
