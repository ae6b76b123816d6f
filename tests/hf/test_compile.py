"""A patched model inside torch.compile: no graph break at the loss, equal to stock, lazy logits."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from programs import conformance
from support.models import NAMES, VOCAB_SIZE, tiny_batch, tiny_model
from support.versions import one_graph
from torch import nn
from transformers import Trainer, TrainingArguments

from sce_lm import SCEConfig, apply_sce, objectives
from sce_lm.hf import last_statistics, loss_seconds, objective_of
from sce_lm.hf.lazy_logits import LazyLogits
from sce_lm.hf.traced_logits import TracedLogits
from sce_lm.objectives.compile_operator import ONE_GRAPH


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without the objective.*")
        yield


def exact_pair(name, **changes):
    """Stock, and the same model with the objective "exact"."""
    patched = apply_sce(tiny_model(name, **changes), objectives.get("exact"))
    return tiny_model(name, **changes), patched


def in_one_graph(model, backend="aot_eager", **options):
    """Compiled so that a graph break is an error, where one graph is promised."""
    return torch.compile(model, backend=backend, fullgraph=ONE_GRAPH, **options)


def assert_same_gradients(patched, stock):
    for (name, p), q in zip(patched.named_parameters(), stock.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            tolerance = 1e-5 * float(q.grad.abs().max())
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=tolerance, msg=name)


def assert_equals_stock(compiled, patched, stock, batch):
    got, want = compiled(**batch), stock(**batch)
    assert isinstance(got.logits, TracedLogits if ONE_GRAPH else LazyLogits)
    assert not got.logits.is_materialised
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    got.loss.backward()
    want.loss.backward()
    assert_same_gradients(patched, stock)
    assert got.logits.shape == want.logits.shape
    assert not got.logits.is_materialised
    torch.testing.assert_close(got.logits.detach(), want.logits.detach(), rtol=1e-4, atol=1e-4)


SLOW = pytest.mark.slow
IN_ONE_GRAPH = [name for name in NAMES if name != "mixtral"]
"""Mixtral takes a lock in its own forward, which breaks the stock model's graph as well."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW) for n in IN_ONE_GRAPH])
def test_equals_stock_in_one_graph(name):
    stock, patched = exact_pair(name)
    compiled = in_one_graph(patched)
    for batch in (tiny_batch(), {**tiny_batch(1), "num_items_in_batch": torch.tensor(31)}):
        assert_equals_stock(compiled, patched, stock, batch)  # gradients accumulate
    patched.eval()
    stock.eval()
    with torch.no_grad():
        got, want = compiled(**tiny_batch()), stock(**tiny_batch())
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    assert last_statistics(patched).correct is not None
    assert loss_seconds(patched) > 0


@one_graph
@pytest.mark.parametrize("name", ["llama", pytest.param("granite", marks=SLOW)])
def test_no_graph_break_and_one_operator(name):
    found = torch._dynamo.explain(apply_sce(tiny_model(name), SCEConfig()))(**tiny_batch())
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    nodes = [n for n in found.graphs[0].graph.nodes if "sce_lm" in str(n.target)]
    assert len(nodes) == 1
    products = [n for n in found.graphs[0].graph.nodes if "linear" in str(n.target)]
    shapes = [n.meta["example_value"].shape[-1] for n in products]
    assert VOCAB_SIZE not in shapes


@one_graph
@SLOW
def test_new_lengths_are_compiled_once_and_ignored_rows_are_left_out():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    stock, patched = exact_pair("llama")
    compiled = in_one_graph(patched, counter)
    for length in (17, 12, 25, 31):
        batch = tiny_batch(length, length=length)
        batch["labels"][:, 7] = -100
        assert_equals_stock(compiled, patched, stock, batch)
    assert counter.frame_count == 2  # one length, then any


@SLOW
def test_whole_training_step_draws_what_eager_code_draws():
    def step(model, optimizer, batch):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    losses = []
    for compiled in (False, True):
        model = apply_sce(tiny_model("llama"), SCEConfig(tail_candidates=20))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        torch.manual_seed(0)
        run = in_one_graph(model) if compiled else model
        losses.append([step(run, optimizer, tiny_batch(i)) for i in range(4)])
        assert objective_of(model).state.step == 4
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_gradient_goes_through_logits_that_are_read():
    stock, patched = exact_pair("gemma2")
    for model in (stock, in_one_graph(patched)):
        output = model(**tiny_batch())
        (output.loss + output.logits.square().mean()).backward()
    assert_same_gradients(patched, stock)


