"""What lazy logits answer is what real logits give, values and gradients, without being formed."""

import pytest
import torch
from support.allocations import RowsOfLogits
from support.models import VOCAB_SIZE, tiny_batch, tiny_model
from torch import nn
from torch.nn import functional

from sce_lm import SCEConfig, apply_sce
from sce_lm.hf import LazyLogits, asked_logits
from sce_lm.ops import logit_stream

B, T = 3, 17
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(asked_logits, "FORMED_ELEMENTS", 0)
    monkeypatch.setattr(logit_stream, "TILE_CLASSES", 60)
    monkeypatch.setattr(logit_stream, "TILE_POSITIONS", 20)


def ids(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, shape, generator=generator)


def labels_with_gaps(*shape):
    labels = ids(*shape)
    labels[..., ::4] = -100
    return labels


# ------------------------------------------------------------------------- TRL's access patterns


def selective_log_softmax(logits, index):
    index = index.unsqueeze(-1)
    if logits.dtype in (torch.float32, torch.float64):
        selected = torch.gather(logits, dim=-1, index=index).squeeze(-1)
        return selected - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    rows = []
    for row_logits, row_index in zip(logits, index, strict=True):
        rows.append(functional.log_softmax(row_logits, dim=-1).gather(dim=-1, index=row_index))
    return torch.stack(rows).squeeze(-1)


def entropy_from_logits(logits, chunk_size=8):
    entropies = []
    for chunk in logits.reshape(-1, logits.shape[-1]).split(chunk_size, dim=0):
        log_p = functional.log_softmax(chunk, dim=-1)
        entropies.append(-(torch.exp(log_p) * log_p).sum(-1))
    return torch.cat(entropies, dim=0).reshape(logits.shape[:-1])


def policy(logits):
    """Log-probabilities and entropies of completions, as GRPO takes them."""
    logits = logits[:, :-1, :][:, -9:, :] / 0.7
    log_p = selective_log_softmax(logits, ids(B, 9))
    with torch.no_grad():
        entropy = entropy_from_logits(logits)
    return log_p, entropy


def p_times_log_p(x):
    p, log_p = torch.softmax(x, -1), torch.log_softmax(x, -1)
    return -(p * log_p).sum(-1)


def label_smoother(logits, labels):
    """As the Trainer of transformers."""
    log_p = -functional.log_softmax(logits, dim=-1)
    labels = labels.unsqueeze(-1)
    mask = labels.eq(-100)
    labels = torch.clamp(labels, min=0)
    nll = log_p.gather(dim=-1, index=labels).masked_fill_(mask, 0.0)
    smoothed = log_p.sum(dim=-1, keepdim=True, dtype=log_p.dtype).masked_fill_(mask, 0.0)
    return 0.9 * nll.sum() + 0.1 * smoothed.sum() / VOCAB_SIZE


