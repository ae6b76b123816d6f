import pytest

pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)

import json
import math

import numpy as np
import polars as pl
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data import shared_data

from sce_lm import objectives
from sce_lm.hf.adapter import apply_sce, objective_of
from sce_lm.ops.head import Head
from sce_lm.recsys import (
    SASRecConfig,
    SASRecForCausalLM,
    build_item_tokenizer,
    catalogue,
    evaluate_items,
    item_tokens,
    leave_one_out,
    popularity_scorer,
    rank_items,
    read_interactions,
    scoring,
    user_sequences,
)
from sce_lm.recsys.evaluation import ItemRanking
from sce_lm.recsys.scoring import head_scores, model_scorer, top_items
from sce_lm.training.measure import start_peak

VOCABULARY = 50
ITEMS = range(2, VOCABULARY)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 32}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(vocab_size=VOCABULARY, **LLAMA),
    "qwen3": lambda: tf.Qwen3Config(vocab_size=VOCABULARY, head_dim=8, **LLAMA),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32
    ),
    "gemma2 (soft cap, window)": lambda: tf.Gemma2Config(
        vocab_size=VOCABULARY, head_dim=8, sliding_window=4, final_logit_softcapping=0.5, **LLAMA
    ),
    "phi (bias)": lambda: tf.PhiConfig(
        vocab_size=VOCABULARY, **{**LLAMA, "num_key_value_heads": None}
    ),
    "cohere (scale)": lambda: tf.CohereConfig(vocab_size=VOCABULARY, logit_scale=0.25, **LLAMA),
    "opt (positions from the mask)": lambda: tf.OPTConfig(
        vocab_size=VOCABULARY,
        ffn_dim=32,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
        **SIZES,
    ),
    "bloom (ALiBi)": lambda: tf.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2
    ),
    "mamba (recurrence)": lambda: tf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4
    ),
}


def build(name: str) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, None, None
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # fresh models are near zero, where mistakes would hide
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_users(
    seed: int, users: int = 23, longest: int = 12
) -> tuple[list[list[int]], list[int]]:
    random = np.random.default_rng(seed)
    histories = [
        random.integers(2, VOCABULARY, size=random.integers(1, longest + 1)).tolist()
        for _ in range(users)
    ]
    return histories, random.integers(2, VOCABULARY, size=users).tolist()


def dense_ranks(scores: torch.Tensor, histories, targets, items: range, mask_seen: bool):
    """Ranks of the definition, from all scores [users, V]."""
    ranks = []
    for row, history, target in zip(scores.tolist(), histories, targets, strict=True):
        gone = set(history) - {target} if mask_seen else set()
        better = sum(
            row[item] > row[target] or (row[item] == row[target] and item < target)
            for item in items
            if item not in gone
        )
        ranks.append(1 + better)
    return ranks


@torch.no_grad()
def one_by_one(model: tf.PreTrainedModel, histories) -> torch.Tensor:
    return torch.stack([model(input_ids=torch.tensor([h])).logits[0, -1] for h in histories])


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_batches_score_as_the_unpadded_model(name):
    model = build(name)
    histories, targets = random_users(seed=1)
    with model_scorer(model) as score:
        score_tile = score(histories)
    streamed = torch.cat([score_tile(0, 7), score_tile(7, VOCABULARY)], dim=1)
    expected = one_by_one(model, histories)
    torch.testing.assert_close(streamed, expected, rtol=1e-4, atol=1e-5)
    ranking = rank_items(
        model, histories, targets, items=ITEMS, depth=len(ITEMS), batch_size=5, tile_size=11
    )
    assert ranking.ranks.tolist() == dense_ranks(expected, histories, targets, ITEMS, True)


