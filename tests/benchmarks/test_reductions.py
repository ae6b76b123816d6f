"""benchmark reductions: every method answers the same, and the rows say what it cost."""

import argparse

import pytest

from sce_lm.benchmarks import reductions
from sce_lm.hf import asked_logits

pytest.importorskip("trl")


@pytest.mark.filterwarnings("ignore:.*trl.experimental")
def test_methods_give_the_same_values_and_a_row_each(monkeypatch):
    monkeypatch.setattr(
        reductions, "measured_apart", lambda row, function, **told: function(**told)
    )
    monkeypatch.setattr(asked_logits, "FORMED_ELEMENTS", 0)
    parser = argparse.ArgumentParser()
    reductions.add_arguments(parser)
    sizes = ["--tokens", "34", "--vocab", "300", "--dim", "8", "--turns", "2"]
    told = parser.parse_args([*sizes, "--methods", "stock", "lazy", "trl", "sampled", "liger"])
    told.device = "cpu"
    (comparison,) = reductions.measure(told)
    rows = {row["label"]: row for row in comparison.rows}
    stock, lazy = rows["stock"], rows["lazy logits (ours)"]
    assert comparison.sizes["positions"] == 32
    for task in reductions.TASKS:
        assert lazy[task]["value"] == pytest.approx(stock[task]["value"], rel=1e-4), task
        assert stock[task]["speedup"] == 1.0
        assert set(lazy[task]) >= {"seconds", "peak_mib", "speedup"}
    for task in ("log_probs", "forward", "entropy"):
        assert rows["TRL, chunked"][task]["value"] == pytest.approx(stock[task]["value"], rel=1e-4)
    assert "best" not in rows["TRL, chunked"]
    sampled = rows["SCE (default), sampled"]
    assert sampled["distillation"]["value"] == pytest.approx(
        stock["distillation"]["value"], rel=1e-3
    )  # its lists hold all 300 classes
    assert rows["Liger"]["notes"][0].startswith("skipped; ")
    for table in reductions.TABLES:
        assert "| stock |" in table.markdown(comparison.rows)


def test_sizes_that_mean_nothing_are_refused():
    told = argparse.Namespace(tokens=2, vocab=300, dim=8, turns=1)
    with pytest.raises(ValueError, match="at least 4 tokens"):
        reductions.measure(told)
