"""The main job on embedded data: a language model and a recommender, three objectives each.

Called by scripts/demo.sh, which makes the environment.
"""

from pathlib import Path

from sce_lm.benchmarks import report, results
from sce_lm.benchmarks.comparison import TABLES, compare
from sce_lm.benchmarks.methods import methods
from sce_lm.training.command_line import as_arguments, parse_config

FOLDER = Path("runs/demo")
METHODS = ("exact", "sce-published", "sce")
LANGUAGE_MODEL = {
    "per_device_batch_size": 4,
    "max_steps": 100,
    "warmup_steps": 20,
    "learning_rate": 2e-3,
    "eval_every": 25,
    "eval_batches": 4,
    "checkpoint_every": 0,
    "log_every": 5,
}
RECOMMENDER = {
    "max_steps": 200,
    "warmup_steps": 20,
    "eval_every": 50,
    "eval_users": 2000,
    "checkpoint_every": 0,
    "log_every": 5,
}


def run(config: str, changes: dict, what: str, folder: Path) -> results.Comparison:
    arguments = [f"examples/configs/{config}.yaml", *as_arguments(changes)]
    chosen = [methods()[name] for name in METHODS]
    comparison = compare(parse_config(arguments), chosen, folder)
    comparison.title = f"{what}: {comparison.title}"
    return comparison


def main() -> None:
    comparisons = [
        run("lm_embedded", LANGUAGE_MODEL, "Language model", FOLDER / "lm"),
        run("items_embedded", RECOMMENDER, "Recommender", FOLDER / "items"),
    ]
    for comparison in comparisons:
        report.print_line(f"\n{comparison.title}")
        for table in TABLES:
            table.print(comparison.rows)
    found = results.Results("train", comparisons, **results.provenance("cpu"))
    found.save(FOLDER / "results.json")
    print("\nCurves:", ", ".join(comparison.sizes["curves"] for comparison in comparisons))
    print(f"Results: {FOLDER}/results.json")


if __name__ == "__main__":
    main()
