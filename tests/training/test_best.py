import pytest
import torch
from support.models import tiny_model

from sce_lm.training.best import BestModel


@pytest.mark.parametrize(("higher", "values"), [(True, [1, 3, 3, 2]), (False, [3, 1, 1, 2])])
def test_the_first_of_equal_evaluations_is_the_best(tmp_path, higher, values):
    best = BestModel(tmp_path, "figure", higher)
    assert [best.update(step, value) for step, value in enumerate(values, 1)] == [1, 1, 0, 0]
    assert (best.step, best.evaluations_since) == (2, 2)

    records = [{"step": step, "figure": value} for step, value in enumerate(values, 1)]
    again = BestModel(tmp_path, "figure", higher, [{"step": 1, "loss": 2.0}, *records])
    assert (again.step, again.evaluations_since) == (2, 2)


def test_a_run_that_goes_back_finds_the_best_of_the_steps_before(tmp_path):
    """Step 4 was better than step 2, but the newest checkpoint is that of step 3."""
    model = tiny_model("llama")
    before = model.get_input_embeddings().weight.detach().clone()
    best = BestModel(tmp_path, "ndcg", True)
    best.update(2, 0.2)
    best.save(model)
    best.remove_earlier()  # the checkpoint of step 3
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    best.update(4, 0.4)
    best.save(model)

    resumed = BestModel(tmp_path, "ndcg", True, [{"step": 2, "ndcg": 0.2}])
    resumed.load(model)
    assert model.get_input_embeddings().weight.equal(before)
    assert not resumed.update(4, 0.1)
    resumed.remove_earlier()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
