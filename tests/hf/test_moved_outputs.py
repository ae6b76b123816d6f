"""What libraries do to the outputs of a model - move, cast, copy, hang hooks on them - forms no
logits, and the loss and its gradients are stock's."""

import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32, send_to_device
from peft import LoraConfig, get_peft_model
from support.allocations import VocabularySized
from support.models import VOCAB_SIZE, tiny_batch, tiny_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp import MixedPrecisionPolicy as Policy

from sce_lm import SCEConfig, objectives
from sce_lm.hf import LazyLogits, apply_sce, objective_of
from sce_lm.ops import exact_cross_entropy

BATCH = {"batch": 9, "length": 16}
POSITIONS = 9 * 16
BF16 = torch.bfloat16


def dispatched(split):
    def dispatch(model, folder):
        options = {"main_device": "cpu", "offload_dir": str(folder), "force_hooks": True}
        return dispatch_model(model, split, **options)

    return dispatch


PARTS = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
OFFLOADED = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "forced hooks": dispatched({"": "cpu"}),
    "head on the disk": dispatched({"model": "cpu", "lm_head": "disk"}),
    "layers on the disk": dispatched({**dict.fromkeys(PARTS, "cpu"), "model.layers": "disk"}),
}


def lora(model, **options):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config)


def assert_as_stock(stock, patched, training=True):
    """Loss and gradients, those of the embedded input among them, and no logits formed."""
    counts, losses, gradients = [], [], []
    for model in (stock, patched):
        batch = tiny_batch(**BATCH)
        given = torch.randn(*batch.pop("input_ids").shape, 32, generator=torch.Generator())
        given.requires_grad_(training)
        model.train(training)
        with VocabularySized(POSITIONS, VOCAB_SIZE) as counter, torch.set_grad_enabled(training):
            output = model(inputs_embeds=given, **batch)
            if training:
                output.loss.backward()
        counts.append(counter.count)
        losses.append(output.loss.detach())
        gradients.append({n: p.grad for n, p in [("input", given), *model.named_parameters()]})
    assert isinstance(output.logits, LazyLogits)
    assert not output.logits.is_materialised
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert counts[0] > 0
    assert counts[1] == 0


@pytest.fixture
def blocks_of_eight(monkeypatch):
    """The exact loss forms the logits of one block of positions; here 8 of 144."""
    monkeypatch.setattr(exact_cross_entropy, "BLOCK_ELEMENTS", 8 * VOCAB_SIZE)


@pytest.mark.usefixtures("blocks_of_eight")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("llama", way) for way in OFFLOADED),
        ("gemma3", "cpu_offload"),
        ("gemma2", "disk_offload"),
        ("granite", "forced hooks"),
        ("phi", "cpu_offload"),
    ],
)
def test_offloaded_model(name, way, training, tmp_path):
    """A frozen model, patched before it is offloaded as well as after; tied, capped, scaled and
    biased heads."""
    exact = objectives.get("exact")
    stock = OFFLOADED[way](tiny_model(name).requires_grad_(False), tmp_path / "a")
    after = OFFLOADED[way](tiny_model(name).requires_grad_(False), tmp_path / "b")
    assert_as_stock(stock, apply_sce(after, exact), training)
    before = apply_sce(tiny_model(name).requires_grad_(False), exact)
    assert_as_stock(stock, OFFLOADED[way](before, tmp_path / "c"), training)


@pytest.mark.usefixtures("blocks_of_eight")
@pytest.mark.parametrize("way", ["forced hooks", "head on the disk"])
def test_adapters_on_a_dispatched_model(way, tmp_path):
    models = []
    for patch in (lambda m: m, lambda m: apply_sce(m, objectives.get("exact"))):
        folder = tmp_path / str(len(models))
        models.append(patch(lora(OFFLOADED[way](tiny_model("llama"), folder))))
    assert_as_stock(*models)


@pytest.mark.usefixtures("blocks_of_eight")
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "saved"])
def test_adapters_that_are_offloaded_themselves(options):
    models = []
    for patch in (lambda m: m, lambda m: apply_sce(m, objectives.get("exact"))):
        models.append(patch(cpu_offload(lora(tiny_model("llama"), **options), "cpu")))
    assert_as_stock(*models, training=False)


def test_sce_trains_on_a_model_whose_head_is_on_the_disk(tmp_path):
    covering = SCEConfig(
        num_buckets=3,
        bucket_candidates=20,
        shared_frequent=10,
        tail_candidates=VOCAB_SIZE,
        control_variate=True,
    )
    dispatch = OFFLOADED["head on the disk"]
    stock, patched = (lora(dispatch(tiny_model("llama"), tmp_path / x)) for x in "ab")
    apply_sce(patched, covering)
    for step in range(3):
        want, got = (m.train()(**tiny_batch(step)) for m in (stock, patched))
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
        assert not got.logits.is_materialised
        got.loss.backward()
    assert objective_of(patched).state.step == 3


def mixed_precision(model):
    """What Accelerator.prepare does to a model's forward."""
    autocast = torch.autocast("cpu", dtype=BF16)
    model.forward = convert_outputs_to_fp32(autocast(model.forward))
    return model


def data_parallel(**options):
    return lambda model: nn.parallel.DistributedDataParallel(model, **options)


