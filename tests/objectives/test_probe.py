"""The probe measures what the approximation costs, and training goes on as without it."""

import copy
import warnings

import pytest
import torch
from support.models import tiny_batch, tiny_model
from support.problems import make_problem
from transformers import Trainer, TrainingArguments

from sce_lm import SCEConfig, apply_sce, objectives
from sce_lm.hf import SCECallback, objective_of, probe_loss
from sce_lm.objectives.probe import Probe, shares_by_frequency

TAIL_ONLY = {"num_buckets": 0, "shared_labels": False, "shared_frequent": 0}


def look(objective, problem, positions=10_000):
    probe = Probe(1, positions)
    labels = problem.labels.clone()
    labels[3] = -100
    probe(objective, problem.hidden, problem.weight, labels, bias=problem.bias)
    return probe.figures


def test_figures_are_those_of_loss_and_gradient():
    problem = make_problem(40, 500, 16)
    published = objectives.get("sce", published=True, bucket_candidates=60)
    found = look(published, problem)
    assert found["probe_bias"] < -0.3
    assert 0 < found["probe_cos_hidden"] < 0.999
    whole = objectives.from_config(SCEConfig(**TAIL_ONLY, tail_candidates=500))
    found = look(whole, problem)  # every class is a candidate
    assert found["probe_bias"] == pytest.approx(0, abs=1e-9)
    assert found["probe_cos_hidden"] == pytest.approx(1, abs=1e-9)


def test_exact_loss_has_the_objectives_terms():
    problem = make_problem(40, 500, 16)
    terms = {"z_loss": 0.1, "label_smoothing": 0.2}
    found = look(objectives.get("sce", **TAIL_ONLY, tail_candidates=500, **terms), problem)
    assert found["probe_bias"] == pytest.approx(0, abs=1e-9)
    assert found["probe_cos_hidden"] == pytest.approx(1, abs=1e-9)


def test_positions_count_alike_whatever_they_weigh():
    problem, probe = make_problem(40, 500, 16), Probe(1)
    objective = objectives.get("sce", **TAIL_ONLY, tail_candidates=50)
    figures = []
    for weights in (None, torch.rand(40)):
        probe.calls = 0
        probe(objective, *problem[:3], token_weights=weights)
        figures.append(probe.figures)
    assert figures[0] == figures[1]


def test_shares_are_those_of_octaves_by_frequency():
    counts = torch.tensor([0, 9, 4, 4, 1])  # ranked 1, 2, 3, 4, 0
    candidates, labels = torch.tensor([1, 3, 0]), torch.tensor([4])
    found = shares_by_frequency(counts, candidates=candidates, labels=labels)
    assert found == {
        "classes": [1, 2, 4, 5],
        "candidates": [1, 0, 0.5, 1],
        "labels": [0, 0, 0.5, 0],
    }


def test_probe_tells_which_classes_were_candidates():
    problem = make_problem(40, 500, 16)
    probe = Probe(1, tell_classes=True)
    shared = {
        "shared_frequent": 8,
        "num_buckets": 0,
        "tail_candidates": 0,
        "control_variate": False,
    }
    probe(objectives.get("sce", **shared), problem.hidden, problem.weight, problem.labels)
    shares = probe.by_frequency
    assert shares["classes"] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 500]
    assert shares["candidates"][:4] == [1, 1, 1, 1]
    assert shares["candidates"] == shares["labels"]
    probe = Probe(1, tell_classes=True)
    probe(objectives.get("rece"), problem.hidden, problem.weight, problem.labels)
    assert not probe.by_frequency


def test_probe_of_few_positions_is_near_that_of_all():
    problem = make_problem(400, 2000, 16)
    objective = objectives.get("sce", num_buckets=4, tail_candidates=0, control_variate=False)
    all_of_them, few = look(objective, problem), look(objective, problem, positions=100)
    assert few["probe_bias"] == pytest.approx(all_of_them["probe_bias"], rel=0.2)
    assert few != all_of_them


def test_training_goes_on_as_without_it():
    losses = []
    for probed in (False, True):
        model = apply_sce(tiny_model("llama"), SCEConfig(tail_candidates=20))
        probe = probe_loss(model, every=2) if probed else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(0)
        own = []
        for i in range(5):
            loss = model(**tiny_batch(i)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(loss.item())
        losses.append(own)
        assert objective_of(model).state.step == 5
    assert losses[0] == losses[1]
    assert probe.calls == 5
    assert 0.9 < probe.figures["probe_cos_hidden"] <= 1


def test_losses_in_eval_can_be_looked_at_and_stay_exact():
    model = apply_sce(tiny_model("llama"), SCEConfig(**TAIL_ONLY, tail_candidates=20))
    batch = tiny_batch(0)
    with torch.no_grad():
        exact = model.eval()(**batch).loss
        probe = probe_loss(model, every=1, positions=10, training=False)
        assert model(**batch).loss == exact
    model.train()(**batch)
    assert probe.calls == 1
    assert probe.errors.shape == (10,)
    assert probe.figures["probe_bias"] == pytest.approx(probe.errors.mean().item())
    assert probe.errors.abs().max() > 1e-4


def test_autocast_changes_no_figure():
    problem = make_problem(40, 500, 16, dtype=torch.float32)
    objective = objectives.from_config(SCEConfig(**TAIL_ONLY, tail_candidates=100))
    expected = look(objective, problem)
    with torch.autocast("cpu", torch.bfloat16):
        assert look(objective, problem) == expected


def test_callback_logs_the_probe_and_advises_once(tmp_path):
    model = apply_sce(
        tiny_model("llama", initializer_range=0.5), SCEConfig(**TAIL_ONLY, tail_candidates=3)
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    data = [{k: v[0] for k, v in tiny_batch(i).items()} for i in range(8)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = Trainer(
            model, arguments, train_dataset=data, callbacks=[SCECallback(probe_every=2)]
        )
        trainer.train()
    advice = [str(w.message) for w in caught if "too few candidates" in str(w.message)]
    assert len(advice) == 1
    assert "tail_candidates=1024 instead of 3" in advice[0]
    logged = [r for r in trainer.state.log_history if "sce/probe_bias" in r]
    assert len(logged) == 4
    assert len({r["sce/probe_bias"] for r in logged}) == 2


def test_a_model_without_an_objective_and_bad_numbers():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="call apply_sce first"):
        probe_loss(model, 10)
    with pytest.raises(ValueError, match="give 1 or more"):
        probe_loss(apply_sce(copy.deepcopy(model), SCEConfig()), 0)


def test_calls_that_drew_the_probes_numbers_are_not_replayed():
    """A run of seed 1 without dropout begins with the random numbers that the probe begins with."""
    problem, objective, probe = make_problem(40, 500, 16), objectives.get("in_batch"), Probe(1)
    torch.manual_seed(1)
    objective(problem.hidden.clone().requires_grad_(), problem.weight, problem.labels.flip(0) * 0)
    probe(objective, problem.hidden, problem.weight, problem.labels)
    assert torch.isfinite(probe.errors).all()
