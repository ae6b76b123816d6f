"""Values as the types of their fields, the same for a file, the command line and Python."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from sce_lm.training.yaml12 import Plain, plain_value

_WORDS = {str: "text", bool: "true or false", type(None): "nothing"}
"""What a message calls a type, where that is not its own name."""
_YES_NO = {"yes": True, "on": True, "no": False, "off": False}
_UNFIT = object()


class FieldError(ValueError):
    """A value that its field cannot have, or values that do not go together."""

    def __init__(self, message: str, *names: str) -> None:
        super().__init__(message)
        self.names = names
        """Fields that the message is about."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that a misspelt one is most like."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def as_written(kind: Any, given: Any) -> Any:
    """What a file or the command line gave, its plain text read as the type says.

    Where text is wanted it stays as it is (``2023-11-15``, ``007``, ``no``); where a yes or no is
    wanted, those words and ``on`` and ``off`` are taken too; else it is read by YAML 1.2.
    """
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
        if isinstance(given, list):
            return [as_written(kind, entry) for entry in given]
    value = plain_value(given)
    if not isinstance(given, Plain) or value is None:
        return value
    parts = _alternatives(kind)
    if any(part is str or get_origin(part) is Literal for part in parts):
        return str(given)
    return _YES_NO.get(given.lower(), value) if bool in parts else value


def checked(name: str, kind: Any, value: Any) -> Any:
    """`value` as the type of its field.

    A whole float passes for an int and an int for a float; a single value is a list of one.
    Booleans are no numbers, and numbers are finite.

    Raises:
        FieldError: it is none of that.
    """
    if get_origin(kind) is list:
        entries = value if isinstance(value, (list, tuple)) else [value]
        return [checked(name, get_args(kind)[0], entry) for entry in entries]
    parts = _alternatives(kind)
    for part in parts:
        fitted = _fitted(part, value)
        if fitted is not _UNFIT:
            return fitted
    if len(parts) == 1 and get_origin(parts[0]) is Literal:
        expected = "one of " + ", ".join(map(str, get_args(parts[0])))
    elif type(value) is float and not math.isfinite(value):
        expected = "a finite number"
    else:
        expected = " or ".join(map(_word, parts))
    advice = "correct it" if value is not None else "give it a value, or leave it out"
    shown = "empty" if value is None else repr(value)
    raise FieldError(f"{name} is {shown}; expected {expected}; {advice}.", name.split(".")[0])


def _alternatives(kind: Any) -> list[Any]:
    """The types that a union is made of, or the one type."""
    if get_origin(kind) in (Union, UnionType):
        return [part for inner in get_args(kind) for part in _alternatives(inner)]
    return [kind]


def _fitted(part: Any, value: Any) -> Any:
    origin = get_origin(part)
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in get_args(part))
        return value if fits else _UNFIT
    if origin is not None:  # dict[...] or Mapping[...]
        return dict(value) if isinstance(value, Mapping) else _UNFIT
    if type(value) is float and not math.isfinite(value):
        return _UNFIT
    if part is int and type(value) is float and value.is_integer():
        return int(value)
    if part is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    return value if type(value) is part else _UNFIT


def _word(part: Any) -> str:
    if get_origin(part) is Literal:
        return " or ".join(map(repr, get_args(part)))
    if get_origin(part) is not None:
        return "a mapping"
    return _WORDS.get(part) or part.__name__
