import copy
import inspect
import io
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from programs import conformance
from support.allocations import VocabularySized
from support.models import NAMES, VOCAB_SIZE, tiny_batch, tiny_config, tiny_model
from support.versions import TRANSFORMERS_5
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel, GPT2DoubleHeadsModel, LlamaForCausalLM

from sce_lm import SCEConfig, objectives
from sce_lm.hf import (
    LazyLogits,
    apply_sce,
    last_statistics,
    loss_seconds,
    objective_of,
    probe_loss,
    remove_sce,
)
from sce_lm.hf.adapter import lazy_logits
from sce_lm.ops import exact_cross_entropy


def exact_pair(name, **changes):
    """The same model twice: stock, and with the objective "exact"."""
    return tiny_model(name, **changes), apply_sce(
        tiny_model(name, **changes), objectives.get("exact")
    )


def assert_same_gradients(patched, stock):
    for (name, p), q in zip(patched.named_parameters(), stock.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-5, atol=1e-5 * float(q.grad.abs().max()), msg=name
            )


def logits_of(output):
    values = output if isinstance(output, tuple) else output.values()
    return next(v for v in values if torch.is_tensor(v) and v.shape[-1:] == (VOCAB_SIZE,))


ARGUMENTS = {
    "labels": lambda batch: batch,
    "int_items": lambda batch: {**batch, "num_items_in_batch": 31},
    "tensor_items": lambda batch: {**batch, "num_items_in_batch": torch.tensor(31)},
    "shift_labels": lambda batch: {**batch, "shift_labels": batch["labels"].roll(-1, 1)},
    "logits_to_keep": lambda batch: {
        **batch,
        "labels": batch["labels"][:, -6:],
        "logits_to_keep": 6,
    },
    "other_ignore_index": lambda batch: {
        **batch,
        "labels": batch["labels"].masked_fill(batch["labels"] == -100, -7),
        "ignore_index": -7,
    },
    "tuple": lambda batch: {**batch, "return_dict": False},
}


@pytest.mark.parametrize("name", NAMES)
def test_exact_objective_equals_stock(name):
    stock, patched = exact_pair(name)
    for arguments in ARGUMENTS.values():
        batch = arguments(tiny_batch())
        want, got = stock(**batch), patched(**batch)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
        logits, real = logits_of(got), logits_of(want)
        assert isinstance(logits, LazyLogits)
        assert not logits.is_materialised
        torch.testing.assert_close(logits.materialise(), real, rtol=0, atol=0)
        for model, loss in ((stock, want[0]), (patched, got[0])):
            model.zero_grad()
            loss.backward()
        assert_same_gradients(patched, stock)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_and_generation_equal_stock(name):
    stock, patched = (model.eval() for model in exact_pair(name))
    batch = tiny_batch()
    with torch.no_grad():
        want, got = stock(**batch), patched(**batch)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
        assert not got.logits.is_materialised
        torch.testing.assert_close(got.logits[:, 3:7].argmax(-1), want.logits[:, 3:7].argmax(-1))
        shifted = batch["labels"].roll(-1, 1)
        shifted[:, -1] = -100
        hits = (want.logits.argmax(-1) == shifted) & (shifted != -100)
        assert torch.equal(last_statistics(patched).correct, hits)
    del batch["labels"]
    assert type(patched(**batch).logits) is torch.Tensor
    if name == "mixtral" and not TRANSFORMERS_5:
        pytest.skip("Mixtral of transformers 4 cannot generate while it returns router logits")
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    assert torch.equal(patched.generate(**batch, **options), stock.generate(**batch, **options))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_no_logits_are_allocated(name, training, monkeypatch):
    # The exact loss forms the logits of one block of positions; here 8 of 144.
    monkeypatch.setattr(exact_cross_entropy, "BLOCK_ELEMENTS", 8 * VOCAB_SIZE)
    batch = tiny_batch(batch=9, length=16)
    counts = []
    for model in exact_pair(name):
        with VocabularySized(9 * 16, VOCAB_SIZE) as counter, torch.set_grad_enabled(training):
            loss = model.train(training)(**batch).loss
            if training:
                loss.backward()
        counts.append(counter.count)
    assert counts[0] > 0
    assert counts[1] == 0


