"""Settings from YAML and key=value: read, override, validate, and explain mistakes."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from asr_kd.config.base import Settings, group_of
from asr_kd.config.verbs import name_of
from asr_kd.errors import UserError
from asr_kd.files import read_text
from asr_kd.typed import Typed, landed, parse_yaml, read

S = TypeVar("S", bound=Settings)


def load_yaml(path: Path | str, as_typed: bool = False) -> dict[str, Any]:
    """Read a YAML mapping, safely: no tags that build objects, and every key once; a UserError when the file does not hold one.

    With `as_typed` words keep their spelling, so that `build` can read them by the type of their setting.
    """
    value = parse_yaml(read_text(path, "settings file"), str(path), as_typed)
    value = read(value) if isinstance(value, Typed) else value
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold `key: value` settings, not a {type(value).__name__}")
    return value


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `a.b=value` assignments (a number steps into a list) to a copy of `values`.

    The value is kept as typed: `build` reads it as text or as YAML, by the type of its setting. A UserError when an
    assignment has no `=`, or steps into something that has no keys.
    """
    values = copy.deepcopy(values)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise UserError(f"{assignment}: not an override; write key=value, e.g. seed=1 or model.layers=3")
        here: Any = values
        *parents, last = path.split(".")
        for step in parents:
            key = _key(here, step, assignment)
            inside = here.setdefault(key, {}) if isinstance(here, dict) else here[key]
            if isinstance(inside, Typed) and inside.source:  # an earlier assignment of the whole group
                group = read(inside)
                inside = here[key] = group if isinstance(group, dict | list) else inside
            here = inside
        here[_key(here, last, assignment)] = Typed(text, source=assignment)
    return values


def _key(here: Any, step: str, assignment: str) -> int | str:
    """What a step of an assignment means in the value that it leads into: a key, or a position in a list."""
    if isinstance(here, dict):
        return step
    if not isinstance(here, list):
        kind = type(read(here) if isinstance(here, Typed) else here).__name__
        raise UserError(f"{assignment}: {step} cannot be set inside a {kind}")
    if not step.isdigit() or int(step) >= len(here):
        raise UserError(f"{assignment}: {step} is not a position in a list of {len(here)} (they count from 0)")
    return int(step)


def build(kind: type[S], values: dict[str, Any], where: str, assignments: Iterable[str] = ()) -> S:
    """Validate `values` as settings of `kind`.

    Args:
        kind: the class of the settings.
        values: as of `load_yaml` and `override`.
        where: the file or command that they come from, for messages.
        assignments: `a.b=value` from the command line that are in `values`; messages about them name the command line.

    Raises:
        UserError: naming the first wrong key or value, with the nearest valid key for an unknown one.
    """
    try:
        return kind.model_validate(landed(values, kind))
    except RecursionError:  # a YAML alias within itself
        raise UserError(f"{where}: nested too deeply; fix it") from None
    except ValidationError as error:
        # a misspelt key is also a missing one: name the misspelling
        first = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    # without pydantic's names of the alternatives of a type
    path = [
        str(step)
        for step in first["loc"]
        if not re.fullmatch(r"str|number|schedule|(list|dict|function-after)\[.*\]", str(step))
    ]
    # an error of the settings as a whole names the job, not the class
    name = ".".join(path) or name_of(kind)
    if any(f"{name}.".startswith(f"{assignment.partition('=')[0]}.") for assignment in assignments):
        where = "command line"
    group: type[Settings] = kind
    for step in path[:-1]:
        if step in group.model_fields:  # else a position in a list, or a key of a mapping
            group = group_of(group.model_fields[step].annotation) or group
    known = group.model_fields
    if first["type"] == "extra_forbidden":
        if path[-1] in group.removed:
            raise UserError(f"{where}: {name} is no longer a setting; remove the key")
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
        raise UserError(f"{where}: unknown key {name}; {hint}")
    if first["type"] == "missing":
        what = path[-1] in known and known[path[-1]].description
        raise UserError(f"{where}: the key {name} is missing; set it ({what or 'see `asr-kd --help`'})")
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    raise UserError(f"{where}: {name}: {message[0].lower() + message[1:]}{shown}")
