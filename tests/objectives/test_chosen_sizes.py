"""What an objective says of the sizes that it chose."""

import json

import pytest
import torch

from sce_lm import objectives


def after_a_call(width=256, n=64, vocab_size=9000, **options):
    objective = objectives.get("sce", **options)
    labels = torch.randint(vocab_size, (n,))
    objective(torch.randn(n, width), torch.randn(vocab_size, width), labels)
    return objective


@pytest.mark.parametrize(
    ("options", "name", "value", "why"),
    [
        ({}, "num_buckets", 4, "one for 64 positions"),
        ({}, "bucket_sampling", "priority", "256"),
        ({"width": 32}, "bucket_sampling", "top", "width is 32"),
        ({"width": 32}, "bucket_candidates", 0, "no buckets"),
        ({"shared_frequent": 40}, "shared_frequent", 40, "as configured"),
        ({"tail_candidates": 100}, "bucket_sampling", "top", "one tail"),
        ({"width": 32, "target_relative_error": 0.2}, "tail_candidates", None, "error=0.2"),
        ({"labels_first": 1}, "num_buckets", 0, "first calls"),
    ],
)
def test_each_size_has_its_reason(options, name, value, why):
    objective = after_a_call(**options)
    choice = objective.sizes_chosen()[name]
    assert value in (None, choice.value)
    assert why in choice.why
    (line,) = [line for line in str(objective).splitlines() if line.split()[0] == name]
    assert choice.why in line
    json.dumps(objective.sizes_chosen())


def test_before_a_call_and_where_nothing_is_chosen_there_are_the_options():
    assert "num_buckets='auto'" in str(objectives.get("sce"))
    assert str(objectives.get("in_batch")).startswith("in_batch: ")
