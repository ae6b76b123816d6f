import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sce_lm.hf.lazy_logits import LazyLogits
from sce_lm.ops.logits import LogitTransform

D, V = 8, 20


def make(dtype=torch.float32, bias=True, shape=(2, 5)):
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias, dtype=dtype)
    hidden = torch.randn(*shape, D, dtype=dtype, requires_grad=True)
    return head, hidden


# name: what a model might do; each must give the same on lazy logits and on real ones.
RECORDED = {
    "times": lambda x: x * 2.5,
    "times_left": lambda x: 3 * x,
    "times_tensor": lambda x: x * torch.tensor(0.7),
    "times_one_element": lambda x: torch.tensor([0.7], dtype=x.dtype) * x,
    "torch_mul": lambda x: torch.mul(x, 1.5),
    "over": lambda x: x / 3.0,
    "torch_div": lambda x: torch.div(x, 2),
    "over_tensor": lambda x: x / torch.tensor(3.0),
    "tanh": lambda x: x.tanh(),
    "torch_tanh": torch.tanh,
    "tanh_layer": nn.Tanh(),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "to_float": lambda x: x.to(torch.float32),
    "to_keyword": lambda x: x.to(dtype=torch.float32),
    "to_device": lambda x: x.to(x.device),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "all_but_last": lambda x: x[..., :-1, :],
    "from_second": lambda x: x[..., 1:, :],
    "whole": lambda x: x[...],
    "every_other": lambda x: x[torch.arange(x.shape[0]) % 2 == 0],
    "flat": lambda x: x.reshape(-1, x.shape[-1]),
    "add_bias": lambda x: x + torch.linspace(-1.0, 2.0, x.shape[-1]).to(x.dtype),
    "add_row": lambda x: torch.linspace(-1.0, 2.0, x.shape[-1])[None] + x,
}
IN_PLACE = {
    "mul_": lambda x: x.mul_(1.5),
    "div_": lambda x: x.div_(2.0),
    "tanh_": lambda x: x.tanh_(),
    "imul": lambda x: x.__imul__(0.5),
    "itruediv": lambda x: x.__itruediv__(0.5),
}
MATERIALISING = {
    "add": lambda x: x + 1.0,
    "crop": lambda x: x[..., : V - 3],
    "relu": torch.relu,
    "minus": lambda x: -x,
    "one_over": lambda x: 1.0 / x.square().add(1.0),
    "by_vector": lambda x: x * torch.arange(1.0, x.shape[-1] + 1).to(x.dtype),
    "softmax": lambda x: x.softmax(-1),
    "mul_wider": lambda x: x.mul_(torch.tensor([1.5], dtype=torch.float64)),
    "add_": lambda x: x.add_(1.0),
    "log_softmax": lambda x: x.log_softmax(-1),
}
EVERYTHING = {**RECORDED, **IN_PLACE, **MATERIALISING}


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(EVERYTHING)), max_size=7),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    bias=st.booleans(),
)
def test_any_sequence_of_operations_equals_real_logits(names, dtype, bias):
    head, hidden = make(dtype, bias, shape=(2, 9))
    lazy, real = LazyLogits.from_head(head, hidden), head(hidden)
    for name in names:
        lazy, real = EVERYTHING[name](lazy), EVERYTHING[name](real)
        assert lazy.shape == real.shape
        assert lazy.dtype == real.dtype
        assert lazy.requires_grad == real.requires_grad
        if real.numel() == 0 or real.shape[-2] < 2:
            break
    # A product of some rows is not, with every BLAS, bit for bit that of all.
    rounding = 8 * torch.finfo(real.dtype).eps
    equal = {"rtol": rounding, "atol": rounding, "equal_nan": True}
    torch.testing.assert_close(lazy.reshape(lazy.shape), real, **equal)
    inputs = (hidden, *head.parameters())
    try:
        want = torch.autograd.grad(real.sum(), inputs)
    except RuntimeError:  # an in-place operation on what backward needs
        return
    got = torch.autograd.grad(lazy.sum(), inputs)
    torch.testing.assert_close(got, want, **equal)


@pytest.mark.parametrize("name", [*RECORDED, *IN_PLACE])
def test_recorded_operations_do_not_form_the_logits(name):
    head, hidden = make()
    lazy = LazyLogits.from_head(head, hidden)
    result = EVERYTHING[name](lazy)
    assert isinstance(result, LazyLogits)
    assert not result.is_materialised
    assert not lazy.is_materialised


