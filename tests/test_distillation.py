"""Distillation against straight lines that form all logits: exact, sampled, from stored classes."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.allocations import VocabularySized
from support.estimators import ratio_bias
from torch.nn.functional import kl_div

import sce_lm.ops.exact_divergence as core
import sce_lm.ops.teachers as teachers
from sce_lm import LogitTransform, SCEConfig
from sce_lm.distillation import HeadScores, StoredTopK, distillation_loss
from sce_lm.objectives.call import Call
from sce_lm.objectives.distilled_candidates import distilled_candidates
from sce_lm.ops.candidate_divergence import candidate_divergence
from sce_lm.ops.divergence import Divergence
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions
from sce_lm.ops.teachers import HeadTeacher

KINDS = ["forward_kl", "reverse_kl", "jsd"]
STORED_KINDS = [
    (kind, rest)
    for kind in KINDS
    for rest in ("ghost", "uniform", "drop")
    if (kind, rest) != ("reverse_kl", "drop")  # infinite, and refused
]
POSTS = [LogitTransform(), LogitTransform(0.3), LogitTransform(1.5, 2.0)]
TILED = {"BLOCK_ELEMENTS": 0, "TILE_POSITIONS": 5}
WAYS = [{}, {"BLOCK_ELEMENTS": 300, "MIN_BLOCK": 1}, TILED]


def trl_jsd(student_logits, teacher_logits, beta, temperature):
    """`GKDTrainer.generalized_jsd_loss` of TRL 1.16 before its reduction, summed over classes."""
    log_p = torch.log_softmax(student_logits / temperature, dim=-1)
    log_q = torch.log_softmax(teacher_logits / temperature, dim=-1)
    if beta == 0:
        jsd = kl_div(log_p, log_q, reduction="none", log_target=True)
    elif beta == 1:
        jsd = kl_div(log_q, log_p, reduction="none", log_target=True)
    else:
        share = torch.tensor(beta, dtype=log_p.dtype)
        mixture = torch.stack([log_p + torch.log1p(-share), log_q + torch.log(share)])
        log_m = torch.logsumexp(mixture, dim=0)
        of_teacher = kl_div(log_m, log_q, reduction="none", log_target=True)
        of_student = kl_div(log_m, log_p, reduction="none", log_target=True)
        jsd = beta * of_teacher + (1 - beta) * of_student
    return jsd.sum(dim=-1)


def beta_of(kind, beta=0.3):
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": beta}[kind]


def scores(positions, classes, width, seed, *, bias=True, rank=0, spread=1.0, **options):
    """Random HeadScores of fp64 leaves."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return HeadScores(
        normal(*positions, width + rank).requires_grad_(),
        (spread * normal(classes, width)).requires_grad_(),
        normal(classes).requires_grad_() if bias else None,
        normal(classes, rank).requires_grad_() if rank else None,
        **options,
    )


def leaves(s):
    return [t for t in (s.hidden_states, s.weight, s.bias, s.low_rank) if t is not None]


def logits(s):
    rows = s.weight if s.low_rank is None else torch.cat([s.weight, s.low_rank], dim=1)
    x = s.hidden_states @ rows.T
    return s.post(x if s.bias is None else x + s.bias)


def assert_same(loss, expected, inputs, **tolerance):
    torch.testing.assert_close(loss, expected, **tolerance)
    found = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    wanted = torch.autograd.grad(expected, inputs)
    for actual, second, want in zip(found, again, wanted):
        torch.testing.assert_close(actual, want, **tolerance)
        torch.testing.assert_close(second, want, **tolerance)


CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def way(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setattr(core, name, value)
    if request.param is TILED:
        monkeypatch.setattr(teachers, "TILE_CLASSES", 7)


@settings(max_examples=30)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 5)),
    st.integers(2, 50),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.booleans(), st.booleans(), st.integers(0, 2)),
    st.tuples(st.sampled_from(POSTS), st.sampled_from(POSTS)),
    st.tuples(st.sampled_from(KINDS), st.sampled_from([1.0, 0.7, 3.0])),
    st.sampled_from(WAYS),
    st.sampled_from(["mean", "sum", "none"]),
    st.integers(0, 10**6),
)
def test_equals_the_straight_line(
    shape, classes, widths, extras, posts, options, way, reduction, seed
):
    (kind, temperature), (student_bias, teacher_bias, rank) = options, extras
    student = scores(shape, classes, widths[0], seed, bias=student_bias, rank=rank, post=posts[0])
    teacher = scores(shape, classes, widths[1], seed + 1, bias=teacher_bias, post=posts[1])
    labels = torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))
    labels[0, 0] = -100
    expected = trl_jsd(logits(student), logits(teacher).detach(), beta_of(kind), temperature)
    expected = expected.masked_fill(labels == -100, 0.0)
    weights = torch.linspace(0.5, 1.5, labels.numel(), dtype=torch.float64).view(shape)
    count = int((labels != -100).sum())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in way.items():
            patch.setattr(core, name, value)
        patch.setattr(teachers, "TILE_CLASSES", 7)
        loss = distillation_loss(
            student,
            teacher,
            labels,
            divergence=kind,
            beta=0.3,
            temperature=temperature,
            reduction=reduction,
        )
        if reduction == "none":
            assert loss.shape == shape
            loss, expected = (loss * weights).sum(), (expected * weights).sum()
        else:
            expected = expected.sum() / (max(count, 1) if reduction == "mean" else 1)
        assert_same(loss, expected, leaves(student), **CLOSE)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_jsd_has_the_conventions_of_trl(beta):
    """fp32, to the precision of fp32: the value and the gradients of TRL's own expression."""
    student, teacher = (scores((4, 9), 211, 24, i, bias=False, spread=0.4) for i in (0, 1))
    student, teacher = (
        HeadScores(*(t.detach().float().requires_grad_() for t in leaves(s)))
        for s in (student, teacher)
    )
    loss = distillation_loss(student, teacher, divergence="jsd", beta=beta, temperature=2.0)
    expected = trl_jsd(logits(student), logits(teacher).detach(), beta, 2.0).mean()
    assert_same(loss, expected, leaves(student), rtol=1e-5, atol=1e-6)


def stored_log_probs(stored, classes):
    """The teacher that rest "uniform" or "drop" stands for, over all classes."""
    k = stored.ids.shape[-1]
    kept = stored.log_probs.exp()
    left = 1 - kept.sum(-1, keepdim=True)
    q = torch.zeros(*stored.ids.shape[:-1], classes, dtype=torch.float64)
    if stored.rest == "uniform":
        q += left / (classes - k)
    q = q.scatter(-1, stored.ids, kept)
    return (q / q.sum(-1, keepdim=True)).log().clamp_min(-1e30)


def ghost_jsd(student_logits, stored, beta):
    """Straight line over k + 1 classes."""
    log_p = torch.log_softmax(student_logits, dim=-1)
    kept = log_p.gather(-1, stored.ids)
    outside = torch.ones_like(log_p).scatter(-1, stored.ids, 0.0).bool()
    ghost = torch.logsumexp(log_p.masked_fill(~outside, -torch.inf), dim=-1, keepdim=True)
    rest = torch.log(1 - stored.log_probs.exp().sum(-1, keepdim=True))
    p, q = torch.cat([kept, ghost], -1), torch.cat([stored.log_probs, rest], -1)
    return trl_jsd_of_log_probs(p, q, beta)


def trl_jsd_of_log_probs(log_p, log_q, beta):
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return (q * (log_q - log_p)).sum(-1)
    if beta == 1:
        return (p * (log_p - log_q)).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log().clamp_min(-1e30)
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)


@pytest.mark.parametrize("way", WAYS, indirect=True, ids=["block", "blocks", "tiles"])
@pytest.mark.parametrize(("kind", "rest"), STORED_KINDS)
def test_stored_classes_equal_the_straight_line(kind, rest, way):
    student = scores((3, 4), 41, 5, 0, post=POSTS[2])
    teacher = scores((3, 4), 41, 6, 1, spread=0.5)
    stored = teacher.top_k(6, temperature=1.5, rest=rest)
    log_q = torch.log_softmax(logits(teacher).detach() / 1.5, dim=-1)
    best = log_q.topk(6)
    torch.testing.assert_close(stored.log_probs, best.values)
    assert torch.equal(stored.ids, best.indices)
    s = logits(student) / 1.5
    if rest == "ghost":
        expected = ghost_jsd(s, stored, beta_of(kind)).mean()
    else:
        log_q = stored_log_probs(stored, 41)
        expected = trl_jsd_of_log_probs(torch.log_softmax(s, -1), log_q, beta_of(kind)).mean()
    loss = distillation_loss(student, stored, divergence=kind, beta=0.3, temperature=1.5)
    assert_same(loss, expected, leaves(student), **CLOSE)


