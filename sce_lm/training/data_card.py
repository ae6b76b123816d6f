"""A run's data on a page: where they come from, how they were read and cut, how many there are."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sce_lm.training.fingerprint import Fingerprint
from sce_lm.training.train_config import DataFields, ItemsFields, TrainConfig


def data_card(
    config: TrainConfig, described: Mapping[str, Any], source: Mapping[str, Fingerprint]
) -> str:
    """Markdown, as people read it beside a model.

    Args:
        config: what was asked for; fields of the data that are not the defaults are listed.
        described: of `Task.describe`.
        source: of `Task.source`.
    """
    sections = (DataFields, ItemsFields) if config.task == "items" else (DataFields,)
    choices = {
        field.name: getattr(config, field.name)
        for section in sections
        for field in dataclasses.fields(section)
        if getattr(config, field.name) != config.defaults()[field.name]
    }
    choices = {"data": config.data} | choices
    sources = {
        name: ", ".join(f"{count:,} {what}" for what, count in found.counts.items())
        + f"; digest of their content {found.digest}"
        for name, found in source.items()
    }
    return "\n".join(
        (
            f"# Data of {config.output_dir}",
            "",
            "Written when the run began, by `sce-lm train`. What only people know (licence, "
            "consent, how it was collected) belongs below.",
            *_table("As it was read", sources),
            *_table("Choices", choices),
            *_table("What the run uses", described),
            "",
        )
    )


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    """A heading and a table of two columns."""
    cells = (
        (name, str(value).replace("|", "\\|").replace("\n", " ")) for name, value in rows.items()
    )
    return ["", f"## {title}", "", "| | |", "|---|---|", *(f"| {n} | {v} |" for n, v in cells), ""]