def test_questions_about_the_shape_do_not_form_the_logits():
    head, hidden = make(torch.bfloat16)
    lazy = LazyLogits.from_head(head, hidden)
    assert lazy.shape == lazy.size() == (2, 5, V)
    assert (lazy.size(-1), lazy.dim(), lazy.ndim, lazy.numel(), len(lazy)) == (V, 3, 3, 10 * V, 2)
    assert (lazy.dtype, lazy.device, lazy.requires_grad) == (torch.bfloat16, hidden.device, True)
    assert torch.is_tensor(lazy)
    assert lazy.is_floating_point()
    assert lazy.grad_fn is None
    assert "not computed yet" in repr(lazy)
    assert not lazy.is_materialised
    assert lazy[:, -1, :].shape == (2, V)
    assert lazy[0].shape == (5, V)
    assert lazy[1, 2:4].shape == (2, V)
    assert not lazy.is_materialised


@pytest.mark.parametrize(
    ("steps", "post"),
    [
        (lambda x: x, LogitTransform()),
        (lambda x: x.float() * 0.0625, LogitTransform(scale=0.0625)),
        (lambda x: x / 8.0, LogitTransform(scale=0.125)),
        (lambda x: torch.tanh(x / 30.0) * 30.0, LogitTransform(scale=1.0, soft_cap=30.0)),
        (lambda x: 4 * torch.tanh(x * 0.5), LogitTransform(scale=2.0, soft_cap=4.0)),
        (lambda x: -4 * torch.tanh(x * 0.5), LogitTransform(scale=-2.0, soft_cap=4.0)),
        (lambda x: x.tanh(), LogitTransform(scale=1.0, soft_cap=1.0)),
        (lambda x: 3 * (x[0].float() + torch.arange(float(V))), LogitTransform(scale=3.0)),
        (lambda x: x.tanh().tanh(), None),
        (lambda x: x * 0.0, None),
        (lambda x: x / 0.0, None),
        (lambda x: x * float("nan"), None),
    ],
)
def test_record_is_read_as_a_logit_transform(steps, post):
    head, hidden = make()
    lazy = steps(LazyLogits.from_head(head, hidden))
    assert lazy.transform == post
    if post is None:
        with pytest.raises(ValueError, match="no LogitTransform"):
            lazy.parts()
    else:
        h, rows = lazy.parts()
        rebuilt = rows.post(nn.functional.linear(h, rows.weight, rows.bias))
        torch.testing.assert_close(rebuilt, lazy.materialise())
        with pytest.raises(ValueError, match="formed already"):
            lazy.parts()


def test_scalar_that_needs_a_gradient_gets_it():
    head, hidden = make()
    scale = torch.tensor(2.0, requires_grad=True)
    (LazyLogits.from_head(head, hidden) * scale).sum().backward()
    torch.testing.assert_close(scale.grad, head(hidden).sum())


def test_recorded_scalar_is_the_value_at_that_time():
    head, hidden = make()
    scale = torch.tensor(2.0)
    scaled = LazyLogits.from_head(head, hidden) * scale
    scale.fill_(100.0)
    torch.testing.assert_close(scaled.materialise(), head(hidden) * 2.0)


def test_view_and_base_share_memory():
    head, hidden = make()
    for change_base in (False, True):
        lazy, real = LazyLogits.from_head(head, hidden), head(hidden)
        lazy_view, real_view = lazy[:, :-1], real[:, :-1]
        (lazy if change_base else lazy_view).mul_(2.0)
        (real if change_base else real_view).mul_(2.0)
        torch.testing.assert_close(lazy_view + 0, real_view)
        torch.testing.assert_close(lazy + 0, real)


def test_copy_is_not_changed_by_later_in_place_operations():
    head, hidden = make()
    lazy = LazyLogits.from_head(head, hidden)
    doubled = lazy * 2.0
    lazy.div_(4.0)
    torch.testing.assert_close(doubled.materialise(), head(hidden) * 2.0)
    torch.testing.assert_close(lazy.materialise(), head(hidden) / 4.0)


def test_view_of_a_slice_fails_as_torch_does():
    head, hidden = make()
    lazy, real = LazyLogits.from_head(head, hidden), head(hidden)
    assert lazy.view((-1, V)).shape == lazy.view(10, V).shape == (10, V)
    assert not lazy.is_materialised
    for logits in (lazy, real):
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            logits[:, :-1].view(-1, V)
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            logits.view(7, V)


def test_recorded_bias_and_mask_are_the_values_at_that_time():
    head, hidden = make()
    bias, mask = torch.arange(1.0, V + 1), torch.ones(2, 5, dtype=torch.bool)
    lazy, real = (x[mask] + bias for x in (LazyLogits.from_head(head, hidden), head(hidden)))
    bias.zero_()
    mask.zero_()
    torch.testing.assert_close(lazy.materialise(), real)


def test_bias_that_needs_a_gradient_gets_it():
    head, hidden = make()
    bias = torch.zeros(V, requires_grad=True)
    (LazyLogits.from_head(head, hidden) + bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((V,), 10.0))


class Asked:
    """Answers cross_entropy with 0 and remembers what it was given."""

    def __init__(self):
        self.options = []

    def __call__(self, logits, labels, ignore_index, reduction):
        self.options.append((logits.shape, labels.shape, ignore_index, reduction))
        return torch.zeros(())


