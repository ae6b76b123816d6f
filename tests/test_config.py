"""SCEConfig: what it refuses, how "auto" resolves, how it prints."""

import dataclasses
import inspect

import pytest

from sce_lm import SCEConfig
from sce_lm.config import PublishedSCEConfig, PublishedSCESizes, SCESizes

REFUSED = {
    "an unknown sampling": {"bucket_sampling": "topk"},
    "a negative size": {"tail_candidates": -1},
    "a fractional size": {"num_buckets": 2.5},
    "a bool as a size": {"tail_candidates": True},
    "power": {"prior_power": 1.5},
    "no floor": {"uniform_floor": 0.0},
    "control without tail": {"tail_candidates": 0, "control_variate": True},
    "candidates of no bucket": {"num_buckets": 0, "bucket_candidates": 10},
    "an unknown prior": {"prior": "labells"},
    "an unknown part of a prior": {"prior": {"labels": 1.0, "past": 1.0}},
    "a prior with a negative share": {"prior": {"labels": -1.0}},
    "a prior without parts": {"prior": {}},
    "a prior of another type": {"prior": ["labels"]},
    "bucket samples without buckets": {"bucket_sampling": "priority", "num_buckets": 0},
    "bucket samples with a tail": {"bucket_sampling": "priority", "tail_candidates": 10},
    "bucket samples with control": {"bucket_sampling": "priority", "control_variate": True},
    "labels first without labels": {"labels_first": 3, "shared_labels": False},
    "row control without a tail": {"row_control_variate": True, "tail_candidates": 0},
    "row control and sparse_grad": {"row_control_variate": True, "sparse_grad": True},
    "a target of nothing": {"target_relative_error": 0.0},
    "a target without a tail": {"target_relative_error": 0.1, "tail_candidates": 0},
    "a target for bucket samples": {
        "target_relative_error": 0.1,
        "bucket_sampling": "priority",
    },
    "nothing left": {
        "num_buckets": 0,
        "tail_candidates": 0,
        "shared_labels": False,
        "shared_frequent": 0,
    },
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_refused(options):
    with pytest.raises(ValueError, match=r"SCEConfig.*(give|choose|use|change|leave)"):
        SCEConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0; give a positive number"),
        ({"beta": float("inf")}, "beta is inf; give a positive number"),
        ({"num_buckets": 0}, 'num_buckets is 0; give an integer from 1 up, or "auto"'),
        ({"bucket_positions": 2.5}, "bucket_positions is 2.5; give an integer"),
        ({"bucket_candidates": "auto"}, "bucket_candidates is 'auto'; give an integer from 1 up"),
        ({"mix": "yes"}, "mix is 'yes'; choose one of True, False"),
        ({"reduce": "sum"}, "reduce is 'sum'; choose one of 'max', 'mean'"),
    ],
)
def test_published_refuses(options, message):
    with pytest.raises(ValueError, match=f"PublishedSCEConfig.{message}"):
        SCEConfig.published(**options)


@pytest.mark.parametrize("n", [1, 31, 4096])
@pytest.mark.parametrize("v", [2, 500, 32_768, 262_144])
@pytest.mark.parametrize(
    "config",
    [
        SCEConfig(),
        SCEConfig.published(),
        SCEConfig.published(mix=False, alpha=8),
        SCEConfig(num_buckets=4, tail_candidates=0, control_variate=False),
        SCEConfig(num_buckets=64),
        SCEConfig(bucket_sampling="priority"),
    ],
    ids=["default", "published", "random", "uncorrected", "buckets", "bucket samples"],
)
def test_auto_resolves_within_the_problem(config, n, v):
    sizes = config.resolve(n, v)
    assert "auto" not in dataclasses.asdict(sizes).values()
    assert sizes.bucket_candidates <= v
    assert getattr(sizes, "tail_candidates", 0) <= v
    assert sizes.bucket_positions <= n
    assert sizes.num_buckets >= (not isinstance(config, SCEConfig))


