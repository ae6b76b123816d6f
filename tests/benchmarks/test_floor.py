"""The arithmetic of the least time."""

import math

import pytest
import torch

from sce_lm.benchmarks.floor import Work, floor_terms, measure_rates, work_of
from sce_lm.benchmarks.methods import methods

N, V, D = 2048, 151_936, 896
LABELS = torch.arange(500).repeat(5)[:N]
COUNTS = torch.arange(V, 0, -1)


def test_tail_only():
    work = work_of(methods(2048)["sce-tail"].specification, LABELS, COUNTS, D)
    assert work == Work(shared=2048, reads_weight=True)
    trained = work.amounts(N, V, D, 4, trainable=True)
    frozen = work.amounts(N, V, D, 4, trainable=False)
    assert trained["shared"] == 6 * N * 2048 * D
    assert frozen["shared"] == 4 * N * 2048 * D
    assert trained["read W"] == trained["write dW"] == V * D * 4
    assert frozen["read W"] == 0  # known since it was frozen
    assert frozen["write dW"] == trained["scan"] == trained["buckets"] == 0


def test_default():
    work = work_of({"name": "sce"}, LABELS, COUNTS, D)
    # The 500 labels are among the 1,024 most frequent classes.
    assert work == Work(shared=1024, buckets=32, bucket_candidates=4748, expects_rows=True)
    amounts = work.amounts(N, V, D, 4, trainable=True)
    assert amounts["buckets"] == 6 * N * 4748 * D
    assert amounts["scan"] == 4 * 32 * V * D
    assert work.amounts(N, V, D, 4, trainable=False)["scan"] == 2 * 32 * V * D
    assert amounts["read W"] == 0  # the scan reads it


def test_exact_and_methods_without_a_formula():
    for specification in ({"name": "stock"}, {"name": "exact"}):
        assert work_of(specification, LABELS, COUNTS, D) == Work(shared=V)
    assert work_of({"name": "sce", "published": True}, LABELS, COUNTS, D) is None


def test_terms_are_amounts_at_their_rates():
    work = Work(shared=100, buckets=4, bucket_candidates=10, reads_weight=True)
    amounts = work.amounts(10, 1000, 8, 4, trainable=True)
    rates = dict.fromkeys(("shared", "buckets", "scan"), 1000.0) | {"read W": 100.0, "write dW": 50}
    terms = floor_terms(amounts, rates)
    assert terms == {
        "shared": 48.0,
        "buckets": 4.8,
        "scan": 64.0,
        "read W": 320.0,
        "write dW": 640.0,
    }
    assert floor_terms({"scan": 0}, {"scan": math.inf}) == {}


@pytest.mark.parametrize("buckets", [0, 3])
def test_rates_cover_every_term(buckets):
    work = Work(shared=20, buckets=buckets, bucket_candidates=5 * bool(buckets), reads_weight=True)
    for trainable in (True, False):
        rates = measure_rates(work, 10, 50, 8, torch.float32, "cpu", trainable=trainable)
        amounts = work.amounts(10, 50, 8, 4, trainable=trainable)
        terms = floor_terms(amounts, rates)
        assert set(terms) == {name for name, amount in amounts.items() if amount}
        assert all(0 < seconds < math.inf for seconds in terms.values())
