"""A configuration from a YAML file and the command line.

A run is described by a YAML file, and each field can be set again on the command line
(`--field value`), which wins. A value is read there as in the file; a mapping is given as JSON or
YAML and replaces the one of the file: `--objective_options '{"tail_candidates": 2048}'`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_origin, get_type_hints

from sce_lm.training.kinds import FieldError, as_written, nearest
from sce_lm.training.train_config import TrainConfig
from sce_lm.training.yaml12 import Plain, read_yaml

COMMAND_LINE = "the command line"
"""What messages call it."""


def parse_config(arguments: Sequence[str], prog: str | None = None) -> TrainConfig:
    """The configuration of `[CONFIG.yaml] [--field value ...]`.

    `prog` is what --help calls the command.

    The command line goes over the file, and the file over the defaults. The last of several values
    that the command line gives to a field counts, as is usual there; a file may give one.

    Raises ValueError, in one sentence that names the file or the command line, for an unknown field
    (naming the nearest known one), a value of the wrong type or out of range, a field given twice,
    and a file that is missing or no mapping.
    """
    file, in_file = COMMAND_LINE, {}
    if arguments and not arguments[0].startswith("-"):
        file, *arguments = arguments
        in_file = _read_file(Path(file))
    told = _read_arguments(arguments, prog)
    kinds = get_type_hints(TrainConfig)
    try:
        return TrainConfig(
            **{name: as_written(kinds[name], v) for name, v in {**in_file, **told}.items()}
        )
    except FieldError as error:
        given = [name for name in error.names if name in in_file or name in told]
        places = dict.fromkeys(COMMAND_LINE if name in told else file for name in given)
        raise ValueError(f"{' and '.join(places) or file}: {error}") from None


def as_arguments(changes: Mapping[str, Any]) -> list[str]:
    """The command line that sets these fields, for :func:`parse_config` behind a file."""
    arguments = []
    for name, value in changes.items():
        entries = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(v if isinstance(v, str) else json.dumps(v) for v in entries)]
    return arguments


def _read_file(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of a YAML file.")
    try:
        source = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"There is no configuration file {str(path)!r}; give the path of a YAML file."
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); correct it.") from None
    content = read_yaml(source, str(path))
    if content is None or content == "":
        return {}
    if not isinstance(content, dict):
        what = "list" if isinstance(content, list) else "single value"
        raise ValueError(f"{path} holds a {what}; expected a mapping of fields; correct it.")
    for name in content:
        _check_name(name, str(path))
    return content


def _read_arguments(arguments: Sequence[str], prog: str | None) -> dict[str, Any]:
    """The fields that are set, as :func:`read_yaml` would give them."""
    found, unknown = _Parser(prog).parse_known_args(arguments)
    if unknown and unknown[0].startswith("--"):
        _check_name(unknown[0].removeprefix("--").split("=")[0].replace("-", "_"), COMMAND_LINE)
    if unknown:
        raise ValueError(
            f"The command line has {unknown[0]!r} where a --field was expected; the configuration "
            "file comes first, and a value behind its field."
        )
    kinds = get_type_hints(TrainConfig)
    told: dict[str, Any] = {}
    for name, value in vars(found).items():
        texts = [Plain(text) for text in ([value] if isinstance(value, str) else value)]
        told[name] = texts if len(texts) > 1 else texts[0]
        if get_origin(kinds[name]) is dict:
            told[name] = read_yaml(value, COMMAND_LINE, name)
    return told


def _check_name(name: str, where: str) -> None:
    known = TrainConfig.defaults()
    if name not in known:
        raise ValueError(
            f"{where} sets {name!r}, which is no field of the configuration; did you mean "
            f"{nearest(name, known)!r}?"
        )


class _Parser(argparse.ArgumentParser):
    """Takes `--field value ...` as text; what it means is decided where the file's values are."""

    def __init__(self, prog: str | None) -> None:
        super().__init__(
            prog,
            usage="%(prog)s CONFIG.yaml [--field value ...]",
            description="Values on the command line go over those of the file.",
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        kinds = get_type_hints(TrainConfig)
        for name, default in TrainConfig.defaults().items():
            more: dict[str, Any] = {}
            if get_origin(kinds[name]) is list:
                more = {"nargs": "+"}
            elif get_origin(kinds[name]) is Literal:
                more = {"metavar": "{" + ",".join(kinds[name].__args__) + "}"}
            elif kinds[name] is bool:
                more = {"nargs": "?", "const": "true"}
            about = TrainConfig.__dataclass_fields__[name].metadata["help"]
            about = f"{about} (default: {default})".replace("%", "%%")
            self.add_argument(*_flags(name), help=about, **more)
            if default is True:
                self.add_argument(
                    *_flags(f"no_{name}"), dest=name, action="store_const", const="false"
                )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"The command line is not understood: {message}; see --help.")


def _flags(name: str) -> list[str]:
    return [f"--{spelling}" for spelling in dict.fromkeys((name, name.replace("_", "-")))]
