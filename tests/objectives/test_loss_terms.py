"""z_loss, label_smoothing and token_weights: the stock formulas where the candidates are all
classes, and elsewhere what autograd makes of the objectives' own sums."""

import pytest
import torch
from support.problems import gradients, make_problem
from torch.nn.functional import cross_entropy

from sce_lm import LogitTransform, SCEConfig, objectives, sce_loss
from sce_lm.config import LikelihoodConfig
from sce_lm.ops.head import Head
from sce_lm.ops.mean_logits import mean_logits
from sce_lm.ops.positions import Positions

V = 60
WHOLE = {
    "exact": {"name": "exact"},
    "sce": {"name": "sce", "num_buckets": 0, "tail_candidates": V},
    "sce, buckets": {"name": "sce", "num_buckets": 3, "bucket_candidates": V},
    "sce, shared": {"name": "sce", "num_buckets": 0, "shared_frequent": V},
    "sampled_softmax": {
        "name": "sampled_softmax",
        "num_negatives": V,
        "sampling": "priority",
    },
    "rece": {"name": "rece", "num_buckets": 1},
    "published": {
        "name": "sce",
        "published": True,
        "num_buckets": 2,
        "bucket_positions": 40,
        "bucket_candidates": V,
    },
}
"""Objectives whose candidates are all classes: exact cross-entropy."""
SMOOTHED = [name for name in WHOLE if name not in ("rece", "published")]
SAMPLED = {
    "sce": {"name": "sce", "num_buckets": 3, "bucket_candidates": 7, "tail_candidates": 12},
    "sce, no control": {"name": "sce", "tail_candidates": 12, "control_variate": False},
    "sce, bucket samples": {"name": "sce", "bucket_sampling": "priority", "bucket_candidates": 9},
    "sampled_softmax": {"name": "sampled_softmax", "num_negatives": 12},
    "own negatives": {"name": "sampled_softmax", "num_negatives": 12, "shared": False},
    "kernel": {"name": "kernel", "num_negatives": 9},
    "published": {"name": "sce", "published": True, "bucket_candidates": 9},
    "published mean": {
        "name": "sce",
        "published": True,
        "bucket_candidates": 9,
        "reduce": "mean",
    },
    "in_batch": {"name": "in_batch"},
    "rece": {"name": "rece", "rounds": 2},
    "bir": {"name": "bir", "num_negatives": 15},
    "xir": {"name": "xir", "num_negatives": 30, "correction": "importance"},
}
"""Objectives that see a part of the classes."""


def stock(problem, post=LogitTransform(), *, z_loss=0.0, smoothing=0.0, weights=None):
    """By F.cross_entropy on full logits, a loss for each position."""
    logits = post(problem.hidden @ problem.weight.T + problem.bias)
    losses = cross_entropy(logits, problem.labels, reduction="none", label_smoothing=smoothing)
    losses = losses + z_loss * torch.logsumexp(logits, dim=1) ** 2
    return losses if weights is None else losses * weights


def seeded(options, problem, **arguments):
    generator = torch.Generator().manual_seed(3)
    call = objectives.get(**options)
    return call(*problem[:3], bias=problem.bias, generator=generator, **arguments)


def assert_same(found, expected, problem):
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, problem), gradients(expected, problem))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_whole_catalogue_is_the_stock_formula(name, reduction, scale):
    problem, post = make_problem(40, V, 5), LogitTransform(scale)
    smoothing = 0.1 if name in SMOOTHED else 0.0
    terms = {"z_loss": 0.03} | ({"label_smoothing": smoothing} if smoothing else {})
    weights = torch.rand(40, generator=torch.Generator().manual_seed(0))
    options = {"reduction": reduction, "token_weights": weights, "post": post}
    loss = seeded(WHOLE[name] | terms, problem, **options)
    expected = stock(problem, post, z_loss=0.03, smoothing=smoothing, weights=weights)
    if reduction == "none":
        torch.testing.assert_close(loss, expected)
        loss, expected = (loss**2).sum(), (expected**2).sum()
    else:
        expected = expected.mean()
    assert_same(loss, expected, problem)


SMOOTHABLE = [
    name
    for name, options in SAMPLED.items()
    if isinstance(objectives.get(**options).config, LikelihoodConfig)
]


def label_logits(problem, post):
    raw = (problem.hidden * problem.weight[problem.labels]).sum(dim=1)
    return post(raw + problem.bias[problem.labels])


