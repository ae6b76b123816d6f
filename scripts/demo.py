"""The main job on embedded data: a language model and a recommender, three objectives each.

Called by scripts/demo.sh, which makes the environment.
"""

from pathlib import Path

from sce_lm.training.command_line import as_arguments, parse_config
from sce_lm.training.comparison import Comparison, Method, compare

FOLDER = Path("runs/demo")
METHODS = {
    "exact": Method("exact"),
    "published SCE": Method("sce", {"published": True}),
    "corrected SCE": Method("sce"),
}
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


def run(config: str, changes: dict, name: str) -> Comparison:
    arguments = [f"examples/configs/{config}.yaml", *as_arguments(changes)]
    return compare(parse_config(arguments), METHODS, FOLDER / name)


def heading(what: str, result: Comparison) -> str:
    sizes = result.measured
    steps = next(iter(result.summaries.values()))[0]["steps"]
    return (
        f"{what}: {steps} steps; the loss on {sizes['positions']} positions, "
        f"vocabulary {sizes['vocab_size']}, width {sizes['width']}, {sizes['dtype']}"
    )


def main() -> None:
    language_model = run("lm_embedded", LANGUAGE_MODEL, "lm")
    recommender = run("items_embedded", RECOMMENDER, "items")
    print()
    language_model.print(
        heading("Language model", language_model),
        {"nll": "exact test NLL", "accuracy": "accuracy"},
    )
    recommender.print(heading("Recommender", recommender), {"ndcg@10": "NDCG@10", "hr@10": "HR@10"})
    print(f"Curves: {language_model.curves}, {recommender.curves}")
    print(f"Figures as JSON: {FOLDER}/lm/comparison.json, {FOLDER}/items/comparison.json")


if __name__ == "__main__":
    main()