def weighted_cross_entropy(logits, labels, weights, num_items=None):
    """By the formula of transformers, with labels and weights shifted alike."""
    labels, weights = labels[:, 1:].reshape(-1), weights[:, 1:].reshape(-1)
    logits = logits[:, :-1].flatten(0, 1).float()
    losses = nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return (losses * weights).sum() / (num_items or (labels != -100).sum())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("num_items", [None, 31])
def test_loss_weights(name, num_items):
    stock, patched = exact_pair(name)
    batch, weights = tiny_batch(), torch.rand(tiny_batch()["labels"].shape)
    want = weighted_cross_entropy(stock(**batch).logits, batch["labels"], weights, num_items)
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    got = patched(**batch, loss_weights=weights, **options).loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    want.backward()
    got.backward()
    assert_same_gradients(patched, stock)
    shifted = {"shift_labels": batch["labels"].roll(-1, 1), **options}
    shifted["shift_labels"][:, -1] = -100
    again = patched(**batch, loss_weights=weights.roll(-1, 1), **shifted).loss
    torch.testing.assert_close(again, got)
    evaluated = patched.eval()(**batch, loss_weights=weights, **options).loss
    torch.testing.assert_close(evaluated, got)


def test_loss_weights_that_reach_no_loss():
    patched, batch = exact_pair("llama")[1], tiny_batch()
    weights = torch.ones(batch["labels"].shape)
    with pytest.raises(ValueError, match="pass one weight for each label"):
        patched(**batch, loss_weights=weights[:, 1:])
    with pytest.raises(ValueError, match="loss_weights was given to LlamaForCausalLM, whose"):
        patched(input_ids=batch["input_ids"], loss_weights=weights)
    patched(**batch)


@pytest.mark.parametrize("name", NAMES)
def test_covering_sce_equals_stock(name):
    """SCE whose lists cover the vocabulary: scale, cap, bias, ties and router loss go through."""
    config = SCEConfig(
        num_buckets=3,
        bucket_candidates=20,
        shared_frequent=10,
        tail_candidates=VOCAB_SIZE,
        control_variate=True,
    )
    stock, patched = tiny_model(name), apply_sce(tiny_model(name), config)
    batch = tiny_batch()
    expected, loss = stock(**batch).loss, patched(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    expected.backward()
    loss.backward()
    assert objective_of(patched).state.step == 1
    assert_same_gradients(patched, stock)


def test_loss_seconds_are_those_of_training():
    model, batch = apply_sce(tiny_model("llama"), SCEConfig()), tiny_batch(0)
    model.eval()(**batch)
    assert loss_seconds(model) == 0
    probe_loss(model, every=1, positions=4)
    model.train()(**batch)
    spent = loss_seconds(model)
    model.eval()(**batch)
    assert loss_seconds(model) == spent > 0


def test_corrected_sce_trains_and_eval_is_exact():
    stock, patched = tiny_model("llama"), apply_sce(tiny_model("llama"), SCEConfig())
    batch = tiny_batch()
    patched(**batch).loss.backward()
    assert objective_of(patched).state.step == 1
    assert all(p.grad is not None for p in patched.parameters())
    with torch.no_grad():
        want = stock.eval()(**batch).loss
        torch.testing.assert_close(patched.eval()(**batch).loss, want)
    assert objective_of(patched).state.step == 1


def test_positional_labels_are_noticed():
    stock, patched = exact_pair("gpt2")
    batch = tiny_batch()
    names = list(inspect.signature(stock.forward).parameters)
    arguments = [batch.get(name) for name in names[: names.index("labels") + 1]]
    got = patched(*arguments)
    assert isinstance(got.logits, LazyLogits)
    torch.testing.assert_close(got.loss, stock(*arguments).loss)


def test_loss_function_outside_forward_with_shift_labels():
    """What context-parallel trainers do: no labels in forward, the loss from its logits."""
    stock, patched = exact_pair("gemma2")
    batch = tiny_batch()
    shift_labels = batch.pop("labels").roll(-1, 1)
    losses = []
    for model in (stock, patched):
        logits = model(**batch, shift_labels=shift_labels).logits
        loss = model.loss_function(
            logits=logits, labels=None, vocab_size=VOCAB_SIZE, shift_labels=shift_labels
        )
        loss.backward()
        losses.append(loss)
    assert not logits.is_materialised
    torch.testing.assert_close(losses[1], losses[0])
    assert_same_gradients(patched, stock)


def test_all_labels_ignored_is_a_connected_zero():
    patched = apply_sce(tiny_model("phi"), SCEConfig())
    batch = tiny_batch()
    loss = patched(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in patched.parameters())


def test_labels_that_do_not_fit_the_logits_fail_as_in_stock():
    stock, patched = exact_pair("llama")
    batch = {**tiny_batch(), "logits_to_keep": 6}
    for model in (stock, patched):
        with pytest.raises(ValueError, match="batch_size"):
            model(**batch)


def test_label_outside_the_vocabulary_is_named():
    patched = apply_sce(tiny_model("llama"), SCEConfig())
    batch = tiny_batch()
    batch["labels"][1, 3] = VOCAB_SIZE
    with pytest.raises(ValueError, match=f"labels holds {VOCAB_SIZE}"):
        patched(**batch)
    assert "lm_head" not in patched.__dict__


def test_bf16_autocast_stays_within_stocks_own_error():
    stock, patched = exact_pair("llama")
    reference = stock(**tiny_batch()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = stock(**tiny_batch()).loss, patched(**tiny_batch()).loss
    assert got.dtype == torch.float32
    assert (got - reference).abs() <= (want - reference).abs() + 0.02
    got.backward()
    assert all(p.grad.isfinite().all() for p in patched.parameters())


def test_gradient_scaler_equals_stock():
    """fp16 autocast with a scaled loss, accumulated over two micro-batches; then an overflow."""
    stock, patched = exact_pair("llama")
    norms = []
    for model in (stock, patched):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for seed in range(2):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(**tiny_batch(seed), num_items_in_batch=torch.tensor(70)).loss
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1e9))
        before = model.lm_head.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 1024.0
        assert not torch.equal(model.lm_head.weight, before)

        optimizer.zero_grad()
        before = model.lm_head.weight.detach().clone()
        (scaler.scale(model(**tiny_batch()).loss) * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        assert torch.equal(model.lm_head.weight, before)
    torch.testing.assert_close(norms[1], norms[0], rtol=2e-2, atol=0)


def test_sce_under_autocast_gives_finite_gradients_in_the_weights_dtype():
    for dtype in (torch.bfloat16, torch.float16):
        model = apply_sce(tiny_model("gemma2"), SCEConfig())
        with torch.autocast("cpu", dtype=dtype):
            loss = model(**tiny_batch()).loss
        loss.backward()
        assert loss.dtype == torch.float32
        for parameter in model.parameters():
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    stock, patched = (model.to(dtype) for model in exact_pair("gemma2"))
    want, got = stock(**tiny_batch()), patched(**tiny_batch())
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.loss.float(), want.loss, rtol=tolerance, atol=tolerance)
    assert torch.equal(got.logits, want.logits)
    got.loss.backward()
    assert patched.lm_head.weight.grad.dtype == dtype