@pytest.mark.parametrize("name", [n for n in SAMPLED if n != "published mean"])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_z_loss_is_the_square_of_the_objectives_own_sum(name, soft_cap):
    """log Zhat is loss + s_y, of which autograd makes what z_loss adds."""
    problem, post = make_problem(40, V, 5), LogitTransform(soft_cap=soft_cap)

    def expected():
        plain = seeded(SAMPLED[name], problem, reduction="none", post=post)
        log_z = (plain + label_logits(problem, post)) * (plain != 0)  # 0: not covered
        return plain + 0.05 * log_z.square()

    def found(**options):
        return seeded(SAMPLED[name] | {"z_loss": 0.05}, problem, post=post, **options)

    assert_same(found(reduction="none").square().sum(), expected().square().sum(), problem)
    # A scalar takes its gradients in the forward pass.
    each = expected()
    assert_same(found(), each.sum() / (each != 0).sum(), problem)


@pytest.mark.parametrize("name", SMOOTHABLE)
def test_smoothing_hangs_on_no_draw(name):
    """What it adds to a loss is eps·(s_y - mean s)."""
    problem, post = make_problem(40, V, 5), LogitTransform(1.3)

    def expected():
        logits = post(problem.hidden @ problem.weight.T + problem.bias)
        plain = seeded(SAMPLED[name], problem, reduction="none", post=post)
        return plain + 0.2 * (label_logits(problem, post) - logits.mean(dim=1))

    def found(**options):
        return seeded(SAMPLED[name] | {"label_smoothing": 0.2}, problem, post=post, **options)

    assert_same(found(), expected().mean(), problem)
    assert_same(found(reduction="none").square().sum(), expected().square().sum(), problem)


def test_terms_of_a_position_in_several_buckets():
    """Each bucket's loss has a penalty of its own, and their mean is taken."""
    problem = make_problem(40, V, 5)
    options = SAMPLED["published mean"]
    plain = seeded(options, problem, reduction="none")
    found = seeded(options | {"z_loss": 0.05}, problem, reduction="none")
    squares = (found - plain)[plain != 0] / 0.05
    log_z = (plain + label_logits(problem, LogitTransform()))[plain != 0]
    assert (squares >= log_z.square() - 1e-9).all()  # Jensen
    assert (found[plain == 0] == 0).all()


def test_mean_logits_of_a_head_in_parts():
    """A low-rank operand, a bias, and masked classes, whose logits are -inf."""
    problem = make_problem(8, V, 5)
    low_rank = torch.randn(V, 2, dtype=torch.float64, requires_grad=True)
    hidden = torch.cat([problem.hidden, problem.hidden[:, :2]], dim=1)
    masked = torch.tensor([3, 17])
    kept = torch.tensor([j for j in range(V) if j not in (3, 17)])
    bias = problem.bias.index_fill(0, masked, -torch.inf)
    head = Head(problem.weight, low_rank, bias, LogitTransform(0.5), masked, kept)
    found = mean_logits(head, Positions(hidden, problem.labels))
    logits = 0.5 * (hidden @ torch.cat([problem.weight, low_rank], dim=1).T + bias)
    expected = logits[:, kept].mean(dim=1)
    torch.testing.assert_close(found, expected)
    factors = torch.arange(8.0, dtype=torch.float64)
    tensors = [*problem.parameters, low_rank]
    mine, theirs = (
        torch.autograd.grad(mean @ factors, tensors, retain_graph=True)
        for mean in (found, expected)
    )
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", [*WHOLE, *SAMPLED])
@pytest.mark.parametrize("ignored", [False, True])
def test_token_weights_scale_each_loss(name, ignored):
    """The labels and draws are the same; "mean" and num_items_in_batch count positions."""
    options = (WHOLE | SAMPLED)[name]
    problem, weights = make_problem(40, V, 5), torch.linspace(0, 2, 40)
    if ignored:
        problem.labels[::3] = -100
        weights[::3] = torch.nan  # is not looked at

    def expected():
        losses = seeded(options, problem, reduction="none")
        return losses[losses != 0] @ weights[losses != 0].double(), (losses != 0).sum()

    total, count = expected()
    covered = seeded(options, problem, return_stats=True)[1].coverage
    assert_same(seeded(options, problem, token_weights=weights), total / count, problem)
    total = expected()[0] / covered
    found = seeded(options, problem, token_weights=weights, num_items_in_batch=torch.tensor(50))
    assert_same(found, total / 50, problem)


