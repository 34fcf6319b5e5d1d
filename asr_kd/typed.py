"""Settings as typed: words of YAML files and of `key=value`, read as text or as a value by the type of their setting.

YAML turns `0012` into a number and `null` into nothing, and cuts a value off at ` #`. So a word keeps its spelling (`Typed`)
until its setting is known: a text setting takes it as typed, every other one as YAML reads it.
"""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from asr_kd.errors import UserError


class Typed(str):
    """A word as typed, either in a file if YAML reads it as something else than text, or on the command line.

    Attributes:
        value: for a word in a file, its value in YAML: a number, true, false or None.
        source: for a word on the command line, its assignment; it is not read as YAML yet.
    """

    value: Any
    source: str | None

    def __new__(cls, text: str, value: Any = None, source: str | None = None) -> Typed:
        self = super().__new__(cls, text)
        self.value, self.source = value, source
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with common numbers (in YAML 1.1, 1e-3 is text and 0012 is ten), without dates, and with every key once."""

    where = "YAML"

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:  # before `<<` is merged, whose keys may be repeated here
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise UserError(
                        f"{self.where}: line {line}: the key {key.value} stands twice (first in line {lines[key.value]}); remove one"
                    )
                lines[key.value] = line
        return node


class _TypedLoader(_Loader):
    """As `_Loader`, but words keep their spelling."""


_TAG = "tag:yaml.org,2002:"
#: how YAML writes nothing
NULLS = ("null", "Null", "NULL", "~")
#: numbers of YAML 1.1, without base 60 (12:30) and base 8 (0012)
_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$",
    "float": r"[-+]?(([0-9][0-9_]*)?\.[0-9_]+|[0-9][0-9_]*\.)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) not in (*_NUMBERS, "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list("-+.0123456789"))


def _typed(loader: _TypedLoader, node: yaml.ScalarNode) -> Typed:
    return Typed(node.value, yaml.SafeLoader.yaml_constructors[node.tag](loader, node))


for _name in ("int", "float", "bool", "null"):
    _TypedLoader.add_constructor(_TAG + _name, _typed)


def parse_yaml(text: str, where: str, as_typed: bool = False) -> Any:
    """Read YAML, safely: no tags that build objects. With `as_typed`, words that YAML does not read as text are given as `Typed`.

    A UserError, beginning with `where`, when `text` is not YAML, or holds a key twice.
    """
    try:
        loader = (_TypedLoader if as_typed else _Loader)(text)
        loader.where = where
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "unreadable"
    except ValueError as error:  # a number that matches the pattern and is invalid
        line, reason = "", str(error)
    except RecursionError:
        line, reason = "", "nested too deeply"
    raise UserError(f"{where}: not valid YAML{line} ({reason}); fix it")


def read(word: Typed) -> Any:
    """The value of a word that is not text, as YAML reads it, else a UserError; in lists and mappings words are still `Typed`."""
    if word.source is None:
        return word.value
    value = parse_yaml(word, word.source, as_typed=True)
    return value.value if isinstance(value, Typed) else value


def landed(value: Any, annotation: Any) -> Any:
    """`value` as read by a setting of this type: words as text for a text setting, else as YAML reads them, or a UserError.

    An optional text is None for an empty value, and in a file for YAML's `null`; an optional choice of words for both in both. What does not fit
    the type is returned unchanged, and the validation reports it.
    """
    arms = list(_arms(annotation))
    if Any in arms:
        return value
    if isinstance(value, Typed):
        opening = value.strip()[:1] if value.source else ""
        groups = any(_is_mapping(arm) for arm in arms) and opening == "{"
        if str in arms and not groups and not (opening == "[" and any(get_origin(arm) is list for arm in arms)):
            return _text(value, arms, _chooses(annotation))
        value = read(value)
    if isinstance(value, dict) and (arm := next(filter(_is_mapping, arms), None)):
        return {str(key): landed(item, _inside(arm, key)) for key, item in value.items()}
    if isinstance(value, list) and (arm := next((arm for arm in arms if get_origin(arm) is list), None)):
        return [landed(item, get_args(arm)[0]) for item in value]
    return value


def _text(word: Typed, arms: list[Any], chosen: bool) -> Any:
    if types.NoneType in arms and (
        word.value is None if word.source is None else not word or (chosen and word in NULLS)
    ):
        return None
    # if a number is allowed too, it is taken if its spelling is kept
    value = read(word) if {int, float} & set(arms) and not word.strip().startswith(("[", "{")) else None
    return value if type(value) in arms and str(value) == word else str(word)


def _chooses(annotation: Any) -> bool:
    """Whether a setting takes no text but words of a choice, of which null is none."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        arms = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
        return all(map(_chooses, arms))
    return annotation is not str


def _is_mapping(arm: Any) -> bool:
    return get_origin(arm) is dict or (isinstance(arm, type) and issubclass(arm, BaseModel))


def _inside(mapping: Any, key: Any) -> Any:
    """The type of a key's value in a group of settings or a mapping."""
    if get_origin(mapping) is dict:
        return get_args(mapping)[1]
    return mapping.model_fields[key].annotation if key in mapping.model_fields else Any


def _arms(annotation: Any) -> Any:
    """The types that a setting may have, one by one; for a Literal the types of its choices."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _arms(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for arm in get_args(annotation):
            yield from _arms(arm)
    elif origin is Literal:
        yield from {type(choice) for choice in get_args(annotation)}
    else:
        yield annotation