@pytest.mark.parametrize(("kind", "rest"), STORED_KINDS)
def test_all_classes_stored_are_the_whole_teacher(kind, rest):
    student, teacher = scores((7,), 19, 5, 0), scores((7,), 19, 6, 1)
    whole = distillation_loss(student, teacher, divergence=kind)
    stored = distillation_loss(student, teacher.top_k(19, rest=rest), divergence=kind)
    assert_same(stored, whole, leaves(student), **CLOSE)


WHOLE = SCEConfig(tail_candidates=10**6, num_buckets=0)
BUCKETS = SCEConfig(tail_candidates=10, num_buckets=3, bucket_candidates=100)
SAMPLED = SCEConfig(bucket_sampling="priority", num_buckets=3, bucket_candidates=100)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [WHOLE, BUCKETS, SAMPLED], ids=["tail", "buckets", "samples"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_candidates_that_are_the_catalogue_give_the_exact_loss(kind, config, reduction):
    student = scores((40,), 97, 5, 0, rank=1, post=POSTS[2])
    teacher = scores((40,), 97, 6, 1, post=POSTS[1])
    labels = torch.randint(97, (40,), generator=torch.Generator().manual_seed(0))
    labels[::5] = -100
    options = {"divergence": kind, "temperature": 2.0, "reduction": reduction}
    stored = [teacher.top_k(5, temperature=2.0, rest=r) for r in ("ghost", "uniform")]
    for theirs in (teacher, *(stored if config is not SAMPLED else ())):
        exact = distillation_loss(student, theirs, labels, **options).sum()
        sampled = distillation_loss(student, theirs, labels, objective=config, **options).sum()
        assert_same(sampled, exact, leaves(student), **CLOSE)


SMALL = {"shared_frequent": 8, "tail_candidates": 100, "uniform_floor": 0.3}
SAMPLES = {
    "tail": SCEConfig(num_buckets=0, **SMALL),
    "buckets": SCEConfig(num_buckets=2, bucket_candidates=12, **SMALL),
    "samples": SCEConfig(
        num_buckets=2,
        bucket_sampling="priority",
        bucket_candidates=120,
        shared_frequent=8,
        uniform_floor=0.3,
    ),
}


def log_sums(config, draws, plant=lambda candidates: candidates):
    """Over draws: logs of Zhat / Z of student and teacher, and Xhat / X of the cross term
    ``sum_j exp(x_j) (x_j - s_j)`` (as a ratio), ``[N]`` each, by way of what the loss returns."""
    student = scores((12,), 240, 8, 3, spread=0.2, post=LogitTransform(0.6, 12.0))
    teacher = scores((12,), 240, 6, 4, spread=0.2)
    with torch.no_grad():
        teacher.bias.mul_(0.5).add_(2.0)  # so that x - s, and the cross term, are not around 0
    s, x = logits(student).detach(), logits(teacher).detach()
    head = Head(student.weight.detach(), None, student.bias.detach(), student.post)
    theirs = HeadTeacher(
        Head(teacher.weight.detach(), None, teacher.bias.detach()), teacher.hidden_states.detach()
    )
    positions = Positions(student.hidden_states.detach(), torch.arange(12) * 7)
    z, of_teacher = s.logsumexp(1), x.logsumexp(1)
    cross = (x.exp() * (x - s)).sum(1)
    found = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        candidates = plant(
            distilled_candidates(config, head, positions, theirs, Call(), None, generator)
        )
        with torch.no_grad():
            loss, ours, their = candidate_divergence(
                head, positions, candidates, theirs, Divergence("forward_kl")
            )
        # loss = Xhat / Zhat_T - log Zhat_T + log Zhat_S
        mine = (loss + their - ours) * their.exp()
        found.append(torch.stack([ours - z, their - of_teacher, (mine / cross).log()]))
    return ratio_bias(found)


@pytest.fixture
def few_classes(monkeypatch):
    monkeypatch.setattr("sce_lm.objectives.distilled_candidates.TEACHER_CLASSES", 12)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(SAMPLES["tail"], marks=pytest.mark.slow),
        SAMPLES["buckets"],
        SAMPLES["samples"],
    ],
    ids=list(SAMPLES),
)
def test_every_sum_is_unbiased(config, few_classes):
    bias = log_sums(config, 500)
    assert (bias.standard_error > 0).all()
    assert (bias.standard_error <= 0.005).all(), bias.standard_error.amax()
    assert bias.is_zero, bias