def test_control_variate_follows_the_past_only_when_auto():
    assert not SCEConfig().resolve(100, 1000, prefer_control_variate=False).control_variate
    assert SCEConfig(control_variate=True).resolve(100, 1000, False).control_variate
    assert not SCEConfig(tail_candidates=0).resolve(100, 1000).control_variate


def test_every_field_is_documented_and_printed():
    for config_class in (SCEConfig, SCESizes, PublishedSCEConfig, PublishedSCESizes):
        classes = [base for base in config_class.__mro__ if base is not object]
        source = "".join(map(inspect.getsource, classes))
        for field in dataclasses.fields(config_class):
            start = source.index(f"    {field.name}: ")
            following = source[source.index("\n", start) + 1 :]
            assert following.lstrip().startswith('"""'), field.name
    for config in (SCEConfig(num_buckets=77), SCEConfig.published(num_buckets=77)):
        lines = str(config).splitlines()
        assert len(lines) == len(dataclasses.fields(config))
        assert any(line.split() == ["num_buckets", "77"] for line in lines)


@pytest.mark.parametrize(
    ("n", "buckets"), [(1, 1), (100, 6), (511, 16), (2048, 32), (8192, 64), (100_000, 64)]
)
def test_a_wide_head_has_sampled_buckets(n, buckets):
    for v, candidates in ((30_000, 4096), (262_144, 8192)):
        sizes = SCEConfig().resolve(n, v, width=640)
        assert (sizes.num_buckets, sizes.bucket_candidates) == (buckets, candidates)
        assert (sizes.shared_frequent, sizes.tail_candidates) == (1024, 0)
        assert sizes.bucket_sampling == "priority"
        assert sizes.row_control_variate
    assert not SCEConfig(sparse_grad=True).resolve(n, 10**6).row_control_variate


@pytest.mark.parametrize(
    "options",
    [
        {"tail_candidates": 100},
        {"tail_candidates": 0},
        {"control_variate": True},
        {"target_relative_error": 0.1},
        {"sparse_grad": True},
        {"bucket_sampling": "top"},
        {"num_buckets": 0},
    ],
    ids=str,
)
def test_who_asks_for_a_tail_has_one(options):
    sizes = SCEConfig(**options).resolve(4096, 100_000, width=640)
    assert sizes.bucket_sampling == "top"
    assert (sizes.tail_candidates > 0) == (options.get("tail_candidates") != 0)
    assert not sizes.row_control_variate


@pytest.mark.parametrize(
    ("n", "v", "buckets", "candidates"),
    [
        (4096, 50_000, 0, 0),
        (8192, 262_144, 64, 4096),
        (2048, 151_936, 55, 1216),
        (512, 70_000, 16, 1024),
        (100_000, 100_000, 64, 4096),
        (4096, 10_000_000, 0, 0),
    ],
)
def test_auto_sizes_of_a_narrow_head(n, v, buckets, candidates):
    sizes = SCEConfig().resolve(n, v, width=64)
    assert (sizes.num_buckets, sizes.bucket_candidates) == (buckets, candidates)
    expected = (1024, 2048) if buckets else (2048, 4096)
    assert (sizes.shared_frequent, sizes.tail_candidates) == expected


def test_auto_floor_falls_with_the_labels_seen():
    floors = [SCEConfig().resolve(10, 1000, num_labels=n).uniform_floor for n in (0, 1000, 10**7)]
    assert floors == [1.0, 0.5, 0.03]
    assert SCEConfig(uniform_floor=0.2).resolve(10, 1000, num_labels=10**7).uniform_floor == 0.2


def test_auto_floor_trusts_what_does_not_hang_on_labels():
    floors = [
        SCEConfig(prior=prior).resolve(10, 1000).uniform_floor
        for prior in ("gradient", {"labels": 1, "gradient": 3})
    ]
    assert floors == [0.03, 0.25]


def test_shares_of_a_prior_sum_to_1():
    assert SCEConfig(prior="gradient").prior_shares() == {"gradient": 1.0}
    mixed = SCEConfig(prior={"labels": 3, "uniform": 1}).prior_shares()
    assert mixed == {"labels": 0.75, "uniform": 0.25}