# name: each must give the same on lazy logits and on real ones. A tuple is of several results.
ANSWERS = {
    "logsumexp": lambda x: x.logsumexp(-1),
    "logsumexp_keepdim": lambda x: torch.logsumexp(x, dim=2, keepdim=True),
    "logsumexp_scaled": lambda x: (x * 0.3)[:, 2:].logsumexp(-1),
    "logsumexp_rows": lambda x: torch.stack([torch.logsumexp(row, -1) for row in x]),
    "gather": lambda x: torch.gather(x, -1, ids(B, T, 4)),
    "take_along_dim": lambda x: torch.take_along_dim(x, ids(1, T, 2), dim=-1),
    "log_softmax_gather": lambda x: x.log_softmax(-1).gather(-1, ids(B, T, 1)).squeeze(-1),
    "minus_log_softmax": lambda x: (-functional.log_softmax(x, -1)).gather(2, ids(B, T, 1)),
    "softmax_gather": lambda x: functional.softmax(x / 2.0, dim=-1).gather(-1, ids(B, T, 3)),
    "exp_gather": lambda x: x.log_softmax(-1).exp().gather(-1, ids(B, T, 3)),
    "gather_then_logsumexp": lambda x: x.gather(-1, ids(B, T, 1))[..., 0] - x.logsumexp(-1),
    "ids_of_all": lambda x: x[..., ids(5)],
    "ids_of_last": lambda x: x[:, -1, [3, -5]],
    "ids_of_rows": lambda x: x.log_softmax(-1)[
        torch.arange(B)[:, None], torch.arange(T), ids(B, T)
    ],
    "ids_of_flat": lambda x: x.flatten(0, 1).softmax(-1)[torch.arange(B * T), ids(B * T)],
    "argmax": lambda x: x.argmax(-1),
    "argmax_keepdim": lambda x: torch.argmax(x.softmax(-1), dim=-1, keepdim=True),
    "max": lambda x: tuple(x.max(-1)),
    "max_log_probability": lambda x: x.log_softmax(-1).max(dim=-1, keepdim=True).values,
    "amax": lambda x: torch.amax(x.softmax(-1), dim=-1),
    "topk": lambda x: tuple(x.topk(4)),
    "topk_probabilities": lambda x: tuple(torch.topk(x.softmax(-1), 3, dim=-1)),
    "entropy": p_times_log_p,
    "entropy_by_exp": entropy_from_logits,
    "entropy_scaled": lambda x: p_times_log_p(x[:, 3:] / 1.7).mean(),
    "entropy_by_logits": lambda x: x.logsumexp(-1) - (x.softmax(-1) * x).sum(-1),
    "sum": lambda x: x.sum(-1),
    "mean_log_probability": lambda x: x.log_softmax(-1).mean(dim=-1),
    "detached": lambda x: x.detach().logsumexp(-1) + x.sum(-1),
    "masked": lambda x: x[tiny_batch()["labels"] > 80].log_softmax(-1).gather(-1, ids(19, 1)),
    "index_select": lambda x: x[:, 1:].index_select(0, torch.tensor([2, 0])).logsumexp(-1),
    "index_select_repeated": lambda x: (
        torch.index_select(x, -2, ids(B * T) % T).log_softmax(-1).gather(-1, ids(B, B * T, 1))
    ),
    "halves": lambda x: torch.cat([half.logsumexp(-1) for half in x.chunk(2, dim=1)], dim=1),
    "cross_entropy": lambda x: functional.cross_entropy(
        x[:, :-1].reshape(-1, VOCAB_SIZE), labels_with_gaps(B * (T - 1))
    ),
    "cross_entropy_sum": lambda x: nn.CrossEntropyLoss(reduction="sum", ignore_index=4)(
        x.view(-1, VOCAB_SIZE), ids(B * T)
    ),
    "cross_entropy_none": lambda x: functional.cross_entropy(
        x.flatten(0, 1), labels_with_gaps(B * T), reduction="none"
    ),
    "cross_entropy_smoothed": lambda x: functional.cross_entropy(
        x.view(-1, VOCAB_SIZE), labels_with_gaps(B * T), label_smoothing=0.2
    ),
    "cross_entropy_weighted": lambda x: functional.cross_entropy(
        x.view(-1, VOCAB_SIZE),
        labels_with_gaps(B * T),
        weight=torch.linspace(0.1, 2.0, VOCAB_SIZE, dtype=x.dtype),
    ),
    "nll_loss": lambda x: functional.nll_loss(
        x.log_softmax(-1).view(-1, VOCAB_SIZE), labels_with_gaps(B * T)
    ),
    "selective_log_softmax": lambda x: selective_log_softmax(x, ids(B, T)),
    "policy": policy,
    "label_smoother": lambda x: label_smoother(x, labels_with_gaps(B, T)),
}
MODELS = ("llama", "gemma2", "gpt2", "lora")


def build(name, dtype, *, lazy):
    torch.manual_seed(0)
    layers = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}
    model = tiny_model("llama" if name == "lora" else name, **layers)
    if name == "lora":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    if lazy:
        apply_sce(model, SCEConfig(), lazy_logits="always")
    return model.to(dtype).eval()


