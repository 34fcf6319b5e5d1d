"""`--fail-if EXPRESSION`: a condition on the figures of a report, for CI.

`student-distilled.wer > teacher.wer * 1.1 or data.quarantined > 0`: numbers (a WER of 3 % is 0.03), + - * / and brackets, < <= > >= == !=, and, or,
not. A figure is a system's name and the keys that lead to it in report.json (`teacher.interval.1`), or keys from the top
(`data.words`). Names may hold dashes and dots, so a minus between names needs a space before it; a name with other marks
stands in quotes (`"my system".wer`).
"""

from __future__ import annotations

import ast
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from asr_kd.errors import UserError

LONGEST = 2000
_WORDS = {"and", "or", "not"}
_NAME = re.compile(r'"([^"]*)"((?:\.[\w-]+)*)|[\w.](?:[\w.-]*[\w.])?')
_MARKS = re.compile(r"[-\s()<>=!+*/]*")
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """A condition that was understood; `names` are its figures, each a system (None where it was not in quotes) and keys."""

    expression: str
    tree: ast.expr
    names: list[tuple[str | None, str]]

    def holds(self, report: Mapping[str, Any]) -> bool:
        """Whether the condition is true of a report.

        Raises:
            UserError: when a figure is not in the report, is not defined there, or is no number.
        """
        values = [self._figure(report, *name) for name in self.names]
        try:
            return bool(self._value(self.tree, values))
        except ZeroDivisionError:
            raise UserError(f"--fail-if {self.expression}: divides by nought") from None
        except OverflowError:
            raise UserError(f"--fail-if {self.expression}: a number is too large") from None

    def judge(self, report: Mapping[str, Any]) -> bool:
        """Whether the condition is true of a report; says so, with the figures that it rests on, on standard error."""
        true = self.holds(report)
        figures = dict.fromkeys(f"{_shown(*name)} = {self._figure(report, *name):.6g}" for name in self.names)
        said = "true, so this fails" if true else "not so"
        print(f"--fail-if {self.expression}: {said} ({', '.join(figures)})", file=sys.stderr)
        return true

    def check_names(self, systems: Iterable[str]) -> None:
        """Refuse a figure of a system that is none of these, before anything is scored.

        Raises:
            UserError: when there is one.
        """
        systems = list(systems)
        for quoted, path in self.names:
            if not _splits(quoted, path, systems) and path.split(".")[0] not in TOP:
                raise UserError(
                    f"--fail-if {self.expression}: {quoted or path} is none of the systems ({', '.join(systems)}); a figure is "
                    "written system.key, and a minus has a space on both sides"
                )

    def _figure(self, report: Mapping[str, Any], quoted: str | None, path: str) -> float:
        places = [(report["systems"][name], keys) for name, keys in _splits(quoted, path, report["systems"])]
        if quoted is None:
            places.append((report, path))
        shown = _shown(quoted, path)
        for start, keys in places:
            value: Any = start
            for key in keys.split("."):
                if isinstance(value, dict) and key in value:
                    value = value[key]
                elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
                    value = value[int(key)]
                else:
                    break
            else:
                if value is None:
                    raise UserError(f"--fail-if {self.expression}: {shown} is not defined in this report (null)")
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise UserError(f"--fail-if {self.expression}: {shown} is no number")
                return value
        raise UserError(
            f"--fail-if {self.expression}: there is no figure {shown}; the systems are {', '.join(report['systems'])}, "
            "their figures those of report.json, and a minus has a space on both sides"
        )

    def _value(self, node: ast.expr, values: list[float]) -> Any:
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return values[int(name[1:])]
            case ast.UnaryOp(ast.USub(), one):
                return -self._value(one, values)
            case ast.UnaryOp(ast.Not(), one):
                return not self._value(one, values)
            case ast.BinOp(left, kind, right):
                return _ARITHMETIC[type(kind)](self._value(left, values), self._value(right, values))
            case ast.BoolOp(kind, parts):
                return (all if isinstance(kind, ast.And) else any)(self._value(part, values) for part in parts)
            case ast.Compare(left, kinds, others):
                all_values = [self._value(one, values) for one in [left, *others]]
                return all(
                    _COMPARISONS[type(kind)](a, b)
                    for kind, a, b in zip(kinds, all_values[:-1], all_values[1:], strict=True)
                )
        raise AssertionError(ast.dump(node))


