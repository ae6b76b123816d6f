"""BIR and XIR: the published loss, what it weighs by, and the corrected form's Monte-Carlo test."""

import pytest
import torch
from support.monte_carlo import PAST, V, call_bias, peaked_problem, pool_bias
from support.problems import gradients, make_problem

import sce_lm.objectives.xir as module
from sce_lm import LogitTransform, objectives
from sce_lm.candidates.cache import DRAWN, OCCURRENCES
from sce_lm.objectives.reference import position_reference
from sce_lm.ops.head import Head
from sce_lm.ops.positions import Positions

PLAIN, CAP = LogitTransform(), LogitTransform(1.2, 12.0)


def estimator(name, **options):
    """With a past of labels and, for XIR, of draws that met the classes with large logits."""
    made = objectives.get(name, **options)
    made.state.counts = PAST.clone()
    made.state.memory[OCCURRENCES] = 1.0 + 20 * torch.exp(2 * peaked_problem().bias)
    return made


def spy(monkeypatch):
    """Logs of resampling weights, and counts, of each call that draws."""
    calls = []

    def watch(name):
        draw = getattr(module, name)

        def watched(log_weights, draws, generator):
            calls.append((log_weights, draw(log_weights, draws, generator)))
            return calls[-1][1]

        monkeypatch.setattr(module, name, watched)

    watch("multinomial_counts")
    watch("systematic_counts")
    return calls


@pytest.mark.parametrize("popularity", ["counts", "log", "power"])
def test_published_bir_is_the_papers(popularity, monkeypatch):
    """A pool of N rows with repetitions, as the paper has it, against distinct ids with counts."""
    problem, calls = make_problem(40, V, 6), spy(monkeypatch)
    loss = estimator("bir", num_negatives=25, popularity=popularity)(
        *problem[:3], bias=problem.bias, post=CAP
    )
    s = CAP(problem.hidden @ problem.weight.T + problem.bias)[:, problem.labels]
    pop = (PAST + torch.bincount(problem.labels, minlength=V))[problem.labels].double()
    pop = {"counts": pop, "log": torch.log1p(pop), "power": pop**0.75}[popularity]
    w = torch.softmax(s - pop.log(), dim=1)
    ids, slot = torch.unique(problem.labels, return_inverse=True)
    log_w, k = calls[0]
    expected_w = torch.zeros(40, len(ids), dtype=w.dtype).index_add(1, slot, w)
    torch.testing.assert_close(torch.softmax(log_w, dim=1), expected_w)
    assert (k.sum(dim=1) == 25).all()
    expected = position_reference(
        problem.head(CAP), problem.positions(), ids.expand(40, -1), k.log(), keep_label=True
    ).mean()
    torch.testing.assert_close(loss, expected)
    for mine, want in zip(gradients(loss, problem), gradients(expected, problem)):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cache_weight", [0.5, 0.2])
def test_published_xir_is_the_papers(cache_weight, monkeypatch):
    problem, calls = make_problem(40, V, 6), spy(monkeypatch)
    xir = estimator("xir", num_negatives=25, cache_size=60, cache_weight=cache_weight)
    caches = []
    draw = module.draw_cache
    monkeypatch.setattr(
        module, "draw_cache", lambda *args, **k: caches.append(draw(*args, **k)) or caches[-1]
    )
    loss = xir(*problem[:3], bias=problem.bias)
    ids, n = torch.unique(problem.labels, return_counts=True)
    cache = caches[0]
    assert cache.counts.sum() == 60
    held = cache.counts > 0
    seen = PAST + torch.bincount(problem.labels, minlength=V)
    s = problem.hidden @ problem.weight.T + problem.bias
    expected = []
    for pool, m, (log_w, k) in zip((ids, cache.ids[held]), (n, cache.counts[held]), calls):
        w = torch.softmax(s[:, pool] + (m / seen[pool].double()).log(), dim=1)
        torch.testing.assert_close(torch.softmax(log_w, dim=1), w)
        assert (k.sum(dim=1) == 12).all()
        expected.append(
            position_reference(
                problem.head(), problem.positions(), pool.expand(40, -1), k.log(), keep_label=True
            ).mean()
        )
    wanted = (1 - cache_weight) * expected[0] + cache_weight * expected[1]
    torch.testing.assert_close(loss, wanted)
    for mine, want in zip(gradients(loss, problem), gradients(wanted, problem)):
        torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("corrected", [False, True], ids=["published", "importance"])
def test_negatives_weigh_as_p_squared_as_published_and_as_p_corrected(corrected):
    hidden, weight, _, bias = peaked_problem()
    head = Head(weight, bias=bias)
    positions = Positions(hidden[:1], torch.tensor([V - 1]))
    everyone = torch.arange(V - 1)
    pool = module._Pool(everyone, torch.zeros(V - 1, dtype=torch.float64))  # n_j = pop_j
    generator = torch.Generator().manual_seed(0)
    count = module.systematic_counts if corrected else module.multinomial_counts
    c, drawn = module._resample(
        head, positions, pool, 400_000, generator, corrected=corrected, count=count
    )
    assert drawn.sum() == 400_000
    s = (hidden[:1] @ weight.T + bias)[:, : V - 1]
    found = torch.softmax(s + c, dim=1)
    wanted = {power: torch.softmax(power * s, dim=1) for power in (1, 2)}
    distance = {power: 0.5 * (found - p).abs().sum() for power, p in wanted.items()}
    right, wrong = (1, 2) if corrected else (2, 1)
    assert distance[right] < 0.03
    assert distance[wrong] > 0.15