@pytest.mark.parametrize("mask_seen", [True, False])
def test_metrics_are_those_of_a_dense_evaluation(mask_seen):
    model = build("llama")
    histories, targets = random_users(seed=2, users=40)
    targets[0] = histories[0][0]  # a repeat purchase stays rankable
    report = evaluate_items(
        model,
        histories,
        targets,
        items=ITEMS,
        k=(3, 10),
        mask_seen=mask_seen,
        batch_size=7,
        tile_size=13,
        split="test",
    )
    scores = one_by_one(model, histories)
    ranks = dense_ranks(scores, histories, targets, ITEMS, mask_seen)
    for k in (3, 10):
        hits = [rank for rank in ranks if rank <= k]
        assert report[f"hr@{k}"] == pytest.approx(len(hits) / 40)
        assert report[f"ndcg@{k}"] == pytest.approx(sum(1 / math.log2(r + 1) for r in hits) / 40)
        assert report[f"mrr@{k}"] == pytest.approx(sum(1 / r for r in hits) / 40)
        shown = set()
        for row, history, target in zip(scores, histories, targets, strict=True):
            row = row.clone()
            row[:2] = -torch.inf
            if mask_seen:
                row[[item for item in history if item != target]] = -torch.inf
            shown |= set(row.topk(k).indices.tolist())
        assert report[f"coverage@{k}"] == pytest.approx(len(shown) / len(ITEMS))
    assert report["users"] == 40
    assert report["protocol"]["split"] == "test"
    assert report["intervals"].keys() == {
        f"{m}@{k}" for m in ("ndcg", "hr", "mrr", "precision", "recall", "map") for k in (3, 10)
    }
    assert report["protocol"]["max_length"] == 32
    assert report == json.loads(json.dumps(report))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_streamed_ranks_and_lists_equal_dense_ones_with_ties_and_masks(data):
    vocabulary = data.draw(st.integers(3, 60), label="vocabulary")
    first = data.draw(st.integers(0, 2), label="first item")
    items = range(first, vocabulary)
    users = data.draw(st.integers(1, 6), label="users")
    depth = data.draw(st.integers(1, len(items)), label="depth")
    levels = data.draw(st.integers(1, 5), label="distinct scores")
    mask_seen = data.draw(st.booleans(), label="mask seen")
    token = st.integers(0, vocabulary - 1)
    histories = [data.draw(st.lists(token, min_size=1, max_size=90)) for _ in range(users)]
    targets = [data.draw(st.integers(first, vocabulary - 1)) for _ in range(users)]
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    table = torch.from_numpy(random.integers(0, levels, size=(users, vocabulary))).float()
    row_of = {tuple(history): row for row, history in enumerate(histories)}

    def scorer(batch):
        rows = table[[row_of[tuple(history.tolist())] for history in batch]]
        return lambda start, stop: rows[:, start:stop].clone()

    ranking = rank_items(
        scorer,
        histories,
        targets,
        items=items,
        depth=depth,
        mask_seen=mask_seen,
        batch_size=data.draw(st.integers(1, 7), label="batch size"),
        tile_size=data.draw(st.integers(1, 70), label="tile size"),
    )
    scores = torch.stack([table[row_of[tuple(history)]] for history in histories])
    dense = dense_ranks(scores, histories, targets, items, mask_seen)
    assert ranking.ranks.tolist() == [min(rank, depth + 1) for rank in dense]

    best = dict.fromkeys(items, depth + 1)
    for row, history, target in zip(scores.tolist(), histories, targets, strict=True):
        gone = set(history) - {target} if mask_seen else set()
        ordered = sorted((i for i in items if i not in gone), key=lambda i: (-row[i], i))
        for position, item in enumerate(ordered[:depth], start=1):
            best[item] = min(best[item], position)
    assert ranking.best_positions.tolist() == list(best.values())


def test_a_model_that_scores_all_items_alike_is_not_rewarded():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # scores of equal rows could differ by rounding
    histories, _ = random_users(seed=3)
    report = evaluate_items(
        model, histories, [VOCABULARY - 1] * 23, items=ITEMS, mask_seen=False, tile_size=9
    )
    assert report["hr@10"] == 0
    assert report["coverage@10"] == pytest.approx(10 / len(ITEMS))


def test_lists_are_shorter_where_items_run_out():
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    masked = (torch.tensor([0, 0, 1]), torch.tensor([1, 3, 0]))
    values, tokens = top_items(
        lambda start, stop: scores[:, start:stop].clone(),
        range(4),
        5,
        masked=masked,
        tile_size=3,
    )
    assert tokens.tolist() == [[2, 0, -1, -1, -1], [3, 2, 1, -1, -1]]
    assert values[0].tolist() == [1.0, 0.0, -math.inf, -math.inf, -math.inf]