def test_gradient_checkpointing_equals_stock():
    stock, patched = exact_pair("qwen3")
    patched.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (stock, patched):
        model(**tiny_batch()).loss.backward()
    assert_same_gradients(patched, stock)


def test_checkpoint_around_the_model_replays_the_same_candidates():
    batch = tiny_batch()
    config = SCEConfig(num_buckets=4, bucket_candidates=8, shared_frequent=8, tail_candidates=16)
    gradients = []
    for use_checkpoint in (False, True):
        model = apply_sce(tiny_model("llama"), config)
        torch.manual_seed(7)

        def loss(ids, labels, model=model):
            return model(input_ids=ids, labels=labels).loss

        arguments = (batch["input_ids"], batch["labels"])
        if use_checkpoint:
            torch.utils.checkpoint.checkpoint(loss, *arguments, use_reentrant=False).backward()
        else:
            loss(*arguments).backward()
        gradients.append([p.grad for p in model.parameters()])
        assert objective_of(model).state.step == 1
    torch.testing.assert_close(gradients[0], gradients[1])


# --------------------------------------------------------------------- the model stays itself


def test_remove_undoes_everything():
    model, stock = tiny_model("gpt2"), tiny_model("gpt2")
    names = set(model.__dict__)
    hooks = (model._forward_hooks, model._forward_pre_hooks, model._load_state_dict_post_hooks)
    apply_sce(model, SCEConfig())
    model(**tiny_batch())
    assert remove_sce(model) is model
    assert set(model.__dict__) == names
    assert not any(hooks)
    assert type(model.lm_head) is nn.Linear
    assert model.loss_function is stock.loss_function
    assert objective_of(model) is None
    got = model(**tiny_batch())
    assert type(got.logits) is torch.Tensor
    assert torch.equal(got.loss, stock(**tiny_batch()).loss)
    assert remove_sce(model) is model