CORRECTED = {
    "bir": {"num_negatives": 30, "correction": "importance"},
    "xir": {"num_negatives": 30, "cache_size": 300, "correction": "importance"},
}


@pytest.mark.parametrize("post", [PLAIN, CAP], ids=["", "cap"])
@pytest.mark.parametrize("name", CORRECTED)
def test_partition_is_unbiased(name, post):
    draws = 120 if name == "bir" else 60
    bias = pool_bias(estimator(name, **CORRECTED[name]), draws, post=post)
    assert (bias.standard_error <= 0.003).all()
    assert bias.is_zero, bias


@pytest.mark.parametrize("name", CORRECTED)
def test_importance_is_the_formula(name, monkeypatch):
    """Given the draws k: sum_j k_j / (R w_j) · f_j exp s_j, with w and f written out."""
    problem, calls, caches = make_problem(40, V, 6), spy(monkeypatch), []
    draw = module.draw_cache
    monkeypatch.setattr(
        module, "draw_cache", lambda *args, **k: caches.append(draw(*args, **k)) or caches[-1]
    )
    loss = estimator(name, **CORRECTED[name])(
        *problem[:3], bias=problem.bias, post=CAP, reduction="none"
    )
    (_, k), n = calls[0], torch.bincount(problem.labels, minlength=V).double()
    expected_count = 39 * (PAST + n) / (PAST.sum() + 40)
    if name == "xir":
        n[caches[0].ids] += caches[0].counts
        o = 1.0 + 20 * torch.exp(2 * peaked_problem().bias)
        expected_count += 300 * o / o.sum()
    ids = (n > 0).nonzero().squeeze(1)
    f = (n / expected_count)[ids]
    s = CAP(problem.hidden @ problem.weight.T + problem.bias)
    mass = f * s[:, ids].exp()
    mass = mass.masked_fill(ids == problem.labels[:, None], 0.0)
    w = (mass / mass.sum(dim=1, keepdim=True)).detach()
    k = k[:, torch.isin(caches[0].ids, ids)] if caches else k
    terms = torch.where(k > 0, k / (30 * w) * mass, 0.0)
    s_label = s.gather(1, problem.labels[:, None]).squeeze(1)
    expected = (s_label.exp() + terms.sum(dim=1)).log() - s_label
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("popularity", ["counts", "log", "power"])
def test_classes_never_seen_have_no_infinite_weight(popularity):
    """A cache holds classes that were no label yet: they count as seen once."""
    problem = make_problem(30, V, 6)
    xir = objectives.get("xir", popularity=popularity, cache_size=5 * V)
    loss = xir(*problem[:3], bias=problem.bias)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in gradients(loss, problem))
    assert (xir.state.counts == 0).any()


def test_xir_stays_unbiased_after_training_on_other_parameters():
    """Occurrences have followed calls with other weights; the new ones must not notice."""
    xir = estimator("xir", **CORRECTED["xir"])
    before = xir.state.memory[OCCURRENCES].clone()
    for seed in range(5):
        past = make_problem(200, V, 8, seed=seed, spread=2.0)
        xir(*past[:3], bias=past.bias)
    xir.state.counts = PAST.clone()
    assert (xir.state.memory[OCCURRENCES] > before + 10).any()
    assert pool_bias(xir, 60).is_zero


def test_planted_errors_are_found(monkeypatch):
    draw, resample = module.draw_cache, module._resample

    def found():
        return not pool_bias(estimator("xir", **CORRECTED["xir"]), 50).is_zero

    with monkeypatch.context() as planted:  # the cache's classes weighed as if from the batch
        planted.setattr(
            module, "draw_cache", lambda *a, **k: draw(*a, **k)._replace(q=torch.zeros(()))
        )
        assert found()
    with monkeypatch.context() as planted:  # the density before the latest occurrences
        planted.setattr(
            module,
            "draw_cache",
            lambda *a, **k: (c := draw(*a, **k))._replace(q=torch.full_like(c.q, 1 / V)),
        )
        assert found()
    with monkeypatch.context() as planted:  # the label twice

        def with_label(head, positions, *args, **options):
            nobody = torch.full_like(positions.labels, -1)
            kept = Positions(positions.hidden, nobody)
            return resample(head, kept, *args, **options)

        make = module.PositionCandidates
        planted.setattr(module, "_resample", with_label)
        planted.setattr(
            module,
            "PositionCandidates",
            lambda *a, **fields: make(*a, **{**fields, "keep_label": True}),
        )
        assert found()
    assert not found()