def outcome(model, ask):
    """Results, and the gradient of every parameter for a sum of them with unequal weights."""
    results = ask(model(input_ids=tiny_batch()["input_ids"]).logits)
    results = results if isinstance(results, tuple) else (results,)
    loss = torch.zeros((), dtype=torch.float64)
    for result in results:
        if result.requires_grad:
            factors = torch.linspace(-1.0, 2.0, result.numel(), dtype=torch.float64)
            loss = loss + (result.double() * factors.view(result.shape)).sum()
    if loss.requires_grad:
        loss.backward()
    return results, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_real_logits(name, dtype):
    tolerance = TOLERANCE[dtype]
    stock, model = build(name, dtype, lazy=False), build(name, dtype, lazy=True)
    for what, ask in ANSWERS.items():
        for each in (stock, model):
            each.zero_grad()
        want, of_stock = outcome(stock, ask)
        with RowsOfLogits(VOCAB_SIZE) as rows:
            got, of_model = outcome(model, ask)
        assert rows.most <= 1, what  # a bias is one
        for x, y in zip(got, want, strict=True):
            assert (x.shape, x.dtype, x.requires_grad) == (y.shape, y.dtype, y.requires_grad), what
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=what)
        for p, q in zip(of_model, of_stock, strict=True):
            assert (p is None) == (q is None), what
            if q is not None:
                scale = max(1.0, float(q.abs().max()))
                torch.testing.assert_close(p / scale, q / scale, rtol=0, atol=tolerance, msg=what)


# ---------------------------------------------------------------- precision, number of streams


