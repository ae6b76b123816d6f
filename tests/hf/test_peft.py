"""PEFT on patched models: adapters on the backbone, before and after apply_sce, equal to stock."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from support.models import tiny_batch, tiny_model
from transformers import Trainer, TrainingArguments

from sce_lm import SCEConfig, objectives
from sce_lm.hf import LazyLogits, SCECallback, apply_sce, objective_of, remove_sce


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


def test_adapter_on_the_head_is_refused():
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="carries an adapter"):
        apply_sce(get_peft_model(tiny_model("llama"), config), SCEConfig())
    patched = get_peft_model(apply_sce(tiny_model("llama"), SCEConfig()), config)
    with pytest.raises(ValueError, match="carries an adapter"):
        patched(**tiny_batch())
    ids = {"input_ids": tiny_batch()["input_ids"]}
    assert type(patched(**ids).logits) is torch.Tensor


def test_trainable_tokens_on_a_tied_head_are_refused():
    config = lora(trainable_token_indices=[3, 4])
    with pytest.raises(ValueError, match="carries an adapter"):
        apply_sce(get_peft_model(tiny_model("gemma3"), config), SCEConfig())


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
