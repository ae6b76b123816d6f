"""Results as files, and the pages that show them."""

import copy
import importlib.util
import re
import sys

import pytest
from support.documents import ROOT

from sce_lm.benchmarks.report import METHOD, Column, Plot, Table, draw
from sce_lm.benchmarks.results import Comparison, Results, changed_options, provenance

_spec = importlib.util.spec_from_file_location("render", ROOT / "scripts/render_results.py")
render = importlib.util.module_from_spec(_spec)
sys.modules["render"] = render
_spec.loader.exec_module(render)

FILES = render.load(render.FOLDER)
STEP = Table("A step", (METHOD, Column("s", "took.seconds", ".1f"), Column("x", "x", ".2f", "how")))


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_pages_are_what_the_files_say(page):
    text = page.read_text()
    assert render.rendered(text, FILES) == text, "run scripts/render_results.py"


def test_every_file_is_complete_and_on_a_page():
    shown = {match[2] for page in render.PAGES for match in render.BLOCK.finditer(page.read_text())}
    assert shown == {*FILES, "summary"}
    for name, found in FILES.items():
        assert found.command, name
        assert found.commit, name
        assert found.date, name
        assert found.machine["cpu"], name
        assert found.versions["torch"], name
        for comparison in found.comparisons:
            for row in comparison.rows:
                # What has no options, such as a baseline that needs no training, has no name.
                assert "resolved" in row or "name" not in row, (name, row["label"])
        if found.machine["shared"]:
            assert 'seconds"' not in (render.FOLDER / f"{name}.json").read_text(), name


def results():
    rows = [
        {
            "name": "sce",
            "label": "SCE (default)",
            "specification": {"name": "sce"},
            "resolved": {},
            "trainable": {"speedup": 2.0},
            "quality": {"coverage": 1.0},
        },
        {"name": "stock", "label": "stock", "trainable": {"speedup": 1.0}},
    ]
    comparison = Comparison("drawn", {"positions": 64, "vocab_size": 5000, "width": 32}, rows)
    found = Results("loss", [comparison], **provenance("cpu"))
    from sce_lm.benchmarks.methods import methods

    rows[0]["resolved"] = methods()["sce"].resolved(64, 5000, 32)
    return found


def test_a_row_whose_options_are_not_todays_is_marked():
    now = results()
    assert render.STALE not in render.section(now, "none")
    then = copy.deepcopy(now)
    then.comparisons[0].rows[0]["resolved"]["shared_frequent"] = 7
    shown = render.section(then, "none")
    assert "| SCE (default) † |" in shown
    assert "† stale: SCE (default): shared_frequent was 7, is 2048" in shown
    then.comparisons[0].rows[0]["specification"]["tail_strata"] = 4  # an option that is gone
    (changed,) = changed_options(then.comparisons[0].rows[0], then.comparisons[0].sizes)
    assert "no option 'tail_strata'" in changed


def test_a_page_shows_what_was_measured_and_says_what_it_means():
    shown = render.section(results(), "none")
    assert "| SCE (default) | 2.00 |" in shown
    assert "*x stock*: times as fast as plain cross-entropy" in shown
    assert "peak MiB" not in shown  # in no row
    assert "| SCE (default) | 1.000 |" in shown
    assert "| stock |  |" not in shown  # stock has no quality
    with pytest.raises(ValueError, match=r"no docs/results/gone\.json"):
        render.rendered("<!-- results: gone -->\n<!-- end of results -->", {})
    block = "a\n<!-- results: x -->\nold\n<!-- end of results -->\nb"
    assert "old" not in render.rendered(block, {"x": results()})


def test_summary_takes_its_numbers_from_the_files():
    files = copy.deepcopy(FILES)
    row, _ = render.row_of(files["step-gemma-3-270m"], 0, "SCE (default)")
    row["speedup"] = 98.76
    assert re.search("98.76†? times as fast as stock", render.summary(files))
    assert "98.76" not in render.summary(FILES)


def test_results_come_back_from_their_file(tmp_path):
    found = results()
    found.comparisons[0].rows[0]["trainable"]["seconds"] = float("inf")
    found.save(tmp_path / "found.json")
    again = Results.load(tmp_path / "found.json")
    assert again.comparisons[0].rows[0]["trainable"]["seconds"] is None
    assert again.comparisons[0].sizes == found.comparisons[0].sizes
    assert (again.command, again.machine) == (found.command, found.machine)
    found.drop_seconds()
    assert found.comparisons[0].rows[0]["trainable"] == {"speedup": 2.0}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (float("nan"), ""),
        (1.5, "1.50"),
        ([1.0, 2.0], "1.50 ± 0.71"),
        ([1.5], "1.50"),
        ([1.0, None, 2.0], "1.50 (2 of 3)"),
        ([None, None], "never"),
        ([], ""),
        ({"mean": 1.5, "sd": 0.25}, "1.50 ± 0.25"),
    ],
)
def test_a_cell_is_one_value_or_those_of_the_seeds(value, shown):
    assert Column("", "a.b", ".2f").cell({"a": {"b": value}}) == shown
    assert Column("", "a.b.c", ".2f").cell({"a": {}}) == ""


def test_blank_columns_and_rows_are_left_out(capsys):
    rows = [{"label": "one", "x": 1.0}, {"label": "two"}]
    STEP.print(rows)
    assert capsys.readouterr().out.split() == ["A", "step", "method", "x", "-" * 12, "one", "1.00",
                                               "x:", "how"]  # fmt: skip
    assert STEP.markdown([{"label": "two"}]) == ""


def test_points_that_a_logarithm_cannot_show_are_left_out(tmp_path):
    plot = Plot("title", STEP.columns[2], STEP.columns[1])
    rows = [{"label": str(x), "x": x, "took": {"seconds": 1.0}} for x in (0.0, 1.0, 2.0)]
    assert plot.lines(rows) == {"1.0": [(1.0, 1.0)], "2.0": [(2.0, 1.0)]}
    draw(tmp_path / "plot.png", [plot], [("few", rows[:2])])
    assert not (tmp_path / "plot.png").exists()
    draw(tmp_path / "plot.png", [plot], [("enough", rows)])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
