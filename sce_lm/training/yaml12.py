"""YAML as its users mean it: numbers by YAML 1.2, each key once, and data only.

PyYAML reads YAML 1.1, where ``1e-5`` and ``1e4`` are text, ``010`` is 8, ``12:30`` is 750 and
``no`` is false, and of a key given twice the last one counts. Here a scalar without quotation marks
stays :class:`Plain` text until somebody says what is wanted: a field that takes text takes it as it
was written (a date, ``no``, ``007``), and :func:`plain_value` reads everything else by the core
schema of YAML 1.2. JSON is YAML, and is read alike.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_CORE = "tag:yaml.org,2002:"
_NULL = ("", "~", "null", "Null", "NULL")
_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Plain(str):
    """A scalar without quotation marks, as it was written."""

    __slots__ = ()


def read_yaml(source: bytes | str, where: str, field: str = "") -> Any:
    """The one document of ``source``: dicts with text for keys, lists, :class:`Plain` and str.

    Args:
        source: a file's bytes (UTF-8, or UTF-16 with its mark), or text.
        where: what the messages call it.
        field: the field that is all of it.

    Raises:
        ValueError: in one sentence, with the line, for what is no YAML, a key given twice, a tag
            that is none of JSON's kinds, and what contains itself.
    """
    what, loader = f"{where}: {field} is {source!r} and" if field else where, None
    try:
        loader = _Loader(source, where, [field] if field else [])
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        reason = " ".join(filter(None, (error.context, error.problem)))
        line = _in_line(source, error.problem_mark or error.context_mark)
        raise ValueError(f"{what}{line} cannot be read as YAML ({reason}); correct it.") from None
    except yaml.YAMLError as error:  # of its characters
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} cannot be read as YAML ({reason}); correct it.") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply to be read; make it flatter.") from None
    finally:
        if loader is not None:
            loader.dispose()


def plain_value(given: Any) -> Any:
    """What :func:`read_yaml` gave, with its plain text read by YAML 1.2: JSON-able values."""
    if isinstance(given, dict):
        return {key: plain_value(value) for key, value in given.items()}
    if isinstance(given, list):
        return [plain_value(value) for value in given]
    if not isinstance(given, Plain):
        return given
    if given in _NULL:
        return None
    if given in _TRUE or given in _FALSE:
        return given in _TRUE
    if _INT.fullmatch(given):
        return int(given, 0 if given[:2] in ("0o", "0x") else 10)
    if _FLOAT.fullmatch(given):
        return float(given)
    if _NOT_FINITE.fullmatch(given):
        return float(given.replace(".", ""))
    return str(given)


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and parser, with its kinds of scalars and mappings replaced."""

    def __init__(self, source: bytes | str, where: str, around: list[str]) -> None:
        super().__init__(source)
        self.source = source
        self.where = where
        self.around = around  # keys around what is being read

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _CORE + ("merge" if value == "<<" else "plain")
        return super().resolve(kind, value, implicit)

    def refuse(self, node: yaml.Node, problem: str) -> ValueError:
        return ValueError(f"{self.where}{_in_line(self.source, node.start_mark)}: {problem}")

    def field_name(self, *keys: str) -> str:
        return ".".join([*self.around, *keys])

    def mapping(self, node: yaml.Node) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            return self.unknown(node)
        first_lines: dict[str, str] = {}
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.refuse(key_node, "a name is a list or a mapping; expected text.")
            key = self.text(key_node)
            if key in first_lines:
                raise self.refuse(
                    key_node,
                    f"{self.field_name(key)} is given twice{first_lines[key]}; keep one of them.",
                )
            first_lines[key] = _in_line(
                self.source, key_node.start_mark, ", the first time in line "
            )
            if key_node.tag == _CORE + "merge":
                merged = self.merged(value_node)
            else:
                self.around.append(key)
                own[key] = self.construct_object(value_node, deep=True)
                self.around.pop()
        return {**merged, **own}

    def merged(self, node: yaml.Node) -> dict[str, Any]:
        """The mappings behind ``<<``, of which the earlier ones win."""
        found: dict[str, Any] = {}
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            values = self.construct_object(source, deep=True)
            if not isinstance(values, dict):
                raise self.refuse(source, "<< is followed by no mapping; expected one or a list.")
            found = {**values, **found}
        return found

    def sequence(self, node: yaml.Node) -> list[Any]:
        if not isinstance(node, yaml.SequenceNode):
            return self.unknown(node)
        return [self.construct_object(value, deep=True) for value in node.value]

    def text(self, node: Any) -> str:
        try:  # JSON writes a character above U+FFFF as a pair
            return self.construct_scalar(node).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise self.refuse(
                node, f"{self.field_name()} has half a character; correct it."
            ) from None

    def plain(self, node: Any) -> Plain:
        return Plain(self.construct_scalar(node))

    def unknown(self, node: yaml.Node) -> Any:
        tag = str(node.tag).replace(_CORE, "!!")
        raise self.refuse(
            node,
            f"{self.field_name() or 'it'} has the tag {tag}, which is not read; leave the tag out.",
        )


def _in_line(source: bytes | str, mark: Any, before: str = ", line ") -> str:
    """The line of a place in a file; text of the command line has none worth telling."""
    return f"{before}{mark.line + 1}" if mark is not None and isinstance(source, bytes) else ""


_Loader.yaml_constructors = {
    None: _Loader.unknown,
    **{_CORE + kind: _Loader.plain for kind in ("plain", "null", "bool", "int", "float")},
    _CORE + "merge": _Loader.plain,
    _CORE + "str": _Loader.text,
    _CORE + "seq": _Loader.sequence,
    _CORE + "map": _Loader.mapping,
}
_Loader.yaml_multi_constructors = {}