def test_cross_entropy_asks_who_made_the_logits():
    head, hidden = make()
    asked, labels = Asked(), torch.arange(10)
    lazy = LazyLogits.from_head(head, hidden, asked)
    flat = lazy.float().view(-1, V)
    assert nn.functional.cross_entropy(flat, labels) == 0
    assert nn.CrossEntropyLoss(ignore_index=3, reduction="sum")(flat, labels) == 0
    assert asked.options == [((10, V), (10,), -100, "mean"), ((10, V), (10,), 3, "sum")]
    assert not lazy.is_materialised


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: nn.functional.cross_entropy(x, y, label_smoothing=0.1),
        lambda x, y: nn.functional.cross_entropy(x, y, weight=torch.linspace(0.1, 1, V)),
        lambda x, y: nn.functional.cross_entropy(x, nn.functional.one_hot(y, V).float()),
        lambda x, y: nn.functional.cross_entropy(x[:, :, None], y[:, None]),
        lambda x, y: nn.functional.cross_entropy(x.tanh().tanh(), y),
        lambda x, y: nn.functional.nll_loss(x.log_softmax(-1), y),
    ],
)
def test_other_cross_entropies_are_computed_from_real_logits(loss):
    head, hidden = make()
    asked, labels = Asked(), torch.arange(10)
    lazy = LazyLogits.from_head(head, hidden, asked)
    got, want = loss(lazy.view(-1, V), labels), loss(head(hidden).view(-1, V), labels)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not asked.options


def test_materialises_once():
    head, hidden = make()
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    lazy = LazyLogits.from_head(head, hidden)
    assert lazy.relu().shape == (2, 5, V)
    lazy.sum().backward()
    assert lazy.numpy(force=True).shape == (2, 5, V)
    assert len(calls) == 1


def test_autocast_and_gradient_modes_are_those_of_the_forward_pass():
    head, hidden = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lazy, real = LazyLogits.from_head(head, hidden), head(hidden)
    assert lazy.dtype == real.dtype == torch.bfloat16
    torch.testing.assert_close(lazy.materialise(), real, rtol=0, atol=0)

    with torch.no_grad():
        lazy = LazyLogits.from_head(head, hidden)
    assert not lazy.requires_grad
    assert not (lazy + 1).requires_grad

    lazy = LazyLogits.from_head(head, hidden)
    with torch.no_grad():
        doubled = lazy * 2.0
        assert not doubled.requires_grad
        assert not doubled.is_materialised
        assert not (doubled + 0).requires_grad
        lazy.argmax(-1)
    lazy.sum().backward()
    assert hidden.grad is not None

    with torch.inference_mode():
        lazy = LazyLogits.from_head(head, hidden)
    torch.testing.assert_close((lazy + 1).clone(), head(hidden).detach() + 1)
    lazy = LazyLogits.from_head(head, hidden)
    with torch.inference_mode():
        lazy.argmax(-1)
    assert (lazy + 1).requires_grad


def test_hooks_of_lazy_logits_reach_the_real_ones():
    head, hidden = make()
    lazy = LazyLogits.from_head(head, hidden)
    seen = []
    lazy.register_hook(lambda g: seen.append(("kept", g.shape)))
    lazy.register_hook(lambda g: seen.append(("removed", g.shape))).remove()
    assert not lazy.is_materialised
    lazy.sum().backward()
    assert seen == [("kept", lazy.shape)]


class _Sum(torch.autograd.Function):
    """Bypasses __torch_function__, as compiled losses do."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return torch.ops.aten.sum.default(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.expand(ctx.shape)


def test_gradient_that_would_be_lost_is_an_error():
    head, hidden = make()
    lazy = LazyLogits.from_head(head, hidden)
    total = _Sum.apply(lazy)
    torch.testing.assert_close(total, lazy.materialise().sum())
    with pytest.raises(RuntimeError, match="materialise"):
        total.backward()
    _Sum.apply(lazy.materialise()).backward()
    assert hidden.grad is not None


def test_values_below_torch_function_are_right():
    head, hidden = make()
    lazy = LazyLogits.from_head(head, hidden)
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        total = torch.sum(lazy)
    torch.testing.assert_close(total, head(hidden).sum().detach())


def test_logits_asked_for_after_the_step_are_an_error():
    head, hidden = make()
    lazy = LazyLogits.from_head(head, hidden)
    with torch.no_grad():
        head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="optimizer step"):
        lazy.argmax(-1)


def test_copies_and_pickles_hold_real_logits():
    head, hidden = make()
    with torch.no_grad():
        lazy = LazyLogits.from_head(head, hidden)
        real = head(hidden)
    for same in (copy.copy(lazy), copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy))):
        torch.testing.assert_close(same + 0, real)