def pair(dtype=torch.float32, shape=(B, T), bias=True, width=8):
    """A head and hidden states that need gradients."""
    torch.manual_seed(1)
    head = nn.Linear(width, VOCAB_SIZE, bias=bias, dtype=dtype)
    return head, torch.randn(*shape, width, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("name", ["selective_log_softmax", "policy", "entropy", "cross_entropy"])
def test_half_precision_is_nearer_to_the_truth_than_real_logits(name):
    head, hidden = pair(torch.bfloat16)
    ask = ANSWERS[name]
    lazy, real = ask(LazyLogits.from_head(head, hidden)), ask(head(hidden))
    with torch.no_grad():
        exact = ask(head.double()(hidden.double()))
    for x, y, z in zip(*(r if isinstance(r, tuple) else (r,) for r in (lazy, real, exact))):
        assert x.dtype == y.dtype
        error, of_real = (float((r.detach() - z).abs().mean()) for r in (x, y))
        assert error <= of_real
        assert error < 2**-8 * float(z.abs().mean())  # half a step of bf16


def test_autocast_decides_the_dtype_as_for_real_logits():
    head, hidden = pair()
    ask = [*(ANSWERS[name] for name in ("logsumexp", "cross_entropy", "entropy", "softmax_gather"))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for each in ask:
            want, got = each(head(hidden)), each(LazyLogits.from_head(head, hidden))
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


class Streams:
    """Counts the passes over the classes."""

    def __init__(self, monkeypatch):
        self.count = {}
        for name in ("scan", "gradients"):
            self.watch(monkeypatch, name, getattr(logit_stream.LogitStream, name))

    def watch(self, monkeypatch, name, run):
        def counted(*args, **kwargs):
            self.count[name] = self.count.get(name, 0) + 1
            return run(*args, **kwargs)

        monkeypatch.setattr(logit_stream.LogitStream, name, counted)


def loss_and_entropy(x):
    log_p = x.log_softmax(-1)
    return log_p.gather(-1, ids(B, T, 1)).sum() - (log_p.exp() * log_p).sum(-1).sum()


@pytest.mark.parametrize(
    ("ask", "dtype"),
    [
        (policy, torch.float32),
        (policy, torch.bfloat16),
        (ANSWERS["gather_then_logsumexp"], torch.float32),
        (ANSWERS["cross_entropy_smoothed"], torch.float32),
        (loss_and_entropy, torch.float32),
        (lambda x: sum(row.logsumexp(-1).sum() for row in x), torch.float32),
    ],
)
def test_one_stream_forward_and_one_backward(monkeypatch, ask, dtype):
    streams = Streams(monkeypatch)
    head, hidden = pair(dtype)
    result = ask(LazyLogits.from_head(head, hidden))
    result = result[0] if isinstance(result, tuple) else result
    result.float().sum().backward()
    assert streams.count == {"scan": 1, "gradients": 1}


def test_log_partition_of_a_frozen_head_finds_its_gradient_in_one_stream(monkeypatch):
    streams = Streams(monkeypatch)
    head, hidden = pair()
    head.requires_grad_(False)
    selective_log_softmax(LazyLogits.from_head(head, hidden), ids(B, T)).sum().backward()
    assert streams.count == {"scan": 1}


def test_slice_uses_what_was_found_of_the_whole(monkeypatch):
    streams = Streams(monkeypatch)
    head, hidden = pair()
    lazy = LazyLogits.from_head(head, hidden)
    whole = lazy.logsumexp(-1)
    torch.testing.assert_close(lazy[:, 3:-1].logsumexp(-1), whole[:, 3:-1])
    with torch.no_grad():
        torch.testing.assert_close(lazy[1].logsumexp(-1), whole[1])
    assert streams.count == {"scan": 1}
    (lazy / 2).logsumexp(-1)
    assert streams.count == {"scan": 2}


def test_probabilities_under_dropout_of_an_adapter_sum_to_1():
    """Every question sees the same draw of it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False
    )
    model = peft.get_peft_model(tiny_model("llama", num_hidden_layers=1), config).train()
    apply_sce(model, SCEConfig(), lazy_logits="always")
    x = model(input_ids=tiny_batch()["input_ids"]).logits
    total = x[1].softmax(-1)[..., torch.arange(VOCAB_SIZE)].sum(-1)
    torch.testing.assert_close(total, torch.ones(T))
    rows = [row.softmax(-1).gather(-1, torch.arange(VOCAB_SIZE).expand(T, -1)) for row in x]
    torch.testing.assert_close(torch.stack(rows).sum(-1), torch.ones(B, T))


# ------------------------------------------------------------------------- what is still formed


def test_answer_is_a_tensor_of_its_own():
    head, hidden = pair()
    lazy = LazyLogits.from_head(head, hidden)
    first = lazy.logsumexp(-1)
    first.mul_(0.0)
    second = lazy.logsumexp(-1)
    torch.testing.assert_close(second, head(hidden).logsumexp(-1))
    second.sum().backward()


FORMED = {
    "variance": lambda x: x.log_softmax(-1).var(-1),
    "over_rows": lambda x: x.softmax(1).sum(-1),
    "smallest": lambda x: x.topk(2, largest=False).values,
    "sum_of_squares": lambda x: (x.softmax(-1) * x.softmax(-1)).sum(-1),
    "of_two_temperatures": lambda x: (x.softmax(-1) * (x / 2).log_softmax(-1)).sum(-1),
    "half_detached": lambda x: (x.softmax(-1).detach() * x.log_softmax(-1)).sum(-1),
    "of_two_rows": lambda x: (x[0].softmax(-1) * x[1].log_softmax(-1)).sum(-1),
    "divergence": lambda x: functional.kl_div(
        x[:, 1:].log_softmax(-1), x[:, :-1].softmax(-1), reduction="batchmean"
    ),
    "temperature_0": lambda x: (x / 0.0).logsumexp(-1),
    "one_class": lambda x: x[..., 7],
    "classes": lambda x: x.log_softmax(-1)[:, :, 3:9],
    "changed": lambda x: (x.log_softmax(-1) * 2.0).logsumexp(-1),
    "index_select_classes": lambda x: x.index_select(-1, ids(4)),
    "index_select_formed": lambda x: x.index_select(1, torch.tensor([3, 3, 1])).softmax(-1) ** 2,
    "partial_gather": lambda x: x.gather(-1, ids(B, T - 2, 2)),
    "exponential": lambda x: x.exp().sum(-1),
    "soft_labels": lambda x: functional.cross_entropy(
        x.view(-1, VOCAB_SIZE), x.detach().view(-1, VOCAB_SIZE).softmax(-1)
    ),
}


@pytest.mark.parametrize("name", FORMED)
def test_what_is_not_known_is_computed_from_real_logits(name):
    head, hidden = pair(torch.float64)
    inputs = (hidden, *head.parameters())
    got, want = (FORMED[name](f(head, hidden)) for f in (LazyLogits.from_head, nn.Linear.__call__))
    torch.testing.assert_close(got, want, equal_nan=True)
    grads = [torch.autograd.grad(x.sum(), inputs) for x in (got, want)]
    torch.testing.assert_close(*grads, equal_nan=True)


def test_errors_are_those_of_torch():
    head, hidden = pair()
    for ask in (
        lambda x: x.gather(-1, torch.full((B, T, 1), VOCAB_SIZE)),
        lambda x: functional.cross_entropy(
            x.view(-1, VOCAB_SIZE), torch.full((B * T,), VOCAB_SIZE)
        ),
        lambda x: x.index_select(0, torch.tensor([-1])),
    ):
        with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
            ask(LazyLogits.from_head(head, hidden))


def test_slice_is_formed_without_its_base():
    head, hidden = pair(width=2)
    lazy, real = LazyLogits.from_head(head, hidden), head(hidden)
    last = lazy[:, -1]
    with RowsOfLogits(VOCAB_SIZE) as rows:
        got = [last + 1, last.var(-1), lazy[0, 2:4].softmax(-1).square()]
    want = [real[:, -1] + 1, real[:, -1].var(-1), real[0, 2:4].softmax(-1).square()]
    torch.testing.assert_close(got, want)
    assert rows.most == B
    assert not lazy.is_materialised
    last.transpose(0, 1).zero_()  # memory that is shared with the base
    assert lazy[:, -1].abs().sum() == 0
    torch.testing.assert_close(lazy[:, 0] + 0, real[:, 0])


def test_hook_of_a_user_gets_the_gradient_of_the_logits():
    head, hidden = pair()
    lazy, seen = LazyLogits.from_head(head, hidden), []
    lazy.register_hook(lambda g: seen.append(g))
    functional.log_softmax(lazy / 2, -1).gather(-1, ids(B, T, 1)).sum().backward()
    assert seen[0].shape == (B, T, VOCAB_SIZE)


def test_answers_after_the_weights_changed_are_an_error():
    head, hidden = pair()
    lazy = LazyLogits.from_head(head, hidden)
    with torch.no_grad():
        head.weight.add_(1.0)
    for ask in (torch.argmax, torch.logsumexp):
        with pytest.raises(RuntimeError, match="optimizer step"):
            ask(lazy, -1)


def test_few_logits_are_formed_and_give_the_very_bits(monkeypatch):
    monkeypatch.setattr(asked_logits, "FORMED_ELEMENTS", B * VOCAB_SIZE)
    head, hidden = pair()
    lazy, real = LazyLogits.from_head(head, hidden), head(hidden.detach()[:, -1])
    assert torch.equal(
        lazy[:, -1].log_softmax(-1).max(-1).values, real.log_softmax(-1).max(-1).values
    )
    lazy.logsumexp(-1)
    assert not lazy.is_materialised


# ------------------------------------------------------------------------------ lazy_logits=


def test_always_returns_lazy_logits_without_labels_and_real_ones_to_generate():
    stock, model = (
        build("llama", torch.float32, lazy=False),
        build("llama", torch.float32, lazy=True),
    )
    inputs = {"input_ids": tiny_batch()["input_ids"]}
    for training in (True, False):
        assert isinstance(model.train(training)(**inputs).logits, LazyLogits)
        with torch.no_grad():
            assert isinstance(model(**inputs, use_cache=False).logits, LazyLogits)
            assert type(model(**inputs, use_cache=True).logits) is torch.Tensor
    for options in ({}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True}):
        texts = []
        for each in (stock, model):
            torch.manual_seed(0)
            texts.append(each.generate(**inputs, max_new_tokens=6, pad_token_id=0, **options))
        assert torch.equal(*texts)
    apply_sce(model, SCEConfig())
    assert type(model(**inputs).logits) is torch.Tensor
    with pytest.raises(ValueError, match="always"):
        apply_sce(model, SCEConfig(), lazy_logits="often")


def test_answers_inside_fsdp(process_group):
    """Its hook on the model's outputs must not form them, and must fire."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    stock, model = (build("llama", torch.float32, lazy=lazy).train() for lazy in (False, True))
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for part in (*model.model.layers, model):
        fsdp.fully_shard(part, mesh=mesh)
    for _ in range(2):
        for each in (stock, model):
            logits = each(input_ids=tiny_batch()["input_ids"]).logits
            policy(logits)[0].mean().backward()
        assert not logits.is_materialised
        for p, q in zip(model.parameters(), stock.parameters()):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-5)