def test_loss_function_that_was_set_to_the_stock_one_comes_back():
    model = tiny_model("llama")
    model.loss_function = stock = model.loss_function
    remove_sce(apply_sce(model, SCEConfig()))
    assert model.__dict__["_loss_function"] is stock


def test_applying_again_replaces_the_objective():
    model = apply_sce(tiny_model("llama"), SCEConfig())
    names = set(model.__dict__)
    exact = objectives.get("exact")
    assert objective_of(apply_sce(model, exact)) is exact
    assert set(model.__dict__) == names
    assert len(model._forward_pre_hooks) == 1


def test_model_is_stock_between_forwards():
    stock, model = exact_pair("gemma3")
    model(**tiny_batch())
    assert model.lm_head is model._modules["lm_head"] is model.get_output_embeddings()
    assert "lm_head" not in model.__dict__
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in stock.named_modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in stock.named_parameters()]


def test_failed_or_interrupted_forward_leaves_a_working_model():
    model = apply_sce(tiny_model("llama"), objectives.get("exact"))
    batch = tiny_batch()
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*_, error=error):
            raise error

        handle = model.model.register_forward_hook(fail)
        with pytest.raises(error):
            model(**batch)
        handle.remove()
        assert type(model(input_ids=batch["input_ids"]).logits) is torch.Tensor
        assert "lm_head" not in model.__dict__
        assert isinstance(model(**batch).logits, LazyLogits)


def test_signature_and_loss_type_are_stocks():
    stock, model = exact_pair("llama")
    assert inspect.signature(model.forward) == inspect.signature(stock.forward)
    assert model.loss_type == stock.loss_type


