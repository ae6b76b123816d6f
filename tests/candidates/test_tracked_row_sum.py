"""The sum of the head's rows is right after everything that may change them."""

import pytest
import torch

import sce_lm.candidates.tracked_row_sum as row_sum
from sce_lm.candidates.tracked_row_sum import RowSum
from sce_lm.ops.head import Head


@pytest.fixture
def reads(monkeypatch):
    """How often the whole weight was read."""
    found = []
    read = row_sum.row_sum

    def counted(*args):
        found.append(1)
        return read(*args)

    monkeypatch.setattr(row_sum, "row_sum", counted)
    return found


def sparse_gradient(weight, rows):
    values = torch.randn(len(rows), weight.shape[1])
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, weight.shape)


def test_a_trained_weight_is_left_to_the_caller():
    assert RowSum().of(Head(torch.ones(3, 2, requires_grad=True))) is None


def test_a_frozen_weight_is_read_once_until_it_changes(reads):
    weight, total = torch.randn(50, 3), RowSum()
    head = Head(weight)
    for _ in range(3):
        torch.testing.assert_close(total.of(head), weight.double().sum(0), rtol=0, atol=1e-4)
    assert len(reads) == 1
    weight[4] += 1.0
    torch.testing.assert_close(total.of(head), weight.double().sum(0), rtol=0, atol=1e-4)
    assert len(reads) == 2
    weight.data[4] += 1.0  # behind torch's back
    total.forget()
    torch.testing.assert_close(total.of(head), weight.double().sum(0), rtol=0, atol=1e-4)
    bias, low_rank = torch.randn(50), torch.randn(50, 2)
    expected = torch.cat([weight, low_rank, bias[:, None]], 1).double().sum(0)
    for _ in range(2):
        found = total.of(Head(weight, low_rank, bias))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert len(reads) == 3


@pytest.mark.parametrize(
    "make", [torch.optim.SparseAdam, torch.optim.Adagrad, torch.optim.SGD], ids=lambda m: m.__name__
)
def test_steps_of_a_followed_optimiser_correct_the_sum(make, reads):
    torch.manual_seed(0)
    weight, total = torch.nn.Parameter(torch.randn(60, 4)), RowSum()
    head = Head(weight)
    optimizer = make([weight], lr=0.5)
    total.follow(optimizer, weight)
    total.of(head)
    for _ in range(5):
        weight.grad = sparse_gradient(weight, [1, 7, 7, 30])
        optimizer.step()
        torch.testing.assert_close(
            total.of(head), weight.detach().double().sum(0), rtol=0, atol=1e-4
        )
    assert len(reads) == 1
    if make is not torch.optim.SparseAdam:
        weight.grad = torch.randn(60, 4)  # a dense step
        optimizer.step()
        torch.testing.assert_close(
            total.of(head), weight.detach().double().sum(0), rtol=0, atol=1e-4
        )
        assert len(reads) == 2


def test_optimisers_that_cannot_be_followed():
    weight = torch.nn.Parameter(torch.randn(6, 4))
    with pytest.raises(ValueError, match="which moves rows without a gradient"):
        RowSum().follow(torch.optim.SGD([weight], lr=0.1, momentum=0.9), weight)
    other = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="does not train this weight"):
        RowSum().follow(torch.optim.SGD([other], lr=0.1), weight)
