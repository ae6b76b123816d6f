"""Host code on tensors of a device that is not here: it meets no other device, and what it makes
lies there. Code that waits for the device, by ``.item()`` or ``unique``, cannot run so and is not
here yet."""

import pytest
import torch
from support.devices import DEVICES, absent

from sce_lm import LogitTransform, objectives
from sce_lm.candidates.buckets import kmeans_buckets, random_centers
from sce_lm.candidates.center_softmax import center_softmax
from sce_lm.candidates.hashing import hash_chunks
from sce_lm.candidates.kernel_sampler import KernelSampler, fit_projection, mean_kernel_proposal
from sce_lm.candidates.prior import log_label_prior
from sce_lm.candidates.proposals import Categorical, LogUniform, draw_rows
from sce_lm.candidates.resampling import multinomial_counts
from sce_lm.candidates.state import SCEState
from sce_lm.objectives.in_batch import streaming_frequency
from sce_lm.ops.catalogue_scan import catalogue_topk
from sce_lm.ops.exact_cross_entropy import exact_gradients, exact_scores
from sce_lm.ops.head import Head, Needs, sparse_gradient
from sce_lm.ops.positions import Positions
from sce_lm.ops.row_reductions import row_reductions

N, V, D = 60, 500, 16
POST = LogitTransform(1.0, 30.0)
where = {"device": "cpu"}
"""The device of the problem at hand."""


def floats(*shape):
    return torch.empty(shape, device=where["device"])


def ids(*shape):
    return torch.zeros(shape, dtype=torch.int64, device=where["device"])


def head():
    return Head(floats(V, D), None, floats(V), POST)


def exact():
    positions = Positions(floats(N, D), ids(N), floats(N))
    scores = exact_scores(head(), positions, top_k=3)
    needs = Needs(True, (True, False, True))
    gradients = exact_gradients(head(), positions, floats(N), needs)
    return [*scores, *(g for g in gradients if g is not None)]


def reductions():
    options = {"entropy": True, "logit_sum": True, "top_k": 3, "backend": "torch"}
    hidden = floats(N, D).requires_grad_()
    found = row_reductions(head(), hidden, ids=ids(N, 2), **options)
    asked = [*found[:3], found.logit_sum, found.top.values]
    (grad,) = torch.autograd.grad(asked, hidden, [torch.ones_like(x) for x in asked])
    return [*asked, found.top.indices, grad]


def at_centers():
    return center_softmax(floats(4, D), ids(N), head(), control_variate=True)


def shared_kernel():
    return mean_kernel_proposal(floats(V, D), floats(N, D), 1.0).log_prob(ids(9))


def a_state():
    state = SCEState()
    counts = state.begin_call(ids(N), V, seed=1)[0]
    return counts, state.most_frequent(counts, ids(N), 20)


HOST_CODE = {
    "exact, by tiles": exact,
    "row reductions": reductions,
    "k-means": lambda: kmeans_buckets(floats(N, D), 4, None),
    "mixed centres": lambda: random_centers(floats(N, D), 4, None, mix=True),
    "softmax at centres": at_centers,
    "prior by labels": lambda: log_label_prior(ids(V), 0.75, 0.1),
    "categorical": lambda: Categorical(floats(V)).log_prob(ids(9)),
    "log-uniform": lambda: LogUniform(V).log_prob(ids(9)),
    "kernel proposal": lambda: mean_kernel_proposal(floats(V, D), floats(N, D), 1.0).log_prob(
        ids(9)
    ),
    "kernel blocks": lambda: KernelSampler(floats(V, D), 8, 1.0).grams,
    "projection": lambda: fit_projection(floats(N, D), floats(V, D), 4),
    "hashing": lambda: hash_chunks([floats(N, D)], floats(8, D), 4),
    "resampling": lambda: multinomial_counts(floats(N, 30), 5, None),
    "scan": lambda: catalogue_topk(floats(4, D), head(), 9, backend="torch"),
    "row sum": lambda: head().row_sum(),
    "gradients of the head": lambda: [
        g
        for g in head().gradients((True, False, True), ids(9), floats(9, D + 1), floats(1, D + 1))
        if g is not None
    ],
    "sparse gradient": lambda: sparse_gradient(floats(V, D), ids(9), floats(9, D)),
    "state": a_state,
    "streaming": lambda: streaming_frequency(SCEState(), ids(9), ids(9), 9, V, 0.1, keep=True),
}


def tensors(found):
    if torch.is_tensor(found):
        return [found]
    return [x for part in found for x in tensors(part)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", HOST_CODE)
def test_what_it_makes_lies_on_the_device(name, device, monkeypatch):
    monkeypatch.setitem(where, "device", device)
    with absent(device):
        found = tensors(HOST_CODE[name]())
        assert found
        assert all(x.device.type == device for x in found)


@pytest.mark.parametrize("wrong", ["weight", "labels", "bias"])
def test_inputs_on_two_devices_are_refused(wrong):
    where = dict.fromkeys(("hidden_states", "weight", "labels", "bias"), "cpu") | {wrong: "meta"}
    hidden = torch.zeros(N, D, device=where["hidden_states"])
    weight, bias = torch.zeros(V, D, device=where["weight"]), torch.zeros(V, device=where["bias"])
    labels = torch.zeros(N, dtype=torch.int64, device=where["labels"])
    sentence = f"{wrong} is on meta and hidden_states is on cpu; move them to one device"
    with pytest.raises(ValueError, match=sentence):
        objectives.get("exact")(hidden, weight, labels, bias=bias)


def test_draws_of_a_row_are_on_the_generators_device():
    ids, log_weights = draw_rows(LogUniform(V), 4, 5, torch.Generator(), distinct=True)
    assert ids.device.type == log_weights.device.type == "cpu"