def sharded(root, head=None):
    def shard(model):
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        if head is not None:
            fully_shard(model.lm_head, mesh=mesh, mp_policy=head)
        return fully_shard(model, mesh=mesh, mp_policy=root)

    return shard


def sharded_flat(model):
    return FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        mixed_precision=MixedPrecision(param_dtype=BF16),
    )


WRAPPED = {
    "mixed precision": mixed_precision,
    "DDP": data_parallel(),
    "DDP, static graph": data_parallel(static_graph=True),
    "DDP, unused": data_parallel(find_unused_parameters=True, gradient_as_bucket_view=True),
    "FSDP1": sharded_flat,
    "FSDP2": sharded(Policy(param_dtype=BF16, output_dtype=torch.float32)),
    "FSDP2, bf16 outputs": sharded(Policy(param_dtype=BF16, output_dtype=BF16)),
    "FSDP2, bf16 head": sharded(Policy(), head=Policy(param_dtype=BF16, output_dtype=BF16)),
}


@pytest.mark.usefixtures("blocks_of_eight", "process_group")
@pytest.mark.parametrize("way", WRAPPED)
def test_wrapped_model(way):
    losses, counts = [], []
    reference = float(tiny_model("llama")(**tiny_batch(**BATCH)).loss.detach())
    for patch in (lambda m: m, lambda m: apply_sce(m, objectives.get("exact"))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = WRAPPED[way](patch(tiny_model("llama")))
        for _ in range(2):  # DDP copies the outputs of the first step of a static graph
            with VocabularySized(POSITIONS, VOCAB_SIZE) as counter:
                output = model(**tiny_batch(**BATCH))
                output.loss.backward()
            counts.append(counter.count)
        losses.append(output.loss.detach())
        assert all(p.grad is not None for p in model.parameters())
    assert not output.logits.is_materialised
    assert min(counts[:2]) > 0
    assert counts[2:] == [0, 0]
    want, got = losses
    assert got.dtype == want.dtype
    assert abs(float(got) - reference) <= abs(float(want) - reference) + 1e-3


# ------------------------------------------------------------------------- one output by itself


def make():
    torch.manual_seed(0)
    return nn.Linear(8, 20), torch.randn(2, 5, 8, requires_grad=True)


SAME = {
    "send_to_device": lambda x: send_to_device({"x": x}, x.device)["x"],
    "send_to_device by name": lambda x: send_to_device((x,), "cpu", non_blocking=True)[0],
    "send_to_device of a list": lambda x: send_to_device([x], "cpu")[0],
    "device and dtype": lambda x: x.to("cpu", torch.float32),
    "keywords": lambda x: x.to(device="cpu", dtype=torch.bfloat16, non_blocking=True),
    "copy": lambda x: x.to(torch.float32, copy=True),
    "memory format": lambda x: x.to(torch.bfloat16, memory_format=torch.contiguous_format),
    "like another": lambda x: x.to(torch.zeros(1, dtype=torch.float64)),
    "device with an index": lambda x: x.to(torch.device("cpu", 0)),
    "type": lambda x: x.type(torch.bfloat16),
    "type by name": lambda x: x.type("torch.DoubleTensor"),
    "type_as": lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)),
    "another device": lambda x: x.to("meta", non_blocking=True),
    "there and cast": lambda x: x[:, 1:].to("meta").float().view(-1, 20),
}


@pytest.mark.parametrize("way", SAME)
def test_moved_logits_stay_lazy(way):
    head, hidden = make()
    lazy, real = (SAME[way](x) for x in (LazyLogits.from_head(head, hidden), head(hidden)))
    assert isinstance(lazy, LazyLogits)
    assert not lazy.is_materialised
    for name in ("shape", "dtype", "device", "requires_grad"):
        assert getattr(lazy, name) == getattr(real, name)
    formed = lazy.materialise()
    assert (formed.device, formed.dtype) == (real.device, real.dtype)
    if not real.is_meta:
        torch.testing.assert_close(formed, real, rtol=0, atol=0)
        formed.sum().backward()
        assert hidden.grad is not None


def test_same_place_and_kind_is_the_same_object():
    head, hidden = make()
    lazy = LazyLogits.from_head(head, hidden)
    assert lazy.to("cpu") is lazy.to(torch.float32, non_blocking=True) is lazy.float() is lazy
    assert lazy.to(torch.float32, copy=True) is not lazy


def test_device_of_a_head_that_accelerate_runs_elsewhere():
    head, hidden = make()
    add_hook_to_module(head, AlignDevicesHook(execution_device="meta"))
    lazy, real = LazyLogits.from_head(head, hidden), head(hidden)
    assert lazy.device == real.device == torch.device("meta")
    assert lazy[:, 1:].device == lazy.materialise().device == real.device
    head, hidden = make()
    add_hook_to_module(head, AlignDevicesHook("meta", io_same_device=True))
    assert LazyLogits.from_head(head, hidden).device == hidden.device


def test_integers_are_formed():
    head, hidden = make()
    lazy = LazyLogits.from_head(head, hidden)
    assert torch.equal(lazy.to(torch.int64), head(hidden).to(torch.int64))
    assert lazy.is_materialised
