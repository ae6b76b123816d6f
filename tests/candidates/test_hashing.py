"""Chunks of equal size along a hash."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sce_lm.candidates.hashing as module
from sce_lm.candidates.hashing import hash_chunks


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 9), st.data())
def test_chunks_are_equal_and_follow_the_hash(size, buckets, data):
    count = data.draw(st.integers(1, size))
    generator = torch.Generator().manual_seed(size)
    vectors, directions = torch.randn(size, 3, generator=generator), torch.randn(buckets, 3)
    chunk = hash_chunks([vectors], directions, count)
    sizes = torch.bincount(chunk, minlength=count)
    assert sizes.max() - sizes.min() <= 1
    hashes = (vectors @ directions.T).argmax(dim=1)
    order = torch.argsort(chunk * buckets + hashes)
    assert (hashes[order].diff() >= 0).all()


def test_tiles_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(100, 5, generator=generator)
    directions = torch.randn(7, 5, generator=generator)
    whole = hash_chunks([vectors], directions, 9)
    monkeypatch.setattr(module, "TILE_ELEMENTS", 50)
    assert torch.equal(hash_chunks([vectors], directions, 9), whole)