def test_a_weighted_mean_is_that_of_cross_entropy():
    """F.cross_entropy divides by the sum of the weights, which it takes by class."""
    problem, by_class = make_problem(40, V, 5), torch.rand(V, dtype=torch.float64)
    logits = problem.hidden @ problem.weight.T + problem.bias
    weights = by_class[problem.labels]
    found = seeded(WHOLE["exact"], problem, token_weights=weights, num_items_in_batch=weights.sum())
    assert_same(found, cross_entropy(logits, problem.labels, by_class), problem)


def test_sce_loss_takes_token_weights_and_terms():
    problem, weights = make_problem(40, V, 5), torch.rand(40, dtype=torch.float64)
    config = SCEConfig(tail_candidates=V, z_loss=0.01, label_smoothing=0.1)
    found = sce_loss(*problem[:3], bias=problem.bias, config=config, token_weights=weights)
    expected = stock(problem, z_loss=0.01, smoothing=0.1, weights=weights).mean()
    assert_same(found, expected, problem)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"token_weights has shape \(3,\) but labels has \(8,\); pass one weight"),
        (-torch.ones(8), "token_weights holds -1.0; give each position with a label a finite"),
        (torch.full((8,), torch.nan), "token_weights holds nan; give"),
        (torch.full((8,), torch.inf), "token_weights holds inf; give"),
    ],
)
def test_wrong_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        seeded(WHOLE["exact"], make_problem(8, V, 5), token_weights=weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "bce", "z_loss": 0.1}, "'bce' has no option 'z_loss'"),
        ({"name": "gbce", "label_smoothing": 0.1}, "'gbce' has no option 'label_smoothing'"),
        ({"name": "rece", "label_smoothing": 0.1}, "'rece' has no option 'label_smoothing'"),
        ({"name": "exact", "z_loss": -1.0}, "ExactConfig.z_loss is -1.0; give a number from 0"),
        ({"name": "exact", "z_loss": True}, "ExactConfig.z_loss is True; give a number from 0"),
        ({"name": "exact", "label_smoothing": 1.5}, r"label_smoothing is 1.5; give one in \[0, 1"),
        (
            {"name": "sce", "label_smoothing": 0.1, "sparse_grad": True},
            "has a gradient for every row of the head, and sparse_grad=True",
        ),
        (
            {"name": "sce", "label_smoothing": 0.1, "tail_candidates": 0, "num_buckets": 4},
            "the partition function without a tail holds a part; give tail_candidates",
        ),
        (
            {"name": "sce", "label_smoothing": 0.1, "labels_first": 3},
            r"the first calls \(labels_first=3\) see the batch's labels; leave one",
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.get(**options)


@pytest.mark.parametrize("post", [LogitTransform(soft_cap=3.0), LogitTransform(0.7)])
def test_exact_loss_with_terms(post):
    """Soft-capped logits are summed in a stream; accuracy and confidence are those without."""
    problem = make_problem(40, V, 5)
    expected = stock(problem, post, z_loss=0.03, smoothing=0.1)
    options = {"name": "exact", "z_loss": 0.03, "label_smoothing": 0.1}
    loss, found = seeded(options, problem, post=post, return_stats=True)
    assert_same(loss, expected.mean(), problem)
    plain = seeded({"name": "exact"}, problem, post=post, return_stats=True)[1]
    assert torch.equal(found.correct, plain.correct)
    torch.testing.assert_close(found.confidence, plain.confidence)


def test_smoothing_of_soft_capped_logits_is_left_to_the_exact_loss():
    problem, post = make_problem(8, V, 5), LogitTransform(soft_cap=3.0)
    with pytest.raises(ValueError, match=r"label_smoothing needs the sum of all logits"):
        seeded(SAMPLED["sce"] | {"label_smoothing": 0.1}, problem, post=post)


def test_kernels_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match='cannot run with backend="triton"'):
        seeded({"name": "exact", "z_loss": 0.1, "backend": "triton"}, make_problem(8, V, 5))


def test_terms_are_saved():
    options = {"name": "sce", "z_loss": 1e-4, "label_smoothing": 0.1}
    saved = objectives.get(**options).to_dict()
    assert saved.items() >= options.items()
    assert objectives.from_dict(saved).config == SCEConfig(z_loss=1e-4, label_smoothing=0.1)
