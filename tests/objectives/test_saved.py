"""Options that earlier versions saved: what stands for them, and one warning that names them."""

import warnings

import pytest

from sce_lm import SCEConfig, objectives

CORRECTED = {
    "name": "sce",
    "backend": "auto",
    "correction": "priority",
    "num_buckets": "auto",
    "bucket_candidates": "auto",
    "bucket_sampling": "top",
    "assignment": "nearest",
    "centers": "kmeans",
    "shared_labels": True,
    "shared_frequent": "auto",
    "tail_candidates": 77,
    "target_relative_error": None,
    "prior": "labels",
    "prior_power": 0.75,
    "uniform_floor": "auto",
    "control_variate": "auto",
    "row_control_variate": False,
    "tail_strata": 1,
    "bucket_positions": "auto",
    "alpha": 2.0,
    "beta": 1.0,
    "reduce": "max",
    "labels_first": 0,
    "sparse_grad": False,
}
"""SCE with a tail of 77, by a version whose one configuration had the published form too."""
UNCORRECTED = {**CORRECTED, "correction": "none", "tail_candidates": "auto"}
PUBLISHED = {
    **UNCORRECTED,
    "assignment": "topk",
    "centers": "mix",
    "shared_labels": False,
    "shared_frequent": 0,
    "tail_candidates": 0,
    "control_variate": False,
    "bucket_candidates": 256,
}
NO_TAIL = {"tail_candidates": 0, "control_variate": False}
AS_IT_WAS = {"bucket_sampling": "top", "row_control_variate": False}
TOLD = [
    "correction",
    "assignment",
    "centers",
    "tail_strata",
    "bucket_positions",
    "alpha",
    "beta",
    "reduce",
]


@pytest.mark.parametrize(
    ("saved", "expected", "told"),
    [
        (CORRECTED, SCEConfig(tail_candidates=77, **AS_IT_WAS), TOLD),
        (
            UNCORRECTED,
            SCEConfig(num_buckets=64, bucket_candidates=1024, **NO_TAIL, **AS_IT_WAS),
            [*TOLD, "with tail_candidates 0, control_variate False, num_buckets 64"],
        ),
        (
            {**UNCORRECTED, "num_buckets": 4, "bucket_candidates": 30},
            SCEConfig(num_buckets=4, bucket_candidates=30, **NO_TAIL, **AS_IT_WAS),
            ["with tail_candidates 0, control_variate False instead"],
        ),
        ({**UNCORRECTED, "num_buckets": 0}, SCEConfig(num_buckets=0, **NO_TAIL, **AS_IT_WAS), []),
        (
            PUBLISHED,
            SCEConfig.published(),
            ["assignment 'topk'", "with published True, mix True instead"],
        ),
        (
            {**PUBLISHED, "centers": "random", "alpha": 3.0, "reduce": "mean", "num_buckets": 9},
            SCEConfig.published(mix=False, alpha=3.0, reduce="mean", num_buckets=9),
            ["centers 'random'", "mix False"],
        ),
        (
            {**PUBLISHED, "bucket_candidates": "auto"},
            SCEConfig.published(bucket_candidates=1024),
            ["bucket_candidates 1024"],
        ),
        (
            {"name": "sce", "published": True, "centers": "random"},
            SCEConfig.published(mix=False),
            ["centers 'random'"],
        ),
        ({"name": "sce", "prior": "cache"}, SCEConfig(), ["prior 'cache'", "prior 'labels'"]),
        (
            {"name": "sce", "assignment": "balanced"},
            SCEConfig(),
            ["assignment 'balanced'", "goes on without"],
        ),
        (
            {"name": "sce", "prior": {"labels": 1.0, "gradient": 2.0, "in_batch": 1.0}},
            SCEConfig(prior={"labels": 1.0, "gradient": 2.0}),
            ["'in_batch': 1.0", "prior {'labels': 1.0, 'gradient': 2.0} instead"],
        ),
        (
            {"name": "kernel", "absolute": True, "projection_refresh": 7, "alpha": 3.0},
            objectives.KernelConfig(alpha=3.0),
            ["absolute True, projection_refresh 7", "goes on without."],
        ),
        ({"name": "bce", "of_a_later_version": 1}, objectives.BCEConfig(), ["of_a_later_version"]),
    ],
)
def test_what_an_earlier_version_saved_is_read_with_one_warning(saved, expected, told):
    with pytest.warns(UserWarning, match="another version") as warned:
        objective = objectives.from_dict(saved)
    assert objective.config == expected
    assert type(objective) is type(objectives.from_config(expected))
    (message,) = [str(warning.message) for warning in warned]
    assert message.startswith(f"objective {saved['name']!r} was saved by another version with")
    assert "\n" not in message
    for words in told:
        assert words in message


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", objectives.names())
def test_what_this_version_saved_is_read_without_a_word(name, published):
    if published and name != "sce":
        with pytest.raises(ValueError, match="has no other published form"):
            objectives.from_dict({"name": name, "published": True})
        return
    saved = objectives.get(name, published=published).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = objectives.from_dict(saved)
    assert again.to_dict() == saved


def test_values_are_checked_still():
    with pytest.raises(ValueError, match="unknown objective 'another'"):
        objectives.from_dict({"name": "another"})
    with pytest.raises(ValueError, match=r"SCEConfig\.prior has 'labells'"):
        objectives.from_dict({"name": "sce", "prior": "labells"})
