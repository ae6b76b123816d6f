"""PEFT on patched models: adapters on the backbone, before and after apply_sce, equal to stock."""

import copy
import io
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import (
    AdaLoraConfig,
    CPTConfig,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftMixedModel,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from support.allocations import Sizes
from support.models import VOCAB_SIZE, tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments

from sce_lm import SCEConfig, objectives
from sce_lm.hf import LazyLogits, SCECallback, apply_sce, objective_of, remove_sce
from sce_lm.ops import exact_cross_entropy, logit_stream
from sce_lm.recsys.scoring import model_scorer


def lora(**options):
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def with_adapter(model, config):
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, where LoRA does nothing
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model.train()


def stock_and_patched(name, order, config):
    stock = with_adapter(tiny_model(name), config)
    exact = objectives.get("exact")
    if order == "before":
        return stock, with_adapter(apply_sce(tiny_model(name), exact), copy.deepcopy(config))
    return stock, apply_sce(with_adapter(tiny_model(name), copy.deepcopy(config)), exact)


def assert_same_step(stock, patched):
    batch = {**tiny_batch(), "num_items_in_batch": torch.tensor(31)}
    want, got = stock(**batch), patched(**batch)
    assert isinstance(got.logits, LazyLogits)
    assert not got.logits.is_materialised
    torch.testing.assert_close(got.loss, want.loss)
    for loss in (want.loss, got.loss):
        loss.backward()
    torch.testing.assert_close(got.logits.materialise(), want.logits)
    names = [name for name, _ in stock.named_parameters()]
    assert [name for name, _ in patched.named_parameters()] == names
    for name, p, q in zip(names, patched.parameters(), stock.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "granite", "phi"])
def test_lora_on_the_backbone(name, order):
    stock, patched = stock_and_patched(name, order, lora())
    assert_same_step(stock, patched)
    with torch.no_grad(), stock.eval().disable_adapter(), patched.eval().disable_adapter():
        batch = tiny_batch()
        torch.testing.assert_close(patched(**batch).loss, stock(**batch).loss)
    ids = tiny_batch()["input_ids"]
    options = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(patched.generate(**options), stock.generate(**options))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_head_in_modules_to_save(name, order):
    stock, patched = stock_and_patched(name, order, lora(modules_to_save=["lm_head"]))
    assert_same_step(stock, patched)
    wrapper = patched.base_model.model._modules["lm_head"]
    assert wrapper.modules_to_save["default"].weight.grad is not None
    assert type(wrapper.original_module) is torch.nn.Linear
    assert list(patched.state_dict()) == list(stock.state_dict())
    for model in (stock, patched):
        with torch.no_grad():
            wrapper_of = model.base_model.model._modules["lm_head"]
            wrapper_of.modules_to_save["default"].weight.mul_(1.5)
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(patched(**tiny_batch()).loss, stock(**tiny_batch()).loss)
        with stock.disable_adapter(), patched.disable_adapter():
            torch.testing.assert_close(patched(**tiny_batch()).loss, stock(**tiny_batch()).loss)


@pytest.mark.parametrize("order", ["before", "after"])
def test_prefix_tuning(order):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    stock, patched = stock_and_patched("llama", order, config)
    assert_same_step(stock, patched)


def test_merged_and_removed():
    stock, patched = stock_and_patched("llama", "before", lora())
    stock, patched = stock.merge_and_unload(), patched.merge_and_unload()
    torch.testing.assert_close(patched(**tiny_batch()).loss, stock(**tiny_batch()).loss)
    remove_sce(patched)
    assert type(patched(**tiny_batch()).logits) is torch.Tensor


def test_remove_through_the_wrapper():
    _, patched = stock_and_patched("llama", "before", lora(modules_to_save=["lm_head"]))
    patched(**tiny_batch())
    assert objective_of(patched) is not None
    remove_sce(patched)
    assert objective_of(patched) is None
    assert "lm_head" not in patched.base_model.model.__dict__


