"""Write a configuration to start from, with every field explained.

    sce-lm init lm [FILE]
    sce-lm init items [FILE]

As it is, it trains a small model from scratch on the documentation or the API calls of the
installed packages; set `data` to your own. A field behind a # has its default.
"""

import argparse
import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sce_lm.commands import COMMANDS


def main(prog: str, arguments: Sequence[str]) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(prog, description=COMMANDS["init"])
    parser.add_argument("task", choices=("lm", "items"), help="a language model or a recommender")
    parser.add_argument("file", type=Path, nargs="?", help="default: lm.yaml or items.yaml")
    told = parser.parse_args(arguments)
    path = told.file or Path(f"{told.task}.yaml")
    text = template(told.task, path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{path} is there already; name another file, or remove it.") from None
    print(f"{path} is written; train with: sce-lm train {path}")


def template(task: str, path: Path) -> str:
    """A YAML file with the fields of the task's preset, and all others behind a #."""
    from sce_lm.commands.presets import PRESETS
    from sce_lm.training.train_config import ItemsFields, Section, TrainConfig

    preset, defaults = PRESETS[task], TrainConfig.defaults()
    lines = [f"# sce-lm train {path}", "#", "# Fields behind a # have their defaults."]
    for section in reversed(TrainConfig.__mro__):
        if not issubclass(section, Section) or section in (Section, TrainConfig):
            continue
        if section is ItemsFields and task == "lm":
            continue
        lines += ["", f"# ---- {(section.__doc__ or '').splitlines()[0]}"]
        for field in dataclasses.fields(section):
            if field.name not in section.__annotations__:
                continue
            about = textwrap.wrap(field.metadata["help"], 96, break_on_hyphens=False)
            lines += ["", *(f"# {line}" for line in about)]
            if field.name in preset:
                lines += entry(field.name, preset[field.name])
            else:
                lines += [f"#{line}" for line in entry(field.name, defaults[field.name])]
    return "\n".join(lines) + "\n"


def entry(name: str, value: Any) -> list[str]:
    """The lines of a key and its value; a mapping has a line for each of its own."""
    import yaml

    style = None if isinstance(value, list) else False
    text = yaml.safe_dump({name: value}, sort_keys=False, default_flow_style=style, width=1000)
    return text.splitlines()
