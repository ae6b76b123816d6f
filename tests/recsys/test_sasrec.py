import subprocess
import sys

import pytest
import torch
from support.launch import ONE_THREAD
from torch.nn.functional import gelu, layer_norm, linear, relu, softmax
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

from sce_lm import SCEConfig, apply_sce, objectives
from sce_lm.hf.adapter import objective_of, remove_sce
from sce_lm.recsys import SASRecConfig, SASRecForCausalLM

VOCABULARY = 60
NORMS = ("query", "pre", "post")


def build(norm: str = "query", **changes) -> SASRecForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_attention_heads": 2}
    options = {"max_position_embeddings": 24, "norm": norm, "intermediate_size": 20}
    model = SASRecForCausalLM(SASRecConfig(**{**sizes, **options, **changes})).eval()
    with torch.no_grad():  # so that nothing is near zero or symmetric
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def histories(rows: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(
        2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(rows)
    )


def reference(model: SASRecForCausalLM, items: torch.Tensor) -> torch.Tensor:
    """Logits [length, V] of one history, item by item and head by head."""
    config, weights = model.config, model.state_dict()

    def apply(name, x):
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return layer_norm(x, (16,), weight, bias, config.layer_norm_eps)

    def attention(name, queries, states):
        q, k, v = (
            apply(f"{name}.{part}", x)
            for part, x in (("q_proj", queries), ("k_proj", states), ("v_proj", states))
        )
        rows = []
        for t in range(len(states)):
            heads = []
            for head in (slice(0, 8), slice(8, 16)):
                attended = softmax(k[: t + 1, head] @ q[t, head] / 8**0.5, dim=0)
                heads.append(attended @ v[: t + 1, head])
            rows.append(torch.cat(heads))
        return apply(f"{name}.o_proj", torch.stack(rows))

    activation = {"relu": relu, "gelu": gelu}[config.hidden_act]
    table = weights["model.item_embeddings.weight"]
    x = table[items] * (4.0 if config.scale_embeddings else 1.0)
    x = x + weights["model.position_embeddings.weight"][: len(items)]
    if config.norm == "post":
        x = norm("model.norm", x)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"

        def feed_forward(x, layer=layer):
            return apply(f"{layer}.down", activation(apply(f"{layer}.up", x)))

        if config.norm == "query":
            q = norm(f"{layer}.attention_norm", x)
            x = norm(f"{layer}.feed_forward_norm", q + attention(f"{layer}.attention", q, x))
            x = x + feed_forward(x)
        elif config.norm == "pre":
            q = norm(f"{layer}.attention_norm", x)
            x = x + attention(f"{layer}.attention", q, q)
            x = x + feed_forward(norm(f"{layer}.feed_forward_norm", x))
        else:
            x = norm(f"{layer}.attention_norm", x + attention(f"{layer}.attention", x, x))
            x = norm(f"{layer}.feed_forward_norm", x + feed_forward(x))
    if config.norm != "post":
        x = norm("model.norm", x)
    return x @ table.T


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("norm", NORMS)
def test_logits_are_those_of_the_straight_line_reference(norm, implementation):
    changes = {"hidden_act": "gelu", "scale_embeddings": False} if norm == "post" else {}
    model = build(norm, **changes)
    model.set_attn_implementation(implementation)
    items = histories()
    with torch.no_grad():
        logits = model(input_ids=items).logits
        expected = torch.stack([reference(model, row) for row in items])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(side, implementation):
    model = build()
    model.set_attn_implementation(implementation)
    items = histories()
    padded = torch.zeros(3, 17, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    real = slice(6, None) if side == "left" else slice(None, 11)
    padded[:, real], mask[:, real] = items, 1
    logits = model(input_ids=padded, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, real], model(input_ids=items).logits)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_packed_histories_do_not_see_each_other(norm, with_mask):
    model = build(norm)
    items = histories()
    packed = items.reshape(1, -1)
    positions = torch.arange(11).repeat(3)[None]
    mask = torch.ones_like(packed) if with_mask else None
    logits = model(input_ids=packed, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits.view(3, 11, -1), model(input_ids=items).logits)


def test_the_loss_of_a_packed_row_is_that_of_its_histories():
    model = build()
    rows = [row[: 11 - 3 * i].tolist() for i, row in enumerate(histories())]
    packed = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": row} for row in rows])
    loss = model(**packed).loss
    sums = [model(input_ids=torch.tensor([r]), labels=torch.tensor([r])).loss for r in rows]
    expected = sum(s * (len(r) - 1) for s, r in zip(sums, rows)) / sum(len(r) - 1 for r in rows)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_learns_and_the_table_is_tied(norm):
    model = build(norm).train()
    items = histories()
    model(input_ids=items, labels=items).loss.backward()
    assert model.lm_head.weight is model.model.item_embeddings.weight
    names = dict(model.named_parameters())
    assert "lm_head.weight" not in names
    key_bias = {n for n in names if n.endswith("k_proj.bias")}  # a softmax does not see it
    assert all(p.grad is not None and p.grad.any() for n, p in names.items() if n not in key_bias)


def test_checkpointed_gradients_are_the_plain_ones():
    gradients = []
    for checkpointing in (False, True):
        model = build(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=histories(), labels=histories()).loss.backward()
        gradients.append(model.model.layers[0].attention.q_proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_apply_sce_trains_it_and_leaves_it_as_it_was():
    model = build(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0).train()
    items = histories()
    stock = model(input_ids=items, labels=items).loss
    apply_sce(model, objectives.get("exact"))
    torch.testing.assert_close(model(input_ids=items, labels=items).loss, stock)
    apply_sce(model, SCEConfig(tail_candidates=20))
    model(input_ids=items, labels=items).loss.backward()
    assert objective_of(model).state.step == 1
    torch.testing.assert_close(remove_sce(model)(input_ids=items, labels=items).loss, stock)


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_saves_and_loads_through_the_auto_classes(norm, tmp_path):
    model = build(norm)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is SASRecForCausalLM
    assert torch.equal(loaded(input_ids=histories()).logits, model(input_ids=histories()).logits)
    assert AutoConfig.from_pretrained(tmp_path).norm == norm


@torch.no_grad()
def test_a_saved_model_loads_where_the_package_is_missing(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "model")
    program = f"""
import sys
sys.modules["sce_lm"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
torch.save(model.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits, {str(tmp_path / "logits")!r})
"""
    environment = {**ONE_THREAD, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, env=environment
    )
    logits = torch.load(tmp_path / "logits")
    torch.testing.assert_close(logits, model(input_ids=torch.tensor([[5, 6, 7]])).logits)


def test_a_saved_model_loads_by_the_installed_code_without_trust(tmp_path):
    build().save_pretrained(tmp_path)
    (tmp_path / "sasrec.py").write_text("raise SystemExit('the copy was run')")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is SASRecForCausalLM


@torch.no_grad()
def test_only_the_wanted_positions_give_logits():
    model = build()
    logits = model(input_ids=histories()).logits
    assert torch.equal(model(input_ids=histories(), logits_to_keep=2).logits, logits[:, -2:])
    outputs = model(input_ids=histories(), output_hidden_states=True)
    assert len(outputs.hidden_states) == 3


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_attention_heads 3; choose a number of heads"):
        SASRecConfig(hidden_size=16, num_attention_heads=3)
    with pytest.raises(Exception, match="expected one of"):
        SASRecConfig(norm="none")
    model = build()
    with pytest.raises(ValueError, match="30 items long and this SASRec has 24 positions"):
        model(input_ids=histories(length=30))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