def _shown(quoted: str | None, path: str) -> str:
    return path if quoted is None else f'"{quoted}".{path}'


TOP = ("data", "sets", "bootstrap", "pairs", "slices", "slices_worst", "slices_changed")


def parse_gate(expression: str) -> Gate:
    """Understand a condition.

    Raises:
        UserError: when it is none.
    """

    def wrong(why: str) -> UserError:
        example = 'for example "student.wer > teacher.wer * 1.1"'
        return UserError(f"--fail-if {expression[:200]}: {why}; write a comparison of figures, {example}")

    if len(expression) > LONGEST:
        raise wrong(f"is longer than {LONGEST:,} characters")
    python, names, place = "", list[tuple[str | None, str]](), 0
    while place < len(expression):
        marks = _MARKS.match(expression, place)
        name = _NAME.match(expression, place)
        if marks and marks.end() > place:
            python += marks[0].replace("\n", " ")
            place = marks.end()
        elif name:
            python += f" {_python(name, names)} "
            place = name.end()
        else:
            raise wrong(f"{expression[place]} has no meaning here")
    try:
        tree = ast.parse(python.strip(), mode="eval").body
        is_condition = _check(tree)
    except (SyntaxError, RecursionError, MemoryError, _Unknown):
        raise wrong("cannot be understood") from None
    if not is_condition:
        raise wrong("is no condition")
    return Gate(expression, tree, names)


def _python(name: re.Match[str], names: list[tuple[str | None, str]]) -> str:
    """A word, a number, or the stand-in of a figure."""
    text = name[0]
    if name[1] is None:
        if text in _WORDS:
            return text
        try:
            number = float(text)
        except ValueError:
            pass
        else:
            if math.isfinite(number) and text[0] in ".0123456789":
                return repr(number)
    figure = (name[1], name[2][1:] if name[2] else "") if name[1] is not None else (None, text)
    if figure not in names:
        names.append(figure)
    return f"_{names.index(figure)}"


class _Unknown(Exception):
    """Python that is no part of the language."""


def _check(node: ast.expr) -> bool:
    """Whether an expression is a condition (else it is a number); raises where the two are mixed up or it is neither."""

    def all_are(parts: Iterable[ast.expr], conditions: bool) -> None:
        if any(_check(part) != conditions for part in parts):
            raise _Unknown

    match node:
        case ast.Constant(value) if isinstance(value, float):
            return False
        case ast.Name():
            return False
        case ast.UnaryOp(ast.USub(), one):
            all_are([one], False)
            return False
        case ast.UnaryOp(ast.Not(), one):
            all_are([one], True)
            return True
        case ast.BinOp(left, kind, right) if type(kind) in _ARITHMETIC:
            all_are([left, right], False)
            return False
        case ast.BoolOp(_, parts):
            all_are(parts, True)
            return True
        case ast.Compare(left, kinds, others) if all(type(kind) in _COMPARISONS for kind in kinds):
            all_are([left, *others], False)
            return True
    raise _Unknown


def _splits(quoted: str | None, path: str, systems: Iterable[str]) -> list[tuple[str, str]]:
    """The ways to read a path as a system and keys, the longest name first: names may hold dots."""
    if quoted is not None:
        return [(quoted, path)] if quoted in systems and path else []
    found = [(name, path[len(name) + 1 :]) for name in systems if path.startswith(f"{name}.")]
    return sorted(found, key=lambda one: -len(one[0]))