@pytest.mark.parametrize("correction", ["none", "importance"])
@pytest.mark.parametrize("resampling", ["auto", "independent", "systematic"])
def test_draws_are_of_the_kind_that_was_asked_for(resampling, correction, monkeypatch):
    problem, calls = make_problem(40, V, 6), spy(monkeypatch)
    bir = estimator("bir", num_negatives=25, correction=correction, resampling=resampling)
    bir(*problem[:3], bias=problem.bias)
    log_w, k = calls[0]
    is_systematic = ((k - 25 * torch.softmax(log_w, dim=1)).abs() < 1).all()
    by_itself = resampling == "auto" and correction == "importance"
    assert is_systematic == (resampling == "systematic" or by_itself)


@pytest.mark.parametrize("name", CORRECTED)
def test_partition_is_unbiased_with_independent_draws(name):
    made = estimator(name, **CORRECTED[name], resampling="independent")
    assert pool_bias(made, 60).is_zero


@pytest.mark.parametrize("name", ["bir", "xir"])
def test_published_form_is_biased(name):
    assert not call_bias(estimator(name, num_negatives=30), peaked_problem(), 50).is_zero


def test_one_label_for_all_positions():
    problem = make_problem(4, 20, 3)
    labels = torch.full((4,), 7)
    loss = objectives.get("bir", correction="importance")(problem.hidden, problem.weight, labels)
    assert abs(loss) < 1e-12
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, problem[:2]))


def test_draws_reach_the_cache_and_the_log():
    problem = make_problem(50, V, 6, spread=3.0)
    xir = objectives.get("xir", num_negatives=20, cache_size=40)
    with torch.no_grad():
        xir(*problem[:3])
    assert not xir.state.memory  # calls without gradients do not count
    xir(*problem[:3])
    occurrences = xir.state.memory[OCCURRENCES]
    assert occurrences.sum() == V + 50 * 20
    drawn = xir.state.memory[DRAWN]
    assert torch.equal((occurrences > 1).nonzero().squeeze(1), drawn)
    first = xir.state.summary()["distinct_cached"]
    assert 20 < first <= 40
    for _ in range(40):
        xir(*problem[:3])
    assert xir.state.summary()["distinct_cached"] < 0.8 * first  # the published cache collapses


def test_cache_from_drawn_holds_only_what_was_drawn():
    problem = make_problem(50, V, 6)
    xir = objectives.get("xir", num_negatives=20, cache_size=300, cache_from="drawn")
    xir(*problem[:3])
    before = set(xir.state.memory[DRAWN].tolist())
    cache = module.draw_cache(
        xir.state, 300, torch.arange(3), torch.Generator().manual_seed(0), V, among_drawn=True
    )
    assert set(cache.ids[cache.counts > 0].tolist()) <= before
    assert cache.counts.sum() == 300
    torch.testing.assert_close(
        cache.q.sum(), torch.tensor(1.0, dtype=torch.float64), atol=0.2, rtol=0
    )


def test_decay_forgets():
    problem = make_problem(50, V, 6)
    xir = objectives.get("xir", num_negatives=20, decay=0.0)
    for _ in range(3):
        xir(*problem[:3])
    assert xir.state.memory[OCCURRENCES].sum() == V + 50 * 20


def test_a_cache_survives_saving_and_is_refused_by_a_smaller_catalogue(tmp_path):
    problem = make_problem(50, V, 6)
    path = tmp_path / "state.safetensors"
    xir = objectives.get("xir", num_negatives=20)
    xir(*problem[:3])
    xir.state.save(path)
    again = objectives.get("xir", num_negatives=20)
    again.state.load(path)
    torch.manual_seed(0)
    expected = xir(*problem[:3])
    torch.manual_seed(0)
    assert torch.equal(again(*problem[:3]), expected)
    assert torch.equal(again.state.memory[OCCURRENCES], xir.state.memory[OCCURRENCES])
    smaller = objectives.get("xir")
    smaller.state.load(path)
    with pytest.raises(ValueError, match=f"counts {V} classes but weight has 100"):
        smaller(problem.hidden, problem.weight[:100], problem.labels.clamp_max(99))
    smaller.state.counts = None
    with pytest.raises(ValueError, match=f"a cache over {V} classes but weight has 100"):
        smaller(problem.hidden, problem.weight[:100], problem.labels.clamp_max(99))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bir", {"num_negatives": 0}, 'BIRConfig.num_negatives is 0; give .* or "auto"'),
        ("bir", {"cache_size": 3}, "objective 'bir' has no option 'cache_size'"),
        ("bir", {"correction": "importance", "popularity": "log"}, "flattens what"),
        ("xir", {"num_negatives": 1}, "half of the draws come from the cache"),
        ("xir", {"correction": "importance", "cache_weight": 0.2}, "one pool"),
        ("bir", {"resampling": "some"}, "choose one of 'auto', 'independent', 'systematic'"),
        ("xir", {"cache_from": "some"}, "choose one of 'all', 'drawn'"),
        ("xir", {"decay": 1.5}, "XIRConfig.decay is 1.5"),
    ],
)
def test_bad_options_are_one_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        objectives.get(name, **options)
