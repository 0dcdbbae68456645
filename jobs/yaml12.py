"""YAML by the core rules of version 1.2: `1e-6` is a number, `on` is a word, 010 is ten.

`22:22` is a word, too. PyYAML by itself follows version 1.1. A key is text, and may occur only
once. There are no other tags: neither Python objects nor timestamps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from jobs.errors import ToolkitError

TAG = "tag:yaml.org,2002:"
PLAIN = {  # tag -> what a word without quotes must look like, and its first characters
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


def load_yaml(text: str, source: str) -> Any:
    """Parse a text. Raises ToolkitError with line and column in `source`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ToolkitError(
            f"{source} is not valid YAML",
            why=str(error).replace('in "<unicode string>", ', "at "),
            hint="mend the line that is named",
        ) from None
    except RecursionError:
        raise ToolkitError(f"{source} cannot be read", why="it is nested too deeply") from None


def dump_yaml(value: Any) -> str:
    """Write a value so that load_yaml, and also a reader of YAML 1.1, reads the same value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's way)


class _Dumper(yaml.SafeDumper):
    """Quotes the words that would be a number in YAML 1.1 or 1.2."""


for _word, (_pattern, _first) in PLAIN.items():
    _Loader.add_implicit_resolver(TAG + _word, re.compile(f"^(?:{_pattern})$"), _first)
    _Dumper.add_implicit_resolver(TAG + _word, re.compile(f"^(?:{_pattern})$"), _first)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConstructorError(None, None, f"a field's name is text, not {key!r}", key_node.start_mark)
        if key in fields:
            raise ConstructorError(None, None, f"`{key}` occurs twice", key_node.start_mark)
        fields[key] = loader.construct_object(value_node, deep=True)
    return fields


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return [loader.construct_object(each, deep=True) for each in node.value]


def _scalar(kind: str, convert: Callable[[str], Any]) -> Callable[[_Loader, yaml.ScalarNode], Any]:
    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node))
        try:
            return convert(text.lower())
        except (ValueError, KeyError):  # `!!int abc`, or more digits than Python takes
            raise ConstructorError(None, None, f"`{text[:20]}` cannot be read as {kind}", node.start_mark) from None

    return construct


_Loader.yaml_constructors = {
    TAG + "map": _mapping,
    TAG + "seq": _sequence,
    TAG + "str": yaml.SafeLoader.construct_yaml_str,
    TAG + "null": lambda loader, node: None,
    TAG + "bool": _scalar("bool", {"true": True, "false": False}.__getitem__),
    TAG + "int": _scalar("int", int),
    TAG + "float": _scalar("float", lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan"))),
    None: yaml.SafeLoader.construct_undefined,
}