@one_graph
def test_logits_are_never_silently_wrong():
    _, patched = exact_pair("llama")
    output = in_one_graph(patched)(**tiny_batch())
    with torch._C.DisableTorchFunctionSubclass():  # as code that bypasses __torch_function__
        assert output.logits.isnan().all()
        assert output.logits.shape == (3, 17, VOCAB_SIZE)
        assert output.logits.untyped_storage().nbytes() <= 64
    output.loss.backward()
    with torch.no_grad():
        patched.lm_head.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="had changed"):
        output.logits.sum()


@SLOW
def test_loss_computed_from_logits_in_the_graph():
    class WithMore(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **batch):
            output = self.model(**batch)
            return output.loss + output.logits.logsumexp(-1).mean(), output.logits.argmax(-1)

    stock, patched = exact_pair("cohere")
    got = in_one_graph(WithMore(patched))(**tiny_batch())
    want = WithMore(stock)(**tiny_batch())
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], want[1])
    got[0].backward()
    want[0].backward()
    assert_same_gradients(patched, stock)


@SLOW
def test_generation_and_forward_without_labels():
    stock, patched = exact_pair("llama")
    ids = tiny_batch()["input_ids"]
    logits = in_one_graph(patched.eval())(input_ids=ids).logits
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(logits, stock.eval()(input_ids=ids).logits)


@SLOW
def test_head_with_hooks_breaks_the_graph_and_stays_right():
    stock, patched = exact_pair("llama")
    seen = []
    patched.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    if ONE_GRAPH:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            in_one_graph(patched)(**tiny_batch())
        torch._dynamo.reset()
    loss = torch.compile(patched, backend="aot_eager")(**tiny_batch()).loss
    torch.testing.assert_close(loss, stock(**tiny_batch()).loss)
    assert seen == [()]  # the loss was computed inside the head's own call


@SLOW
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_lora(options):
    losses = []
    for patch in (False, True):
        torch.manual_seed(0)
        model = tiny_model("llama")
        if patch:
            apply_sce(model, objectives.get("exact"))
        config = LoraConfig(
            target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options
        )
        model = get_peft_model(model, config)
        # A wrapped head needs its own call, outside the graph.
        run = (
            torch.compile(model, backend="aot_eager", fullgraph=ONE_GRAPH and not options)
            if patch
            else model
        )
        loss = run(**tiny_batch()).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        losses.append([loss.detach(), *gradients])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=one_graph)])
def test_export_refuses_labels_only(strict):
    _, patched = exact_pair("llama")
    batch = tiny_batch()
    with pytest.raises(Exception, match="without labels"):
        torch.export.export(patched.eval(), (), batch, strict=strict)


@SLOW
def test_export_without_labels():
    stock, patched = exact_pair("llama")
    ids = {"input_ids": tiny_batch()["input_ids"], "use_cache": False}
    program = torch.export.export(patched.eval(), (), ids)
    torch.testing.assert_close(program.module()(**ids).logits, stock.eval()(**ids).logits)


@SLOW
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])
def test_inductor_equals_stock(name):
    stock, patched = exact_pair(name)
    compiled = in_one_graph(patched, "inductor")
    for length in (17, 12):
        assert_equals_stock(compiled, patched, stock, tiny_batch(length, length=length))


@SLOW
def test_autocast():
    stock, patched = exact_pair("llama")
    compiled = in_one_graph(patched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = compiled(**tiny_batch()), stock(**tiny_batch())
        assert got.logits.dtype == want.logits.dtype == torch.bfloat16
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got.logits, want.logits, rtol=0.05, atol=0.05)


@SLOW
@pytest.mark.parametrize(("name", "head"), [("t5", "seq2seq"), ("gpt_neo", "causal")])
def test_model_that_calls_cross_entropy_itself(name, head):
    stock = conformance.tiny_model(name, head)
    patched = apply_sce(copy.deepcopy(stock), objectives.get("exact"))
    batch = conformance.tiny_batch(stock)
    loss, expected = torch.compile(patched, backend="aot_eager")(**batch).loss, stock(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@SLOW
def test_trainer_with_torch_compile(tmp_path):
    found = []
    for compiled in (False, True):
        model = apply_sce(tiny_model("llama"), SCEConfig(tail_candidates=20))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(compiled)),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
        )
        batches = [tiny_batch(i) for i in range(16)]
        data = [{k: v[0] for k, v in batch.items()} for batch in batches]
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        found.append((trainer.state.log_history[-1]["train_loss"], trainer.evaluate()["eval_loss"]))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