@pytest.mark.parametrize("config", SAMPLES.values(), ids=SAMPLES)
def test_sums_without_weights_are_found_out(config, few_classes):
    def forget(candidates):
        name = "tail_log_weights" if len(candidates.tail) else "bucket_log_weights"
        weights = torch.zeros_like(getattr(candidates, name))
        return dataclasses.replace(candidates, **{name: weights})

    assert not log_sums(config, 100, forget).is_zero


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_sample_is_that_of_its_loss(kind, few_classes):
    student, teacher = scores((9,), 90, 4, 0, post=POSTS[2]), scores((9,), 90, 3, 1)

    def loss(*tensors):
        return distillation_loss(
            HeadScores(*tensors, post=POSTS[2]),
            teacher,
            divergence=kind,
            objective=SCEConfig(tail_candidates=20, num_buckets=2, bucket_candidates=9),
            generator=torch.Generator().manual_seed(0),
        )

    tensors = leaves(student)
    wanted = torch.autograd.grad(loss(*tensors), tensors)
    for i, (tensor, want) in enumerate(zip(tensors, wanted)):
        step = torch.randn(tensor.shape, dtype=torch.float64) * 1e-6
        # Buckets may follow the hidden states: a step this small moves none.
        up, down = (
            [t + sign * step if j == i else t for j, t in enumerate(tensors)] for sign in (1, -1)
        )
        slope = (loss(*up) - loss(*down)) / 2
        torch.testing.assert_close(slope, (want * step).sum(), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    "objective", ["exact", SCEConfig(tail_candidates=64)], ids=["exact", "sce"]
)
def test_nothing_holds_a_logit_for_every_position(objective, monkeypatch):
    monkeypatch.setattr(core, "BLOCK_ELEMENTS", 40 * 3001)
    student, teacher = (scores((300,), 3001, 4, i) for i in (0, 1))
    with VocabularySized(100, 3001) as seen:
        distillation_loss(student, teacher, objective=objective, divergence="jsd").backward()
    assert seen.count == 0
    with VocabularySized(100, 3001) as seen:
        trl_jsd(logits(student), logits(teacher), 0.5, 1.0).mean().backward()
    assert seen.count > 0


@pytest.mark.parametrize("way", [{}, TILED], indirect=True, ids=["block", "tiles"])
@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_a_bias_keeps_out(kind, way):
    student, teacher = scores((6,), 30, 4, 0), scores((6,), 30, 5, 1)
    bias = torch.zeros(30, dtype=torch.float64)
    bias[20:] = -torch.inf
    ours = HeadScores(student.hidden_states, student.weight, bias)
    theirs = HeadScores(teacher.hidden_states, teacher.weight, bias)
    cut = [HeadScores(t.hidden_states, t.weight[:20]) for t in (student, teacher)]
    loss = distillation_loss(ours, theirs, divergence=kind)
    expected = distillation_loss(*cut, divergence=kind)
    assert_same(loss, expected, [student.hidden_states, student.weight], **CLOSE)


@pytest.mark.parametrize(
    "objective", ["exact", SCEConfig(tail_candidates=64)], ids=["exact", "sce"]
)
def test_half_precision_is_near_to_double(objective):
    student, teacher = scores((50,), 700, 32, 0, spread=0.2), scores((50,), 700, 16, 1, spread=0.3)
    low = [
        HeadScores(*(t.detach().bfloat16().requires_grad_() for t in leaves(s)))
        for s in (student, teacher)
    ]
    high = [HeadScores(*(t.detach().double().requires_grad_() for t in leaves(s))) for s in low]
    losses = [
        distillation_loss(*pair, objective=objective, generator=torch.Generator().manual_seed(0))
        for pair in (low, high)
    ]
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-4, atol=1e-5)
    for mine, want in zip(
        *(torch.autograd.grad(a, leaves(b[0])) for a, b in zip(losses, (low, high)))
    ):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - want).norm() <= 0.01 * want.norm()


def test_a_sparse_gradient_is_the_dense_one():
    student, teacher = scores((20,), 900, 4, 0, bias=False), scores((20,), 900, 3, 1)
    found = []
    for sparse in (False, True):
        config = SCEConfig(tail_candidates=30, shared_frequent=5, sparse_grad=sparse)
        loss = distillation_loss(
            student, teacher, objective=config, generator=torch.Generator().manual_seed(0)
        )
        found.append(torch.autograd.grad(loss, student.weight)[0])
        assert found[-1].is_sparse == sparse
    assert found[1]._nnz() < 900
    torch.testing.assert_close(found[1].to_dense(), found[0])