@pytest.mark.parametrize("name", ["gemma3", "llama", "phi"])
@pytest.mark.parametrize("size", [VOCAB_SIZE + 9, VOCAB_SIZE])
def test_resizing_embeddings(name, size):
    stock, model = exact_pair(name)
    for m in (stock, model):
        torch.manual_seed(3)
        m.resize_token_embeddings(size)
        m.tie_weights()
    batch = tiny_batch()
    want, got = stock(**batch), model(**batch)
    assert isinstance(got.logits, LazyLogits)
    torch.testing.assert_close(got.loss, want.loss)
    for loss in (want.loss, got.loss):
        loss.backward()
    assert_same_gradients(model, stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert type(model._modules["lm_head"]) is nn.Linear
    if name == "gemma3":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(remove_sce(model).lm_head) is nn.Linear


@pytest.mark.filterwarnings("ignore:the vocabulary of this model")
@pytest.mark.parametrize("name", ["gemma3", "llama"])
@pytest.mark.parametrize("objective", ["sce", "xir", "in_batch", "kernel"])
def test_resizing_embeddings_after_training(name, objective):
    """Rows that stay keep their counts; what else a method remembers starts anew."""
    model = apply_sce(tiny_model(name), objectives.get(objective))
    for step in range(2):
        model(**tiny_batch(step)).loss.backward()
    state, batch = objective_of(model).state, tiny_batch(7)
    for key in ("input_ids", "labels"):
        batch[key].clamp_(max=119)
    labels = batch["labels"][:, 1:]
    for size in (VOCAB_SIZE + 9, 120, 400):
        before = state.counts.clone()
        model.zero_grad()
        model.resize_token_embeddings(size, mean_resizing=False)
        model(**batch).loss.backward()
        assert objective_of(model).state is state
        want = torch.zeros(size, dtype=torch.int64)
        want[: len(before)] = before[:size]
        want += torch.bincount(labels[labels >= 0], minlength=size)
        assert torch.equal(state.counts, want)
        assert state.num_labels == want.sum()


def test_resizing_is_said_once_and_covers_the_new_vocabulary():
    covering = SCEConfig(
        num_buckets=3, bucket_candidates=20, shared_frequent=10, tail_candidates=VOCAB_SIZE
    )
    stock, model = tiny_model("llama"), apply_sce(tiny_model("llama"), covering)
    model(**tiny_batch())
    for m in (stock, model):
        torch.manual_seed(3)
        m.resize_token_embeddings(VOCAB_SIZE - 40)
    batch = {name: x.clamp(max=100) for name, x in tiny_batch().items()}
    losses = []
    messages = warned(lambda: losses.extend(model(**batch).loss for _ in range(2)))
    assert len(messages) == 1
    assert f"went from {VOCAB_SIZE} to {VOCAB_SIZE - 40} classes" in messages[0]
    torch.testing.assert_close(losses[0], stock(**batch).loss, rtol=0.05, atol=0)


def test_a_state_of_another_model_is_not_resized():
    objective = objectives.get("sce")
    models = [apply_sce(tiny_model("llama", vocab_size=v), objective) for v in (163, 172)]
    models[0](**tiny_batch())
    with pytest.raises(ValueError, match=r"counts 163 classes .* call its resize\(172\)"):
        models[1](**tiny_batch())
    assert objective.state.counts.numel() == 163
    objective.state.resize(172)
    models[1](**tiny_batch())


def test_new_head_is_used_from_the_next_forward_on():
    stock, model = exact_pair("llama")
    for m in (stock, model):
        torch.manual_seed(5)
        m.set_output_embeddings(nn.Linear(32, VOCAB_SIZE, bias=True))
        m.lm_head.weight.data.mul_(9)
    batch = tiny_batch()
    got = model(**batch)
    assert not got.logits.is_materialised
    torch.testing.assert_close(got.loss, stock(**batch).loss)


def test_head_replaced_behind_the_modules_back():
    stock, model = exact_pair("llama")
    for m in (stock, model):
        torch.manual_seed(5)
        m._modules["lm_head"] = nn.Linear(32, VOCAB_SIZE)
    batch = tiny_batch()
    ids = {"input_ids": batch["input_ids"]}
    assert torch.equal(model(**ids).logits, stock(**ids).logits)
    torch.testing.assert_close(model(**batch).loss, stock(**batch).loss)


def test_deepcopy_and_pickle_are_independent():
    model = apply_sce(tiny_model("gemma3"), SCEConfig())
    model(**tiny_batch())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert objective_of(twin) is not objective_of(model)
        assert objective_of(twin).state.step == 1
        with torch.no_grad():
            twin.lm_head.weight.add_(1.0)
        assert twin.lm_head.weight is twin.model.embed_tokens.weight
        assert not torch.equal(twin.lm_head.weight, model.lm_head.weight)
        twin(**tiny_batch()).loss.backward()
        assert model.lm_head.weight.grad is None
        assert objective_of(twin).state.step == 2
        assert objective_of(model).state.step == 1
        assert type(remove_sce(twin).lm_head) is nn.Linear
        assert twin.lm_head is twin._modules["lm_head"]
    assert type(copy.deepcopy(model.lm_head)) is nn.Linear


def test_saved_folder_loads_without_this_package(tmp_path):
    model = apply_sce(tiny_model("granite"), SCEConfig()).eval()
    model.save_pretrained(tmp_path)
    torch.save(tiny_batch()["input_ids"], tmp_path / "ids.pt")
    program = (
        "import sys; sys.modules['sce_lm'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()\n"
        f"ids = torch.load({str(tmp_path / 'ids.pt')!r})\n"
        f"torch.save(m(input_ids=ids).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    want = model(input_ids=tiny_batch()["input_ids"]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want)


def test_offloaded_head_is_fetched_for_the_loss():
    stock, model = exact_pair("phi")
    head = model._modules["lm_head"]
    weights = {name: p.detach().clone() for name, p in head.named_parameters()}
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
    add_hook_to_module(head, hook)
    with torch.no_grad():
        assert head.weight.is_meta
        got = model.eval()(**tiny_batch())
        torch.testing.assert_close(got.loss, stock.eval()(**tiny_batch()).loss)


def test_two_models_in_two_threads():
    want = [float(tiny_model(n)(**tiny_batch()).loss.detach()) for n in ("llama", "gemma2")]
    models = [apply_sce(tiny_model(n), objectives.get("exact")) for n in ("llama", "gemma2")]
    got = [[], []]

    def work(i):
        for _ in range(8):
            got[i].append(float(models[i](**tiny_batch()).loss.detach()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert got[i] == pytest.approx([want[i]] * 8, rel=1e-5)


def test_one_model_and_its_copy_in_two_threads_draw_their_own_candidates():
    """Each has a state of its own; only torch's generator, which gives the seeds, is shared."""
    model = apply_sce(tiny_model("llama"), SCEConfig())
    models = [model, copy.deepcopy(model)]

    def work(i):
        for _ in range(6):
            models[i](**tiny_batch()).loss.backward()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [objective_of(m).state.step for m in models] == [6, 6]
    assert torch.equal(*(objective_of(m).state.counts for m in models))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_distributed_data_parallel(order, find_unused):
    options = {"find_unused_parameters": find_unused}
    wrap = nn.parallel.DistributedDataParallel
    exact, stock = objectives.get("exact"), wrap(tiny_model("gemma2"), **options)
    if order == "before":
        model = wrap(apply_sce(tiny_model("gemma2"), exact), **options)
    else:
        model = apply_sce(wrap(tiny_model("gemma2"), **options), exact)
    assert objective_of(model) is exact
    for _ in range(2):
        want, got = stock(**tiny_batch()), model(**tiny_batch())
        for loss in (want.loss, got.loss):
            loss.backward()
        assert not got.logits.is_materialised
    assert_same_gradients(model, stock)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("name", "wrap_head"),
    [("llama", False), ("llama", True), ("gemma3", False)],  # a tied head stays with its embedding
)
def test_fully_sharded(name, wrap_head):
    models = exact_pair(name)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for model in models:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if wrap_head:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    stock, patched = models
    for _ in range(2):
        want, got = stock(**tiny_batch()), patched(**tiny_batch())
        torch.testing.assert_close(got.loss, want.loss)
        for loss in (want.loss, got.loss):
            loss.backward()
        assert not got.logits.is_materialised
    for (parameter, p), q in zip(patched.named_parameters(), stock.parameters()):
        p, q = p.grad.full_tensor(), q.grad.full_tensor()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, msg=parameter)


def test_lazy_logits_context():
    model = apply_sce(tiny_model("gemma2"), SCEConfig()).eval()
    ids = {"input_ids": tiny_batch()["input_ids"]}
    with torch.no_grad():
        with lazy_logits(model):
            lazy = model(**ids).logits
        real = model(**ids).logits
    assert type(real) is torch.Tensor
    hidden, head = lazy[:, -1, :].parts()
    assert hidden.shape == (3, 32)
    assert head.weight is model.lm_head.weight
    rebuilt = head.post(hidden @ head.weight.T)
    torch.testing.assert_close(rebuilt, real[:, -1, :])
    with pytest.raises(ValueError, match="apply_sce"), lazy_logits(tiny_model("llama")):
        pass


# --------------------------------------------------------------------- warnings and refusals


def warned(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught]


def test_training_in_eval_mode_warns_once():
    model = apply_sce(tiny_model("llama"), SCEConfig()).eval()

    def step():
        model(**tiny_batch()).loss.backward()

    assert not warned(lambda: model(**tiny_batch()))
    assert "eval mode" in warned(step)[0]
    assert not warned(step)


def test_model_that_calls_cross_entropy_itself():
    """The objective stands in for it: two losses here, one of them over the vocabulary."""

    def build():
        torch.manual_seed(0)
        return GPT2DoubleHeadsModel(tiny_config("gpt2", num_labels=1)).train()

    stock, model = build(), apply_sce(build(), objectives.get("exact"))
    batch = tiny_batch()
    assert not warned(lambda: model(**batch))
    want, got = stock(**batch), model(**batch)
    assert not got.logits.is_materialised
    torch.testing.assert_close(got.loss, want.loss)
    got.loss.backward()
    want.loss.backward()
    assert_same_gradients(model, stock)


def test_cross_entropy_of_the_outputs_is_the_users_own():
    """After the forward a cross-entropy is what it says, in training too."""
    stock, model = tiny_model("llama"), apply_sce(tiny_model("llama"), SCEConfig())
    batch = tiny_batch()
    want, got = stock(**batch).logits, model(**batch).logits
    labels = batch["labels"].view(-1)
    assert isinstance(got, LazyLogits)
    losses = [nn.functional.cross_entropy(x.view(-1, VOCAB_SIZE), labels) for x in (want, got)]
    assert torch.equal(losses[0], losses[1])
    assert got.is_materialised


def test_loss_without_the_objective_warns_once_and_is_stock():
    """ProphetNet takes log_softmax of the logits of several n-grams."""

    def build():
        return conformance.tiny_model("prophetnet")

    stock, model = build(), apply_sce(build(), SCEConfig())
    batch = conformance.tiny_batch(stock)
    got = []
    messages = warned(lambda: got.append(model(**batch)))
    assert len(messages) == 1
    assert "full logits" in messages[0]
    assert torch.equal(got[0].loss, stock(**batch).loss)
    got[0].loss.backward()
    stock(**batch).loss.backward()
    assert_same_gradients(model, stock)
    assert not warned(lambda: model(**batch))


def test_loaded_weights_with_a_new_state_warn_once():
    model = apply_sce(tiny_model("llama"), SCEConfig())
    model.load_state_dict(tiny_model("llama", seed=1).state_dict())
    messages = warned(lambda: model(**tiny_batch()))
    assert len(messages) == 1
    assert "starts anew" in messages[0]
    exact = apply_sce(tiny_model("llama"), objectives.get("exact"))
    exact.load_state_dict(tiny_model("llama", seed=1).state_dict())
    assert not warned(lambda: exact(**tiny_batch()))


class ScaledHead(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2.0


class WithoutLabels(LlamaForCausalLM):
    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids)


class OwnLinear(nn.Module):
    """Linear's contract in a class of its own."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return x @ self.weight.T


def test_refusals():
    config = SCEConfig()
    with pytest.raises(TypeError, match="no transformers model"):
        apply_sce(nn.Linear(2, 3), config)
    with pytest.raises(ValueError, match="no output head"):
        apply_sce(AutoModel.from_config(tiny_config("llama")), config)
    with pytest.raises(TypeError, match="SCEConfig"):
        apply_sce(tiny_model("llama"), {"num_buckets": 3})
    with pytest.raises(ValueError, match="takes no labels"):
        apply_sce(WithoutLabels(tiny_config("llama")), config)
    model = tiny_model("llama")
    model.set_output_embeddings(ScaledHead(32, VOCAB_SIZE, bias=False))
    names = set(model.__dict__)
    with pytest.raises(ValueError, match="ScaledHead"):
        apply_sce(model, config)
    assert set(model.__dict__) == names
    model.loss_function = lambda **kwargs: 0
    model.set_output_embeddings(nn.Linear(32, VOCAB_SIZE))
    with pytest.raises(ValueError, match="<lambda>"):
        apply_sce(model, config)


def test_head_of_another_class_that_is_linear():
    stock, model = tiny_model("llama"), tiny_model("llama")
    model.set_output_embeddings(OwnLinear(model.lm_head))
    apply_sce(model, objectives.get("exact"))
    got = model(**tiny_batch())
    assert not got.logits.is_materialised
    torch.testing.assert_close(got.loss, stock(**tiny_batch()).loss)


def test_head_that_is_not_linear_put_in_later_is_refused_only_for_the_loss():
    model = apply_sce(tiny_model("llama"), objectives.get("exact"))
    model.set_output_embeddings(ScaledHead(32, VOCAB_SIZE, bias=False))
    assert type(model(input_ids=tiny_batch()["input_ids"]).logits) is torch.Tensor
    with pytest.raises(ValueError, match="ScaledHead"):
        model(**tiny_batch())


def test_data_parallel_replica_is_refused():
    model = apply_sce(tiny_model("llama"), objectives.get("exact"))
    model._is_replica = True
    with pytest.raises(RuntimeError, match="torchrun"):
        model(**tiny_batch())


@pytest.mark.parametrize(
    "name",
    ["gemma2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "granite", "mixtral"))],
)
def test_compiled_model_equals_stock(name):
    """The graph breaks at the head, what is traced after it stays lazy, and the loss is ours."""
    torch._dynamo.reset()
    stock, patched = exact_pair(name)
    batch = tiny_batch()
    batch["labels"][:, 3] = -100
    compiled = torch.compile(patched, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without the objective.*")
        loss = compiled(**batch).loss
    expected = stock(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    assert_same_gradients(patched, stock)
    patched.eval()
    stock.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).loss, stock(**batch).loss)
    assert last_statistics(patched).correct is not None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "head"), [("t5", "seq2seq"), ("cpmant", "causal")])
def test_compiled_model_that_calls_cross_entropy_itself(name, head):
    torch._dynamo.reset()
    stock = conformance.tiny_model(name, head)
    patched = apply_sce(copy.deepcopy(stock), objectives.get("exact"))
    batch = conformance.tiny_batch(stock)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without the objective.*")
        loss = torch.compile(patched, backend="aot_eager")(**batch).loss
    expected = stock(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for (parameter, p), q in zip(patched.named_parameters(), stock.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=parameter)
