"""Fills pages from the code while the manual is built."""

import dataclasses

from sce_lm.training.train_config import TrainConfig


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace TRAINING_FIELDS by a table of the training script's fields."""
    if "TRAINING_FIELDS" not in markdown:
        return markdown
    return markdown.replace("TRAINING_FIELDS", training_fields())


def training_fields() -> str:
    """A Markdown table: field, default, what it is."""
    lines = ["| field | default | what it is |", "|---|---|---|"]
    defaults = TrainConfig.defaults()
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata["help"].replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{defaults[field.name]!r}` | {text} |")
    return "\n".join(lines)
