"""The final evaluation of a run, made again from its folder, beside methods without training."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table

from sce_lm import objectives
from sce_lm.files import write_json
from sce_lm.hf.adapter import apply_sce
from sce_lm.training.config import TrainConfig
from sce_lm.training.models import load_model
from sce_lm.training.plots import draw_popularity
from sce_lm.training.resuming import stored_fields
from sce_lm.training.sources import build_task

MODEL = "model"
"""The trained model's name among the rows of an evaluation."""


def evaluate_run(folder: Path, accelerator: Accelerator) -> dict[str, dict[str, Any]]:
    """Exact likelihood on all held-out text, or full-catalogue metrics on the test items.

    Args:
        folder: a finished run; ``evaluation.json`` and, of a recommender, ``popularity.png`` are
            written into it.
        accelerator: evaluation is shared by its processes, in its precision.

    Returns:
        Figures by name: those of the ``"model"`` and, of a recommender, of popularity and the
        first-order Markov chain, each with its protocol.

    Raises ValueError if the folder holds no finished run; see `build_task` for its data.
    """
    for needed in ("config.json", "model"):
        if not (folder / needed).exists():
            raise ValueError(
                f"{folder} has no {needed}; expected the folder of a finished run of "
                "scripts/train.py; check the path, or let the run come to its end."
            )
    config = TrainConfig(**stored_fields(folder))
    set_seed(config.seed)
    with accelerator.main_process_first():
        task = build_task(config)
    model = load_model(folder / "model", dtype=config.dtype)
    apply_sce(model, objectives.get("exact"))
    model = accelerator.prepare_model(model, evaluation_mode=True)
    trained = task.evaluate(accelerator.unwrap_model(model).eval(), accelerator, final=True)
    rows = {MODEL: trained, **task.baselines()}
    if accelerator.is_main_process:
        write_json(folder / "evaluation.json", rows)
        profile = "list_entries_by_popularity"
        if profile in trained:
            try:
                draw_popularity(
                    {n: row[profile] for n, row in rows.items()}, folder / "popularity.png"
                )
            except ImportError:
                print("matplotlib is not installed, so no plot is drawn.")
    return rows


def print_evaluation(rows: dict[str, dict[str, Any]]) -> None:
    """Print a table, a line a method with 95 % intervals where there are some, and the protocol."""
    trained = rows[MODEL]
    names = [name for name, value in trained.items() if isinstance(value, float)]
    table = Table("method", title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for label, row in rows.items():
        table.add_row(label, *(_cell(row, name) for name in names))
    console = Console(width=24 + 26 * len(names))
    console.print(table)
    for name, value in trained.get("protocol", {}).items():
        console.print(f"{name}: {value}")
    for name in ("users", "items", "unrankable_targets"):
        if name in trained:
            console.print(f"{name}: {trained[name]}")


def _cell(row: dict[str, Any], name: str) -> str:
    cell = f"{row[name]:.4f}"
    if name in row.get("intervals", {}):
        low, high = row["intervals"][name]
        cell += f" [{low:.4f}, {high:.4f}]"
    return cell