ON_HEAD = {"target_modules": ["q_proj", "lm_head"], "task_type": "CAUSAL_LM"}
NO_PRODUCTS = {
    "Dora": LoraConfig(r=4, use_dora=True, **ON_HEAD),
    "ALora": LoraConfig(r=4, alora_invocation_tokens=[5, 6], **ON_HEAD),
    "ia3": IA3Config(feedforward_modules=[], **ON_HEAD),
    "loha": LoHaConfig(r=4, **ON_HEAD),
    "lokr": LoKrConfig(r=4, **ON_HEAD),
    "oft": OFTConfig(oft_block_size=8, **ON_HEAD),
    "vera": VeraConfig(r=4, **ON_HEAD),
    "hira": HiraConfig(r=4, **ON_HEAD),
}


def moved_a_little(model):
    """Adapters away from where they do nothing."""
    generator = torch.Generator().manual_seed(2)
    for _, parameter in trained(model):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def with_moved(model, config):
    torch.manual_seed(1)
    return moved_a_little(get_peft_model(model, copy.deepcopy(config)).train())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", NO_PRODUCTS)
def test_adapters_whose_result_is_no_product_train_with_the_stock_loss(kind, order):
    """DoRA scales each row of W + s·B A, and so on: stock, and said once."""
    config = NO_PRODUCTS[kind]
    stock = with_moved(tiny_model("llama"), config)
    if order == "before":
        patched = with_moved(apply_sce(tiny_model("llama"), SCEConfig()), config)
    else:
        patched = apply_sce(with_moved(tiny_model("llama"), config), SCEConfig())
    with pytest.warns(UserWarning, match=rf"carries an adapter \({kind}\)"):
        losses = [model(**tiny_batch()).loss for model in (stock, patched)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*objective.*")
        patched(**tiny_batch())
    assert torch.equal(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    assert_same_gradients(patched, stock)
    assert objective_of(patched).state.is_new
    with torch.no_grad():
        want, got = (model.eval()(**tiny_batch()) for model in (stock, patched))
    assert torch.equal(got.loss, want.loss)


def test_dora_that_is_off_or_merged_is_a_product():
    stock, patched = stock_and_patched("llama", "before", head_lora(use_dora=True))

    def loss_and_kind():
        want, got = (model(**tiny_batch()) for model in (stock, patched))
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
        return type(got.logits)

    with pytest.warns(UserWarning, match="carries an adapter"):
        assert loss_and_kind() is torch.Tensor
    with stock.disable_adapter(), patched.disable_adapter():
        assert loss_and_kind() is LazyLogits
    for model in (stock, patched):
        model.merge_adapter()
    assert loss_and_kind() is LazyLogits
    for model in (stock, patched):
        model.unmerge_adapter()
        model.add_adapter("plain", head_lora())
        model.set_adapter("plain")
    assert loss_and_kind() is LazyLogits
    for model in (stock, patched):
        model.base_model.set_adapter(["default", "plain"])
    assert loss_and_kind() is torch.Tensor


def test_one_adapter_around_another_is_no_product():
    """A new LoHa layer does nothing yet, so that LoRA around it looks like LoRA alone."""

    def build():
        torch.manual_seed(1)
        model = PeftMixedModel(tiny_model("llama"), NO_PRODUCTS["loha"], "first")
        model.add_adapter("second", head_lora())
        model.set_adapter(["first", "second"])
        return model.train()

    stock, patched = build(), apply_sce(build(), objectives.get("exact"))
    for model in (stock, patched):
        moved_a_little(model)
    with pytest.warns(UserWarning, match=r"carries an adapter \(loha under a lora\)"):
        losses = [model(**tiny_batch()).loss for model in (stock, patched)]
    torch.testing.assert_close(losses[1], losses[0])


def test_a_forward_that_is_called_past_its_hooks_is_said():
    """AdaLoRA calls model.forward(...), on whatever layers it is."""
    config = AdaLoraConfig(total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    stock = with_moved(tiny_model("llama"), config)
    patched = with_moved(apply_sce(tiny_model("llama"), SCEConfig()), config)
    with pytest.warns(UserWarning, match="called past its hooks"):
        losses = [model(**tiny_batch()).loss for model in (stock, patched)]
    assert torch.equal(losses[1], losses[0])


# ------------------------------------------------------------------------- adapters on the head


def head_lora(**options):
    return LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "lora_alpha": 3}),
        ("gemma2", {}),
        ("granite", {}),
        ("gemma3", {}),
        ("phi", {"lora_bias": True}),
        ("llama", {"lora_dropout": 0.3}),
    ],
    ids=["plain", "rslora", "soft_cap", "scale", "tied", "lora_bias", "dropout"],
)
def test_lora_on_the_head(name, options, order):
    stock, patched = stock_and_patched(name, order, head_lora(**options))
    batch = {**tiny_batch(), "num_items_in_batch": torch.tensor(31)}
    losses = []
    for model in (stock, patched):
        torch.manual_seed(3)  # one mask of dropout for both
        losses.append(model(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert_same_gradients(patched, stock)
    assert any("lm_head.lora_B" in n and p.grad.abs().max() > 0 for n, p in trained(patched))
    for model in (stock.eval(), patched.eval()):
        model.zero_grad()
    with torch.no_grad():
        want, got = stock(**batch), patched(**batch)
        assert not got.logits.is_materialised
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(got.logits.materialise(), want.logits)
        with stock.disable_adapter(), patched.disable_adapter():
            torch.testing.assert_close(patched(**batch).loss, stock(**batch).loss)
    ids = {"input_ids": batch["input_ids"], "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(patched.generate(**ids), stock.generate(**ids))


def trained(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def assert_same_gradients(patched, stock):
    for (name, p), q in zip(patched.named_parameters(), stock.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            scale = float(q.grad.abs().max())
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("tying", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_on_tied_embeddings(order, tying):
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "embed_tokens"],
        ensure_weight_tying=tying,
        task_type="CAUSAL_LM",
    )
    stock, patched = stock_and_patched("gemma3", order, config)
    with torch.no_grad():
        for model in (stock, patched):
            generator = torch.Generator().manual_seed(4)
            for name, p in model.named_parameters():
                if "lora_embedding" in name:
                    p.normal_(0.0, 0.2, generator=generator)
    assert_same_step(stock, patched)
    assert hasattr(patched.base_model.model._modules["lm_head"], "lora_A") == tying


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["gemma3", "llama"])
@pytest.mark.parametrize("count", [3, 40])
def test_trainable_tokens(name, count, order):
    """On the tied head too, with few rows and with more than the width of the head."""
    ids = list(range(5, 5 + count))
    indices = ids if name == "gemma3" else {"embed_tokens": ids, "lm_head": ids}
    stock, patched = stock_and_patched(name, order, lora(trainable_token_indices=indices))
    with torch.no_grad():
        for model in (stock, patched):
            generator = torch.Generator().manual_seed(4)
            for parameter_name, p in model.named_parameters():
                if "trainable_tokens_delta" in parameter_name:
                    p.add_(torch.randn(p.shape, generator=generator))
    assert_same_step(stock, patched)
    stock, patched = (m.merge_and_unload() for m in (stock, patched))
    torch.testing.assert_close(patched(**tiny_batch()).loss, stock(**tiny_batch()).loss)


def test_several_adapters_on_the_head():
    stock, patched = stock_and_patched("llama", "before", head_lora())
    for model in (stock, patched):
        torch.manual_seed(6)
        model.add_adapter("other", head_lora(lora_alpha=5))
        model.base_model.model.lm_head.lora_B["other"].weight.data.normal_()
    batch = tiny_batch()

    def same():
        want, got = stock(**batch), patched(**batch)
        assert not got.logits.is_materialised
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
        return float(got.loss.detach())

    seen = {same()}
    for active in ("other", ["default", "other"]):
        for model in (stock, patched):
            model.base_model.set_adapter(active)
        seen.add(same())
    for model in (stock, patched):
        model(**batch).loss.backward()
    assert_same_gradients(patched, stock)
    for model in (stock, patched):
        model.merge_adapter(["default"])
    seen.add(same())
    for model in (stock, patched):
        model.unmerge_adapter()
        model.delete_adapter("other")
        model.set_adapter("default")
    seen.add(same())
    assert len({round(loss, 4) for loss in seen}) == 3  # one adapter, the other, both
    for model in (stock, patched):
        model.eval()
    with pytest.raises(ValueError, match="adapter_names"):
        patched(**batch, adapter_names=["default"] * 3)


def test_lora_head_is_the_merged_weight():
    """Unmerged against merged, in the full-candidate limit of SCE and exactly."""
    covering = SCEConfig(
        num_buckets=3,
        bucket_candidates=20,
        shared_frequent=10,
        tail_candidates=VOCAB_SIZE,
        control_variate=True,
    )
    merged = with_adapter(tiny_model("llama"), head_lora()).merge_and_unload()
    want = merged(**tiny_batch()).loss
    for config in (covering, objectives.get("exact")):
        patched = apply_sce(with_adapter(tiny_model("llama"), head_lora()), config)
        got = patched(**tiny_batch()).loss
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        got.backward()
        for change in ("merge_adapter", "unmerge_adapter", "merge_and_unload"):
            changed = getattr(patched, change)()
            got = (patched if changed is None else changed)(**tiny_batch()).loss
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "granite"])
def test_bf16_lora_head_is_within_stocks_own_error(name):
    """Against the same rounded weights in fp32, on average over batches; the backbone, which both
    compute in bf16, gives most of the error."""
    stock, patched = (m.to(torch.bfloat16) for m in stock_and_patched(name, "after", head_lora()))
    reference = copy.deepcopy(stock).float()
    errors = []
    for seed in range(6):
        batch = tiny_batch(seed)
        with torch.no_grad():
            want, *found = (float(m(**batch).loss) for m in (reference, stock, patched))
        errors.append([abs(loss - want) for loss in found])
    of_stock, of_ours = torch.tensor(errors).mean(dim=0).tolist()
    assert of_ours <= 1.2 * of_stock
    patched(**tiny_batch()).loss.backward()
    assert all(p.grad.isfinite().all() for _, p in trained(patched))


@pytest.mark.parametrize(
    "config",
    [
        SCEConfig(shared_frequent=512, tail_candidates=1024),
        SCEConfig.published(),
        objectives.get("exact"),
    ],
)
def test_no_merged_head_is_allocated(config, monkeypatch):
    """Counted on a head that outweighs everything else in the model."""
    monkeypatch.setattr(logit_stream, "TILE_CLASSES", 256)
    monkeypatch.setattr(exact_cross_entropy, "BLOCK_ELEMENTS", 0)
    sizes = []
    for patch in (lambda m: m, lambda m: apply_sce(m, config)):
        model = patch(with_adapter(tiny_model("llama", vocab_size=4001), head_lora()))
        weight = model.base_model.model.lm_head.weight
        with Sizes(weight) as counted:
            model(**tiny_batch()).loss.backward()
        sizes.append(counted.largest)
    assert sizes[1] < weight.numel() <= sizes[0]


def test_saved_head_adapter_loads_into_stock(tmp_path):
    _, patched = stock_and_patched("llama", "before", head_lora())
    patched.save_pretrained(tmp_path)
    batch = tiny_batch()
    stock = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    again = PeftModel.from_pretrained(apply_sce(tiny_model("llama"), SCEConfig()), tmp_path)
    for model in (stock, again):
        with torch.no_grad():
            torch.testing.assert_close(
                model.eval()(**batch).loss, patched.eval()(**batch).loss, rtol=1e-5, atol=0
            )


def test_offloaded_lora_head_is_fetched_layer_by_layer():
    stock, patched = stock_and_patched("llama", "after", head_lora())
    head = patched.base_model.model.lm_head
    for layer in (head.base_layer, head.lora_A["default"], head.lora_B["default"]):
        weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
        hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
        add_hook_to_module(layer, hook)
    with torch.no_grad():
        assert head.lora_B["default"].weight.is_meta
        got = patched.eval()(**tiny_batch()).loss
        torch.testing.assert_close(got, stock.eval()(**tiny_batch()).loss)


def test_items_are_ranked_with_the_adapter():
    patched = apply_sce(with_adapter(tiny_model("llama"), head_lora()), SCEConfig()).eval()
    ids = tiny_batch()["input_ids"]
    with torch.no_grad():
        want = patched(input_ids=ids).logits[:, -1]
    with model_scorer(patched) as score:
        found = score([row.numpy() for row in ids])(0, VOCAB_SIZE)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", ["dora", "prompt", "p"])
def test_dora_on_the_backbone_and_prompt_tuning(kind, order):
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    configs = {
        "dora": lora(use_dora=True),
        "prompt": PromptTuningConfig(**virtual),
        "p": PromptEncoderConfig(**virtual),
    }
    assert_same_step(*stock_and_patched("llama", order, configs[kind]))


def test_loss_of_context_aware_prompt_tuning_is_its_own():
    """CPT weighs the cross-entropy of the outputs, after the model's forward."""
    options = {"cpt_tokens_type_mask": [1, 2, 4], "opt_weighted_loss_type": "decay"}
    config = CPTConfig(
        cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], task_type="CAUSAL_LM", **options
    )
    stock, patched = stock_and_patched("llama", "before", config)
    for model in (stock, patched):
        model.zero_grad()
    losses = [model(**tiny_batch()).loss for model in (stock, patched)]
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_trainer_with_virtual_tokens_equals_stock(kind, tmp_path):
    """Loss, evaluation and logits of the Trainer, whose labels have no virtual tokens."""
    batch = tiny_batch(batch=8)
    data = [{name: values[row] for name, values in batch.items()} for row in range(8)]
    seen = []

    def shapes(prediction):
        return {"positions": prediction.predictions.shape[1]}

    for patch in (lambda m: m, lambda m: apply_sce(m, objectives.get("exact"))):
        model = with_moved(
            patch(tiny_model("llama")), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
        )
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        run = Trainer(
            model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=shapes
        )
        run.train()
        figures = run.evaluate()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        seen.append([*losses, figures["eval_loss"], figures["eval_positions"]])
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)