def test_lists_hold_only_what_is_allowed():
    scores = torch.tensor([[5.0, 3.0, 1.0, 1.0, 0.0, 4.0], [0.0, 1.0, 2.0, 2.0, 9.0, 9.0]])
    allowed = torch.tensor([True, True, False, True, False, False])
    formed = []

    def score_tile(start, stop):
        formed.append(start)
        return scores[:, start:stop].clone()

    _, tokens = top_items(score_tile, range(1, 6), 3, allowed=allowed, tile_size=3)
    assert tokens.tolist() == [[1, 3, -1], [3, 1, -1]]
    assert formed == [1]  # nothing of the second tile is allowed
    with pytest.raises(ValueError, match="nothing to choose from"):
        top_items(score_tile, range(1, 6), 3, allowed=~allowed & False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_score_in_fp32(dtype):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 70), torch.randn(40, 70), torch.randn(40)
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        scores = head_scores(hidden, Head(weight, bias=bias))(3, 31)
    assert scores.dtype == torch.float32
    exact = hidden.double() @ weight[3:31].double().T + bias[3:31].double()
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_model_reads_the_latest_items_but_all_seen_ones_are_masked():
    model = build("gpt2")
    histories, targets = random_users(seed=4)
    ranking = rank_items(
        model, histories, targets, items=ITEMS, depth=len(ITEMS), max_length=3, batch_size=4
    )
    recent = one_by_one(model, [history[-3:] for history in histories])
    assert ranking.ranks.tolist() == dense_ranks(recent, histories, targets, ITEMS, True)


def test_a_model_reads_as_many_items_as_it_has_positions():
    model = build("gpt2")
    histories, targets = random_users(seed=8, longest=50)
    assert max(map(len, histories)) > 32
    reports = [
        evaluate_items(model, histories, targets, items=ITEMS, max_length=length)
        for length in (None, 32)
    ]
    assert reports[0] == reports[1]


def test_histories_may_be_columns_of_a_frame():
    model = build("llama")
    histories, targets = random_users(seed=9)
    frame = pl.DataFrame({"history": histories, "target": targets})
    found = evaluate_items(model, frame["history"], frame["target"], items=ITEMS)
    assert found == evaluate_items(model, histories, targets, items=ITEMS)


def test_the_model_keeps_its_mode_and_is_evaluated_without_dropout():
    model = build("gpt2").train()
    histories, targets = random_users(seed=5)
    reports = [evaluate_items(model, histories, targets, items=ITEMS) for _ in range(2)]
    assert model.training
    assert reports[0] == reports[1] == evaluate_items(model.eval(), histories, targets, items=ITEMS)


@pytest.mark.parametrize("trained_with", [None, "exact", "sce"])
def test_no_logits_are_formed_and_the_model_stays_as_it_was(trained_with, monkeypatch):
    model = build("llama")
    if trained_with:
        apply_sce(model, objectives.get(trained_with))
    histories, targets = random_users(seed=7)
    before = evaluate_items(model, histories, targets, items=ITEMS)
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: pytest.fail("logits were formed"))
    assert evaluate_items(model, histories, targets, items=ITEMS) == before
    objective = objective_of(model)
    assert (objective and objective.name) == trained_with


def test_the_head_is_shadowed_once_for_all_batches(monkeypatch):
    applied = []
    monkeypatch.setattr(
        scoring, "apply_sce", lambda *arguments: applied.append(apply_sce(*arguments))
    )
    model = build("llama").train()
    histories, targets = random_users(seed=7)
    rank_items(model, histories, targets, items=ITEMS, depth=5, batch_size=4)
    assert applied == [model]
    assert objective_of(model) is None
    with pytest.raises(ValueError, match="up to 59"):  # an error ends it, too
        rank_items(model, histories, targets, items=range(2, 60), depth=5)
    assert objective_of(model) is None
    assert model.training


