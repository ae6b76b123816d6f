import pytest

pytest.importorskip("sce_lm.recsys.sasrec", exc_type=ImportError)

import numpy as np
import polars as pl
import torch
from support.models import tiny_model
from transformers import AutoModelForCausalLM, MambaConfig

from sce_lm.recsys import SASRecConfig
from sce_lm.recsys.histories import TrainingHistories, can_pack, training_rows


def random_histories(lengths, vocab_size=50):
    generator = np.random.default_rng(0)
    rows = [generator.integers(2, vocab_size, length).tolist() for length in lengths]
    return rows, TrainingHistories(pl.Series(rows))


LENGTHS = [3, 17, 2, 2, 9, 5, 16, 4, 2]


def test_packed_rows_hold_each_history_once():
    rows, histories = random_histories(LENGTHS)
    chosen = [8, 1, 0, 4, 6, 7]
    batch = histories.packed(chosen)
    assert batch["input_ids"].shape == (4, 17)  # 17 | 16 | 9, 4, 3 | 2
    found = []
    for tokens, positions, labels in zip(
        *(batch[n] for n in ("input_ids", "position_ids", "labels"))
    ):
        starts = (positions == 0).nonzero().squeeze(1).tolist()
        for start, stop in zip(starts, [*starts[1:], len(tokens)]):
            assert positions[start:stop].tolist() == list(range(stop - start))
            if tokens[start] == 0:  # padding counts as a history of its own, without labels
                assert not tokens[start:stop].any()
                assert (labels[start:stop] == -100).all()
                continue
            found.append(tokens[start:stop].tolist())
            assert labels[start] == -100
            assert labels[start + 1 : stop].equal(tokens[start + 1 : stop])
    assert sorted(found) == sorted(rows[row] for row in chosen)


def test_padded_rows():
    rows, histories = random_histories(LENGTHS)
    batch = histories.padded([2, 5])
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1] * 5]
    assert batch["input_ids"].tolist() == [[*rows[2], 0, 0, 0], rows[5]]
    assert batch["labels"].tolist() == [[*rows[2], -100, -100, -100], rows[5]]


@pytest.mark.parametrize("norm", ["query", "pre", "post"])
def test_packing_changes_neither_loss_nor_gradients(norm):
    dropouts = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    config = SASRecConfig(vocab_size=50, hidden_size=16, norm=norm, **dropouts)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    histories = random_histories(LENGTHS)[1]
    losses, gradients = [], []
    for batch in (histories.padded(range(9)), histories.packed(range(9))):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for padded, packed in zip(*gradients):
        torch.testing.assert_close(padded, packed, rtol=1e-5, atol=1e-6)


def test_recurrent_models_cannot_pack():
    assert can_pack(tiny_model("llama"))
    assert can_pack(tiny_model("gpt2"))
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert not can_pack(AutoModelForCausalLM.from_config(config))


def test_a_model_that_ignores_where_histories_begin_cannot_pack(monkeypatch):
    """Position ids are taken, and the mask is causal only."""
    model = AutoModelForCausalLM.from_config(SASRecConfig(vocab_size=50, hidden_size=16))
    assert can_pack(model)
    monkeypatch.setattr("sce_lm.recsys.sasrec.create_causal_mask", lambda *_, **__: causal())
    assert not can_pack(model)


def causal():
    return torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()


def test_rows_are_the_latest_items_of_users_with_two():
    sequences = pl.DataFrame({"user": ["a", "b"], "items": [[2, 3, 4, 5], [6]]})
    assert training_rows(sequences, 3).to_list() == [[3, 4, 5]]
    with pytest.raises(ValueError, match="max_length is 1"):
        training_rows(sequences, 1)
    with pytest.raises(ValueError, match="None of the 1 training sequences has 2 items"):
        training_rows(sequences.tail(1), 3)
