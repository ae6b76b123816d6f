"""Rows of new items, and how their recommendations fare."""

import pytest

pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)

import copy
import json

import numpy as np
import polars as pl
import torch
from support.data import shared_data
from transformers import PhiConfig, PhiForCausalLM

from sce_lm import SCEConfig, apply_sce, commands, recsys
from sce_lm.recsys import SASRecConfig, SASRecForCausalLM, append_items, build_item_tokenizer
from sce_lm.recsys.new_items import ridge_regression

ITEMS = [f"i{n}" for n in range(60)]


@pytest.fixture
def loaded():
    torch.manual_seed(0)
    tokenizer = build_item_tokenizer(ITEMS)
    model = SASRecForCausalLM(SASRecConfig(vocab_size=len(tokenizer), hidden_size=8)).eval()
    return model, tokenizer


def untied():
    """A model with a head and a bias of its own."""
    torch.manual_seed(0)
    tokenizer = build_item_tokenizer(ITEMS)
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    model = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    return model, tokenizer


def test_a_new_items_rows_are_the_mean_of_its_neighbours():
    model, tokenizer = untied()
    neighbours = {"new": ["i3", "i5", "unheard of"], 77.0: ["i9"], "i1": ["i2"]}
    extended = append_items(tokenizer, ["new", 77, "i1"], model, neighbours=neighbours)
    assert extended.convert_tokens_to_ids(["new", "77", "i1"]) == [62, 63, 3]
    tables = (model.model.embed_tokens.weight, model.lm_head.weight, model.lm_head.bias)
    assert all(len(table) == 64 for table in tables)
    for table in tables:
        torch.testing.assert_close(table[62], (table[5] + table[7]) / 2)
        torch.testing.assert_close(table[63], table[11])
        assert not torch.equal(table[3], table[4])  # a known item keeps its row


def test_features_give_the_rows_that_they_are_a_map_of(loaded):
    model, tokenizer = loaded
    generator = np.random.default_rng(0)
    numbers = generator.standard_normal((70, 5))
    rows = numbers @ generator.standard_normal((5, 8)) * [1, 2, 3, 1, 1, 1, 1, 1] + 0.5
    # The last trained item's row is no function of its features, and it was never trained.
    rows[59] = 99.0
    names = [*ITEMS, *(f"n{i}" for i in range(10))]
    recsys.count_items(tokenizer, pl.DataFrame({"items": [list(range(2, 61))]}))
    with torch.no_grad():
        model.lm_head.weight[2:] = torch.from_numpy(rows[:60]).float()
    before = model.lm_head.weight[:62].clone()
    table = pl.DataFrame({"item": names, **{f"f{i}": numbers[:, i] for i in range(5)}})
    extended = append_items(tokenizer, names[60:], model, features=table.sample(70, shuffle=True))
    assert recsys.item_counts(extended)[60:].tolist() == [0] * 10
    assert torch.equal(model.lm_head.weight[:62], before)
    made = model.lm_head.weight[62:].detach().numpy()
    assert made == pytest.approx(rows[60:], abs=0.02)


def test_the_ridge_is_the_one_that_predicts_what_is_left_out():
    generator = np.random.default_rng(1)
    x = generator.standard_normal((60, 40))
    truth = np.zeros((40, 3))
    truth[:2] = 1.0
    y = x @ truth + 2.0 * generator.standard_normal((60, 3))
    asked = generator.standard_normal((500, 40))
    wanted = asked @ truth

    def error(found):
        return float(((found - wanted) ** 2).mean())

    least_squares = np.linalg.lstsq(np.column_stack((x, np.ones(60))), y, rcond=None)[0]
    plain = np.column_stack((asked, np.ones(500))) @ least_squares
    found = ridge_regression(x, y, asked)
    assert error(found) < 0.6 * error(plain)
    assert error(found) < error(np.zeros_like(wanted))
    # Of one column it gives the same, and columns that say nothing change nothing.
    assert ridge_regression(x, y[:, 0], asked).shape == (500,)
    wide = ridge_regression(np.pad(x, ((0, 0), (0, 2))), y, np.pad(asked, ((0, 0), (0, 2))))
    assert wide == pytest.approx(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"neighbours": {"new": ["i3"]}, "features": {}}, "Both neighbours and features"),
        ({"neighbours": {"new": ["who"]}}, "1 new items, such as 'new', have no neighbour"),
        ({"neighbours": {"new": "i3"}}, "are the text 'i3'; give a list"),
        ({"features": {"item": ["i1", "i2"], "f": [1, 2]}}, "such as 'new', have no features"),
        ({"features": {"item": ["new", "i2"], "f": [1, 2]}}, "hold 1 trained items"),
        ({"features": {"item": ["new"], "f": ["red"]}}, r"\['f'\] are no numbers"),
        ({"features": {"item": ["new"], "f": [None]}}, "no numbers"),
        ({"features": {"item": ["new"], "f": [float("nan")]}}, "missing or not finite"),
        ({"features": {"name": ["new"], "f": [1.0]}}, "give a column 'item'"),
    ],
)
def test_what_gives_no_rows_is_refused_before_the_model_changes(loaded, given, message):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=message):
        append_items(tokenizer, ["new"], model, **given)
    assert len(model.lm_head.weight) == len(tokenizer)