def test_rankings_of_parts_of_the_users_merge():
    model = build("llama")
    histories, targets = random_users(seed=6)
    targets[3] = 1
    whole = rank_items(model, histories, targets, items=ITEMS, depth=5)
    parts = [
        rank_items(model, histories[part], targets[part], items=ITEMS, depth=5)
        for part in (slice(0, 9), slice(9, None))
    ]
    merged = ItemRanking.merged(parts)
    assert torch.equal(merged.ranks, whole.ranks)
    assert torch.equal(merged.best_positions, whole.best_positions)
    assert torch.equal(merged.times_listed, whole.times_listed)
    assert whole.times_listed.sum() == 5 * len(targets)
    assert merged.unrankable_targets == whole.unrankable_targets == 1


def test_targets_outside_the_catalogue_are_counted_misses():
    scorer = popularity_scorer([[2, 3, 3]], range(2, 5))
    report = evaluate_items(scorer, [[2], [2]], [1, 3], items=range(2, 5), k=(1,))
    assert report["unrankable_targets"] == 1
    assert report["hr@1"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"histories": [[3]]}, "1 histories and 2 targets"),
        ({"histories": [], "targets": []}, "0 histories and 0 targets"),
        ({"histories": [[3], []]}, "history of user 1 is empty"),
        ({"k": (10, 100)}, r"k is \(10, 100\), but a list from this catalogue has 1 to 48 items"),
        ({"items": range(2, 60)}, "up to 59, but scores end at token 49"),
    ],
)
def test_bad_input_is_one_sentence(change, message):
    arguments = {"histories": [[3], [4, 5]], "targets": [6, 7], "items": ITEMS} | change
    with pytest.raises(ValueError, match=message):
        evaluate_items(build("llama"), **arguments)


def test_a_diverged_model_is_reported():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[17] = torch.nan
    with pytest.raises(ValueError, match="the model has diverged"):
        evaluate_items(model, [[3]], [4], items=ITEMS)


@pytest.mark.data
def test_figures_of_a_thousand_users_are_those_of_all_scores_at_once():
    log = read_interactions(shared_data("amazon-beauty-5core.parquet"))
    tokenizer = build_item_tokenizer(catalogue(log))
    questions = leave_one_out(user_sequences(log, tokenizer)).test.head(1000)
    torch.manual_seed(0)
    model = SASRecForCausalLM(SASRecConfig(vocab_size=len(tokenizer), initializer_range=0.5))
    items = item_tokens(tokenizer)
    report = evaluate_items(
        model, questions["history"], questions["target"], items=items, k=(10,), tile_size=1000
    )

    histories, targets = questions["history"].to_list(), torch.tensor(questions["target"].to_list())
    scores = one_by_one(model.eval(), [history[-200:] for history in histories])  # [users, V]
    mine = scores.gather(1, targets[:, None])
    scores[:, : items.start] = -torch.inf
    for row, history in zip(scores, histories, strict=True):
        row[history] = -torch.inf
    rank = 1 + (scores > mine).sum(1).double()
    hit = rank <= 10
    assert report["hr@10"] == pytest.approx(hit.double().mean().item(), abs=1e-6)
    assert report["ndcg@10"] == pytest.approx((hit / (rank + 1).log2()).mean().item(), abs=1e-6)
    assert report["mrr@10"] == pytest.approx((hit / rank).mean().item(), abs=1e-6)
    shown = scores.topk(10).indices.unique()
    assert report["coverage@10"] == pytest.approx(len(shown) / len(items), abs=1e-3)


def test_peak_memory_does_not_grow_with_the_users():
    """All scores of 10,000 users over 20,000 items would be 800 MB; ten times the users take no
    more than what is kept of them."""
    items = range(2, 20_002)
    generator = np.random.default_rng(0)
    scorer = popularity_scorer([generator.integers(2, 20_002, 1000)], items)
    tokens = generator.integers(2, 20_002, (10_000, 5))
    peaks = []
    for users in (1000, 10_000):
        histories = list(tokens[:users])
        read_peak = start_peak("cpu")
        rank_items(scorer, histories, tokens[:users, 0], items=items, depth=10)
        peaks.append(read_peak())
    assert peaks[1] < peaks[0] + 40 * 2**20
