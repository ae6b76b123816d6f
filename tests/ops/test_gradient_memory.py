"""The memory of a weight's gradient is used again, and only when nobody holds it."""

import threading
import weakref

import pytest
import torch

from sce_lm import SCEConfig, objectives, sce_loss
from sce_lm.ops import gradient_memory as module
from sce_lm.ops.gradient_memory import gradient_memory


def test_memory_is_used_again_once_it_is_free():
    weight = torch.nn.Parameter(torch.randn(50, 8))
    first = gradient_memory(weight, torch.float32)
    assert first.shape == weight.shape
    place, view = first.data_ptr(), first.detach()[3:4]
    second = gradient_memory(weight, torch.float32)
    assert second.data_ptr() != place  # the first is still held
    first.fill_(1.0)
    second.fill_(2.0)
    assert view.eq(1.0).all()
    place = second.data_ptr()
    del first, view, second
    assert gradient_memory(weight, torch.float32).data_ptr() == place


def test_a_view_holds_the_memory():
    weight = torch.randn(50, 8)
    view = gradient_memory(weight, torch.float32)[10]
    view.fill_(3.0)
    gradient_memory(weight, torch.float32).zero_()
    assert view.eq(3.0).all()


def test_memory_fits_the_weight():
    weight = torch.nn.Parameter(torch.randn(50, 8))
    gradient_memory(weight, torch.float32)
    assert gradient_memory(weight, torch.float64).dtype == torch.float64
    weight.data = torch.randn(70, 8)
    assert gradient_memory(weight, torch.float32).shape == (70, 8)


def test_memory_goes_with_its_weight():
    weight = torch.nn.Parameter(torch.randn(50, 8))
    gradient_memory(weight, torch.float32)
    kept = weakref.ref(module._kept[weight])
    del weight
    assert kept() is None


@pytest.mark.parametrize("name", ["sce", "exact"])
def test_gradients_of_earlier_steps_stay_as_they_were(name):
    """A gradient that a user keeps, and one that is accumulated into, are never written over."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(200, 8))
    hidden, labels = torch.randn(3, 16, 8), torch.randint(200, (3, 16))
    objective = objectives.get(name)

    def gradient(i: int) -> torch.Tensor:
        objective(
            hidden[i], weight, labels[i], generator=torch.Generator().manual_seed(i)
        ).backward()
        assert weight.grad is not None
        return weight.grad

    kept = gradient(0)
    before = kept.clone()
    weight.grad = None
    gradient(1)
    assert kept.equal(before)
    alone = weight.grad.clone()
    gradient(2)  # accumulates
    assert kept.equal(before)
    weight.grad = None
    torch.testing.assert_close(gradient(2) + alone, gradient(1), rtol=0, atol=1e-6)


def test_threads_do_not_share_memory():
    """Two threads that take the gradient of one weight at a time get right results."""
    torch.manual_seed(0)
    weight = torch.randn(300, 8, requires_grad=True)
    hidden, labels = torch.randn(2, 16, 8), torch.randint(300, (2, 16))
    config = SCEConfig(num_buckets=0, shared_frequent=300)

    def gradient(i: int) -> torch.Tensor:
        loss = sce_loss(hidden[i], weight, labels[i], config=config)
        return torch.autograd.grad(loss, weight)[0]

    expected = [gradient(i).clone() for i in range(2)]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(50) if not torch.allclose(gradient(i), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
