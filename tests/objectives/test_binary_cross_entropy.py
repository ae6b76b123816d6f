"""BCE and gBCE: the papers' formulas, given the same negatives."""

import pytest
import torch
from support.problems import gradients, make_problem

import sce_lm.objectives.binary_cross_entropy as module
from sce_lm import LogitTransform, objectives
from sce_lm.objectives.reference import binary_reference

V = 90
POST = LogitTransform(0.7, 3.0)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "beta"),
    [
        ("bce", {"num_negatives": 1}, 1.0),
        ("bce", {"num_negatives": 40}, 1.0),
        ("gbce", {"num_negatives": 40, "t": 0.0}, 1.0),
        ("gbce", {"num_negatives": 40, "t": 1.0}, 40 / 89),
        ("gbce", {"num_negatives": 40}, 1 - 0.75 * (1 - 40 / 89)),
        ("gbce", {"num_negatives": 500}, 1.0),
    ],
)
def test_equals_the_formula(name, options, beta, shared, monkeypatch):
    problem = make_problem(37, V, 6)
    drawn = []
    draw = module.Uniform.draw
    monkeypatch.setattr(
        module.Uniform, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1]
    )
    estimator = objectives.get(name, shared=shared, **options)
    loss = estimator(*problem[:3], bias=problem.bias, post=POST)
    assert drawn[0].shape == (1 if shared else 37, options["num_negatives"])
    ids = drawn[0].expand(37, -1)
    expected = binary_reference(problem.head(POST), problem.positions(), ids, beta=beta).mean()
    torch.testing.assert_close(loss, expected)
    for mine, want in zip(gradients(loss, problem), gradients(expected, problem)):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-9)


def test_beta_is_the_papers():
    config = objectives.GBCEConfig(num_negatives=256, t=0.75)
    alpha = 256 / (10_000 - 1)
    assert config.positive_weight(10_000) == pytest.approx(
        alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)
    )


def test_positive_is_that_of_the_published_transform():
    """log(1 / (sigmoid(s)^-beta - 1)) under binary cross-entropy is beta·softplus(-s)."""
    s, beta = torch.linspace(-8, 8, 33, dtype=torch.float64), 0.3
    mapped = torch.log(1 / (torch.sigmoid(s) ** -beta - 1))
    published = torch.nn.functional.binary_cross_entropy_with_logits(
        mapped, torch.ones_like(mapped), reduction="none"
    )
    torch.testing.assert_close(published, beta * torch.nn.functional.softplus(-s))


def test_negatives_are_uniform():
    generator = torch.Generator().manual_seed(0)
    seen = torch.bincount(module.Uniform(V).draw((300, 300), generator).flatten(), minlength=V)
    chi_square = ((seen - 1000.0).square() / 1000.0).sum()
    assert chi_square < 89 + 5 * (2 * 89) ** 0.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bce", {"num_negatives": 0}, "BCEConfig.num_negatives is 0"),
        ("bce", {"t": 0.5}, "objective 'bce' has no option 't'"),
        ("gbce", {"t": 1.5}, "GBCEConfig.t is 1.5; give one in \\[0, 1\\]"),
    ],
)
def test_bad_options_are_one_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        objectives.get(name, **options)
