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
from asr_kd.config.verbs import VERBS, name_of
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
        UserError: naming all unknown keys, with the nearest valid one, or all missing keys of a group, or the first wrong value.
    """
    try:
        return kind.model_validate(landed(values, kind))
    except RecursionError:  # a YAML alias within itself
        raise UserError(f"{where}: nested too deeply; fix it") from None
    except ValidationError as error:
        errors = error.errors(include_url=False)
    # a misspelt key is also a missing one: name the misspelling
    first = min(errors, key=lambda one: one["type"] != "extra_forbidden")
    path = _steps(first)
    # an error of the settings as a whole names the job, not the class
    name = ".".join(path) or name_of(kind)
    if any(f"{name}.".startswith(f"{assignment.partition('=')[0]}.") for assignment in assignments):
        where = "command line"
    alike = [_steps(one) for one in errors if one["type"] == first["type"]]
    if first["type"] == "extra_forbidden":
        guesses = {".".join(steps): _guess(kind, steps, where) for steps in alike}
        if len(guesses) == 1:
            raise UserError(f"{where}: unknown key {name}; {guesses[name]}")
        lists = {words: None for words in guesses.values() if not words.endswith("?")}  # each once, behind all keys
        named = [key if words in lists else f"{key} ({words})" for key, words in guesses.items()]
        raise UserError("; ".join([f"{where}: unknown keys {_listed(named)}", *lists]))
    if first["type"] == "missing":
        missing = {".".join(steps): _purpose(kind, steps) for steps in alike if steps[:-1] == path[:-1]}
        if len(missing) == 1:
            raise UserError(f"{where}: the key {name} is missing; set it ({missing[name]})")
        verb = name_of(kind)
        if verb in VERBS and VERBS[verb].help:
            told, see = list(missing), f" (see `asr-kd {verb} --help`)"
        else:  # a script's settings, which no help lists
            told, see = [f"{key} ({purpose})" for key, purpose in missing.items()], ""
        raise UserError(f"{where}: the keys {_listed(told)} are missing; set them{see}")
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    raise UserError(f"{where}: {name}: {message[0].lower() + message[1:]}{shown}")


def _steps(error: Any) -> list[str]:
    """The path of an error of pydantic, without its names of the alternatives of a type."""
    alternative = r"str|number|schedule|(list|dict|function-after)\[.*\]"
    return [str(step) for step in error["loc"] if not re.fullmatch(alternative, str(step))]


def _listed(keys: list[str]) -> str:
    *others, last = keys
    return f"{', '.join(others)} and {last}"


def _group(kind: type[Settings], path: list[str]) -> type[Settings]:
    """The group of settings that the last step of a path is in."""
    for step in path[:-1]:
        if step in kind.model_fields:  # else a position in a list, or a key of a mapping
            kind = group_of(kind.model_fields[step].annotation) or kind
    return kind


def _purpose(kind: type[Settings], path: list[str]) -> str:
    known = _group(kind, path).model_fields
    return (path[-1] in known and known[path[-1]].description) or "see `asr-kd --help`"


def _guess(kind: type[Settings], path: list[str], where: str) -> str:
    """What an unknown key may have meant: one that is nearly called so beside it, or deeper, else those that there are."""
    group, key = _group(kind, path), path[-1]
    if key in group.removed:
        raise UserError(f"{where}: {'.'.join(path)} is no longer a setting; remove the key")
    known, deeper = group.model_fields, _deeper(group)
    # beside it a slip is likelier than deeper, where short names are near to much
    tries = ((deeper, 1.0), (known, 0.8), (deeper, 0.8), (known, 0.5))
    near = next((found for names, cutoff in tries if (found := difflib.get_close_matches(key, names, 1, cutoff))), None)
    if not near:
        return f"known keys: {', '.join(sorted(known))}"
    return f"did you mean {near[0] if near[0] in known else deeper[near[0]]}?"


def _deeper(kind: type[Settings]) -> dict[str, str]:
    """Each key in the groups below, and its path; the shortest where a key stands in several."""
    found: dict[str, str] = {}
    waiting, met = [(kind, "")], {kind}
    for group, path in waiting:
        for name, field in group.model_fields.items():
            if path:
                found.setdefault(name, path + name)
            if (inner := group_of(field.annotation)) and inner not in met:
                met.add(inner)
                waiting.append((inner, f"{path}{name}."))
    return found