def test_no_position_that_counts():
    student, teacher = scores((2, 3), 9, 4, 0), scores((2, 3), 9, 5, 1)
    labels = torch.full((2, 3), -100)
    for objective in ("exact", SCEConfig()):
        loss = distillation_loss(student, teacher, labels, objective=objective)
        loss.backward()
        assert loss == 0
        assert (student.weight.grad == 0).all()
    none = distillation_loss(student, teacher, labels, reduction="none")
    assert none.shape == (2, 3)


def test_items_of_the_whole_batch_divide_the_sum():
    student, teacher = scores((8,), 9, 4, 0), scores((8,), 9, 5, 1)
    total = distillation_loss(student, teacher, reduction="sum")
    loss = distillation_loss(student, teacher, num_items_in_batch=torch.tensor(32))
    torch.testing.assert_close(loss, total / 32)


def ok():
    return scores((4,), 9, 3, 0), scores((4,), 9, 5, 1)


STORED = StoredTopK(torch.zeros(4, 1, dtype=torch.int64), torch.full((4, 1), -0.5))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s, t: (s, scores((4,), 10, 5, 1), {}), ValueError, "10 classes and the student 9"),
        (lambda s, t: (s, scores((5,), 9, 5, 1), {}), ValueError, "same positions"),
        (lambda s, t: (s, t, {"temperature": 0.0}), ValueError, "temperature is 0.0"),
        (lambda s, t: (s, t, {"temperature": -1}), ValueError, "temperature is -1"),
        (lambda s, t: (s, t, {"divergence": "kl"}), ValueError, "divergence is 'kl'"),
        (lambda s, t: (s, t, {"beta": 1.5}), ValueError, "beta is 1.5"),
        (lambda s, t: (s, t, {"objective": "sce"}), TypeError, 'pass "exact" or an SCEConfig'),
        (lambda s, t: (s.weight, t, {}), TypeError, "the student is a Tensor"),
        (lambda s, t: (s, (1, 2), {}), TypeError, "the teacher is a tuple"),
        (lambda s, t: (s, t, {"objective": SCEConfig(control_variate=True)}), ValueError, "two"),
        (lambda s, t: (s, t, {"objective": SCEConfig(labels_first=3)}), ValueError, "labels_first"),
        (
            lambda s, t: (s, dataclasses.replace(t, hidden_states=t.hidden_states[:, :2]), {}),
            ValueError,
            "of the teacher: hidden_states has shape",
        ),
        (
            lambda s, t: (dataclasses.replace(s, weight=s.weight[0]), t, {}),
            ValueError,
            "of the student: weight has shape",
        ),
        (
            lambda s, t: (s, dataclasses.replace(STORED, log_probs=STORED.log_probs + 0.6), {}),
            ValueError,
            "add up to a probability of 1.1",
        ),
        (
            lambda s, t: (s, dataclasses.replace(STORED, ids=STORED.ids + 9), {}),
            ValueError,
            r"ids holds 9, outside \[0, 9\)",
        ),
        (
            lambda s, t: (s, StoredTopK(STORED.ids.expand(4, 2), torch.full((4, 2), -1.0)), {}),
            ValueError,
            "a class twice",
        ),
        (
            lambda s, t: (s, dataclasses.replace(STORED, ids=STORED.ids[:2]), {}),
            ValueError,
            "pass the same",
        ),
        (lambda s, t: (s, STORED, {"temperature": 2.0}), ValueError, "was stored at 1.0"),
        (
            lambda s, t: (
                s,
                dataclasses.replace(STORED, rest="drop"),
                {"divergence": "reverse_kl"},
            ),
            ValueError,
            "infinite",
        ),
        (lambda s, t: (s, dataclasses.replace(STORED, rest="x"), {}), ValueError, "rest is 'x'"),
    ],
)
def test_bad_input_is_told_in_one_sentence(change, error, words):
    student, teacher, options = change(*ok())
    with pytest.raises(error, match=words) as caught:
        distillation_loss(student, teacher, **options)
    assert str(caught.value).count(". ") == 0
    assert "\n" not in str(caught.value)


def test_formed_logits_are_refused():
    with pytest.raises(TypeError, match="pass lazy logits"):
        HeadScores.of(torch.zeros(2, 3))
