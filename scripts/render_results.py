"""Write the tables and plots of the results into README and manual, from docs/results/*.json.

    python scripts/render_results.py            write them
    python scripts/render_results.py --check    say which page is not what it would write

A page has them between `<!-- results: NAME -->`, NAME that of a JSON file or "summary", and
`<!-- end of results -->`. A file is written by `scripts/benchmark.py ... --json`.
"""

import argparse
import importlib
import importlib.util
import re
import sys
from pathlib import Path

from sce_lm.benchmarks.report import Column, Row, draw
from sce_lm.benchmarks.results import Comparison, Results, changed_options

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "papers.md")
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
STALE = "†"

SUMMARY = (
    (
        "the loss alone, 2,048 positions over 151,936 classes",
        "{a} times as fast as plain cross-entropy with the default lists, {b} times with a sample "
        "of 2,048 alone; our exact loss {c} times",
        ("loss-random", 0, "SCE (default)", "trainable.speedup", ".0f"),
        ("loss-random", 0, "SCE (tail only)", "trainable.speedup", ".0f"),
        ("loss-random", 0, "exact (ours)", "trainable.speedup", ".2f"),
    ),
    (
        "a whole training step of Gemma 3 270M, 2,044 positions",
        "{a} times as fast as stock",
        ("step-gemma-3-270m", 0, "SCE (default)", "speedup", ".2f"),
    ),
    (
        "a catalogue of ten million items",
        "a step takes {a} times what it takes for 50,000",
        ("scale", 0, 2, "time_ratio", ".1f"),
    ),
    (
        "a language model from scratch, 600 steps, equal learning rate, one seed",
        "test NLL {a}, exact {b}",
        ("lm-from-scratch-default", 0, "SCE (default)", "test.nll", ".4f"),
        ("lm-from-scratch-default", 0, "exact (ours)", "test.nll", ".4f"),
    ),
    (
        "fine-tuning SmolLM2-135M, 60 steps of 511 positions, lists set by hand",
        "test NLL {a}, exact {b}",
        ("fine-tuning-smollm2", 0, "as configured", "test.nll", ".4f"),
        ("fine-tuning-smollm2", 0, "exact (ours)", "test.nll", ".4f"),
    ),
    (
        "fine-tuning Gemma 3 270M, the same",
        "test NLL {a}, exact {b}",
        ("fine-tuning-gemma", 0, "as configured", "test.nll", ".4f"),
        ("fine-tuning-gemma", 0, "exact (ours)", "test.nll", ".4f"),
    ),
    (
        "the same with plain `SCEConfig()`, the first two seeds",
        "test NLL {a} and {b}, exact {c} with the first",
        ("fine-tuning-default", 0, "SCE (default)", "test.nll", ".4f"),
        ("fine-tuning-default-seed-1", 0, "SCE (default)", "test.nll", ".4f"),
        ("fine-tuning-gemma", 1, "exact (ours)", "test.nll", ".4f"),
    ),
    (
        "MovieLens-1M, whole catalogue",
        "NDCG@10 {a}, exact {b} (published for exact: .1821)",
        ("items-movielens-1m", 0, "as configured", "test.ndcg@10", ".4f"),
        ("items-movielens-1m", 0, "exact (ours)", "test.ndcg@10", ".4f"),
    ),
    (
        "Amazon Beauty, SCE as published",
        "NDCG@10 {a}, exact {b} (published for SCE: .0544)",
        ("items-beauty-published", 0, "SCE (published), mix=False", "test.ndcg@10", ".4f"),
        ("items-beauty-exact", 0, "exact (ours)", "test.ndcg@10", ".4f"),
    ),
)
"""What was done, what came out, and where each number is: file, comparison, label or number of the
row, key and form."""


def load(folder: Path) -> dict[str, Results]:
    """The files by their names."""
    return {path.stem: Results.load(path) for path in sorted(folder.glob("*.json"))}


def changes(comparison: Comparison) -> dict[str, str]:
    """By the label of each stale row, what of its options is something else today."""
    found = {row["label"]: changed_options(row, comparison.sizes) for row in comparison.rows}
    return {label: ", ".join(changed) for label, changed in found.items() if changed}


def row_of(results: Results, index: int, which: str | int) -> tuple[Row, str]:
    """A row by label or number, and the mark of a stale one."""
    comparison = results.comparisons[index]
    if isinstance(which, int):
        row = comparison.rows[which]
    else:
        row = next(row for row in comparison.rows if row["label"] == which)
    return row, STALE * (row["label"] in changes(comparison))


def summary(results: dict[str, Results]) -> str:
    """README's table."""
    lines = ["| what | measured |", "|---|---|"]
    stale = ""
    for what, text, *places in SUMMARY:
        cells = {}
        for letter, (file, index, which, key, form) in zip("abc", places):
            row, mark = row_of(results[file], index, which)
            cells[letter] = Column("", key, form).cell(row) + mark
            stale = stale or mark
        lines.append(f"| {what} | {text.format(**cells)} |")
    note = f"\n{STALE} measured with other defaults than today's, which the page of results names."
    return "\n".join([*lines, *([note] if stale else [])])


def section(results: Results, name: str) -> str:
    """Command, origin, tables, legend and notes of a file, and its plot."""
    module = importlib.import_module(f"sce_lm.benchmarks.{results.subcommand}")
    lines = [f"`{results.command}`", ""]
    lines += [f"{results.heading}; commit {results.commit}, {results.date}."]
    for comparison in results.comparisons:
        stale = changes(comparison)
        rows = [
            row | {"label": f"{row['label']} {STALE}"} if row["label"] in stale else row
            for row in comparison.rows
        ]
        lines += ["", f"**{comparison.title}**", ""]
        lines += ["\n\n".join(filter(None, (table.markdown(rows) for table in module.TABLES)))]
        notes = [f"{row['label']}: {note}" for row in rows for note in row.get("notes", ())]
        notes += [f"{STALE} stale: {label}: {changed}" for label, changed in stale.items()]
        lines += ["", *(f"- {note}" for note in notes)]
    if (FOLDER / f"{name}.png").exists():
        lines += ["", f"![{name}](results/{name}.png)"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def rendered(page: str, results: dict[str, Results]) -> str:
    """The page with every block as the files have it.

    Raises:
        ValueError: a block names no file.
    """

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name != "summary" and name not in results:
            raise ValueError(f"there is no docs/results/{name}.json; a page shows it.")
        text = summary(results) if name == "summary" else section(results[name], name)
        return f"{match[1]}\n{text}\n\n{match[3]}"

    return BLOCK.sub(block, page)


def plot(results: dict[str, Results]) -> None:
    """A PNG beside each file that has something to plot."""
    for name, found in results.items():
        module = importlib.import_module(f"sce_lm.benchmarks.{found.subcommand}")
        comparisons = [
            (comparison.title.split(":")[0], comparison.rows) for comparison in found.comparisons
        ]
        draw(FOLDER / f"{name}.png", module.PLOTS, comparisons)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    results, differ = load(FOLDER), []
    if not arguments.check:
        if importlib.util.find_spec("matplotlib") is None:
            sys.exit("render_results.py: plots need matplotlib, which is not installed.")
        plot(results)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = rendered(text, results)
        if new != text:
            differ.append(str(page.relative_to(ROOT)))
            if not arguments.check:
                page.write_text(new, encoding="utf-8")
    if arguments.check and differ:
        sys.exit(f"{', '.join(differ)}: not as rendered; run scripts/render_results.py.")


if __name__ == "__main__":
    main()