def test_items_without_training_can_be_left_out(loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="does not carry the counts of a training"):
        recsys.recommend(model, tokenizer, [["i3"]], trained_only=True)
    recsys.count_items(tokenizer, pl.DataFrame({"items": [list(range(2, 62))]}))
    extended = append_items(tokenizer, ["new"], model)
    with torch.no_grad():
        model.lm_head.weight[62] = 99 * model.model(torch.tensor([[5]])).last_hidden_state[0, 0]
    every = recsys.recommend(model, extended, [["i3"], []], 5)
    trained = recsys.recommend(model, extended, [["i3"], []], 5, trained_only=True)
    assert every.items[0][0] == "new"
    assert trained.items[0][:4] == every.items[0][1:]
    assert "new" not in trained.items[1]
    with pytest.raises(ValueError, match="there are 0 items to choose from"):
        recsys.recommend(model, extended, [], candidates=["new"], trained_only=True)


def test_the_command_writes_a_model_that_knows_the_items(loaded, tmp_path, capsys):
    for part in loaded:
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "new.txt").write_text("a\n\nb\ni3\n")
    pairs = {"item": ["a", "a", "b"], "neighbour": ["i1", "i2", "i3"]}
    pl.DataFrame(pairs).write_csv(tmp_path / "pairs.csv")
    numbers = {"item": [*ITEMS, "a", "b"], "f": range(62), "g": [n % 3 for n in range(62)]}
    pl.DataFrame(numbers).write_parquet(tmp_path / "table.parquet")
    sources = {"items": "new.txt", "neighbours": "pairs.csv", "features": "table.parquet"}
    for name, file in sources.items():
        capsys.readouterr()
        arguments = [str(tmp_path / "model"), f"--{name}", str(tmp_path / file)]
        commands.main(["append_items", *arguments, "--output", str(tmp_path / name)])
        printed = json.loads(capsys.readouterr().out)
        assert (printed["new_items"], printed["items"]) == (2, 62)
        model = SASRecForCausalLM.from_pretrained(tmp_path / name)
        old, new = loaded[0].lm_head.weight, model.lm_head.weight
        assert torch.equal(new[:62], old)
        assert torch.allclose(new[62], (old[3] + old[4]) / 2) == (name == "neighbours")
    with pytest.raises(SystemExit, match="exists already"):
        commands.main(["append_items", *arguments, "--output", str(tmp_path / "items")])
    pl.DataFrame({"id": ["a"]}).write_csv(tmp_path / "bad.csv")
    arguments[-1] = str(tmp_path / "bad.csv")
    with pytest.raises(SystemExit, match="and not 'item'"):
        commands.main(["append_items", *arguments, "--output", str(tmp_path / "c")])


@pytest.mark.slow
@pytest.mark.data
def test_new_items_are_found_by_their_neighbours_and_features():
    """A tenth of the films of MovieLens-1M is new: the model never saw them. Each has what five of
    its viewers saw right before as neighbours; its features are which of 40 groups of viewers have
    seen it. Other viewers, whose next film is a new one, are asked."""
    log = pl.read_parquet(shared_data("movielens-1m.parquet"))
    events = recsys.filter_interactions(
        recsys.read_interactions(log, user="user_id", item="item_id", time="timestamp"),
        min_item_events=20,
    )
    every = recsys.catalogue(events)
    generator = np.random.default_rng(0)
    new = set(generator.choice(every, len(every) // 10, replace=False).tolist())
    tokenizer = build_item_tokenizer([item for item in every if item not in new])
    with pytest.warns(UserWarning, match="does not know"):
        train = recsys.user_sequences(events, tokenizer)
    recsys.count_items(tokenizer, train)
    torch.manual_seed(0)
    model = apply_sce(
        SASRecForCausalLM(
            SASRecConfig(vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=50)
        ),
        SCEConfig(),
    )
    _train(model, train, steps=400)

    raw = log.select(pl.col("user_id", "item_id").cast(pl.String)).with_columns(
        group=pl.col("user_id").rank("dense").mod(40)
    )
    histories = raw.group_by("user_id", maintain_order=True).agg("item_id").rows()
    neighbours, questions = {item: [] for item in new}, []
    for user, (_, items) in enumerate(histories):
        for place in range(5, len(items)):
            item, before = items[place], items[:place]
            if item not in new:
                continue
            if user % 2 and len(neighbours[item]) < 5:
                neighbours[item].append(next(i for i in reversed(before) if i not in new))
            elif not user % 2 and generator.random() < 0.1:
                questions.append(([i for i in before if i not in new], item))
    fair = {item: known for item, known in neighbours.items() if known}
    viewers = raw.filter(pl.col("user_id").rank("dense").mod(2) == 1)
    table = viewers.pivot(
        "group", index="item_id", values="user_id", aggregate_function="len"
    ).fill_null(0)
    features = table.rename({"item_id": "item"}).with_columns(pl.exclude("item").log1p())
    fair = {item: known for item, known in fair.items() if item in set(features["item"])}
    questions = [(history, item) for history, item in questions if item in fair and history][:2000]
    found = {}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, given in {
        "drawn": {},
        "neighbours": {"neighbours": fair},
        "features": {"features": features},
    }.items():
        fresh = SASRecForCausalLM(copy.deepcopy(model.config))
        fresh.load_state_dict(state)
        extended = append_items(tokenizer, list(fair), fresh.eval(), **given)
        lists = recsys.recommend(fresh, extended, [history for history, _ in questions], 50)
        found[name] = np.mean(
            [item in listed for (_, item), listed in zip(questions, lists.items, strict=True)]
        )
    print({name: round(float(share), 4) for name, share in found.items()}, len(questions))
    assert found["neighbours"] > 2 * found["drawn"]
    assert found["features"] > 2 * found["drawn"]


def _train(model, sequences, steps):
    from sce_lm.recsys.histories import TrainingHistories, training_rows

    rows = TrainingHistories(training_rows(sequences, 50))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = np.random.default_rng(0)
    model.train()
    for _ in range(steps):
        batch = rows.padded(generator.integers(len(rows), size=64))
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
