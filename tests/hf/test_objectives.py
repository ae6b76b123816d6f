"""Every objective through `apply_sce`: capped and tied, biased, in training and in evaluation."""

import pytest
import torch
from support.models import tiny_batch, tiny_model

from sce_lm import apply_sce, objectives
from sce_lm.hf.adapter import objective_of

each_objective = pytest.mark.parametrize("name", objectives.names())


@each_objective
@pytest.mark.parametrize("family", ["gemma2", "phi"])
def test_trains_by_the_objective_and_evaluates_exactly(name, family):
    batch = tiny_batch()
    model = apply_sce(tiny_model(family), objectives.get(name))
    model.eval()
    exact = model(**batch).loss
    torch.testing.assert_close(exact, tiny_model(family).eval()(**batch).loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    torch.manual_seed(0)
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(**batch).loss
        assert torch.isfinite(loss)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
    model.eval()
    assert model(**batch).loss < exact - 0.01


@each_objective
def test_gradient_checkpointing_changes_nothing(name):
    batch, found = tiny_batch(), []
    for checkpointed in (False, True):
        model = apply_sce(tiny_model("llama"), objectives.get(name))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        for _ in range(2):
            model(**batch).loss.backward()
        state = objective_of(model).state
        found.append(([p.grad for p in model.parameters()], state.step if state else 0))
    torch.testing.assert_close(found[1], found[0])


@each_objective
def test_a_name_and_its_options_build_it_again(name):
    objective = objectives.get(name)
    assert objective.name == name
    again = objectives.get(**objective.to_dict())
    assert type(again) is type(objective)
    assert again.config == objective.config
    if objective.config is not None:
        assert type(objectives.from_config(objective.config)) is type(objective)