def test_trainer_saves_adapters_that_stock_peft_loads(tmp_path):
    model = with_adapter(apply_sce(tiny_model("llama"), SCEConfig()), lora())
    batch = tiny_batch(batch=8)
    data = [{name: values[row] for name, values in batch.items()} for row in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    run = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[SCECallback()])
    run.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "sce_state_rank0.safetensors").is_file()
    assert objective_of(model).state.step == 2
    stock = PeftModel.from_pretrained(tiny_model("llama"), checkpoint).eval()
    ids = {"input_ids": batch["input_ids"]}
    torch.testing.assert_close(model.eval()(**ids).logits, stock(**ids).logits)


def test_a_lora_head_goes_through_copies_pickles_and_checkpoints():
    config = SCEConfig(num_buckets=4, bucket_candidates=8, shared_frequent=8, tail_candidates=16)
    model = apply_sce(with_adapter(tiny_model("llama"), head_lora(lora_dropout=0.2)), config)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    models = [model, copy.deepcopy(model), torch.load(file, weights_only=False)]
    checkpointed = copy.deepcopy(model)
    checkpointed.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for m in (*models, checkpointed):
        torch.manual_seed(8)
        loss = m(**tiny_batch()).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for _, p in trained(m))])
        assert objective_of(m).state.step == 1
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_head_under_autocast(dtype):
    reference = with_adapter(tiny_model("llama"), head_lora())(**tiny_batch()).loss
    stock, patched = stock_and_patched("llama", "after", head_lora())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for model in (stock, patched):
        with torch.autocast("cpu", dtype=dtype):
            losses.append(model(**tiny_batch()).loss)
        scaler.scale(losses[-1]).backward()
    want, got = ((loss - reference).abs() for loss in losses)
    assert got <= want + 0.02
    for (name, p), (_, q) in zip(trained(patched), trained(stock)):
        torch.testing.assert_close(
            p.grad, q.grad, rtol=0, atol=3e-2 * float(q.grad.abs().max()), msg=name
        )
