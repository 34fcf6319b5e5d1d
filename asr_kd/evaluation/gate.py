"""`--fail-if CONDITION`: a condition on the figures of report.json, for CI, worked out by simpleeval.

`student-distilled.wer > teacher.wer * 1.1 or data.quarantined > 0`: numbers (a WER of 3 % is 0.03), + - * / and brackets,
< <= > >= == !=, and, or, not. A figure is a system's name and the keys that lead to it in report.json
(`teacher.interval.1`), or keys from the top (`data.words`). Names may hold dashes and dots, so a minus has a space on both
sides; a name with other marks stands in quotes (`"my system".wer`).
"""

from __future__ import annotations

import ast
import operator
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from simpleeval import InvalidExpression, SimpleEval

from asr_kd.errors import UserError

LONGEST = 2000
#: figures from the top of the report begin with one of these
TOP = ("data", "sets", "bootstrap", "pairs", "slices", "slices_worst", "slices_changed")
#: a figure whose system is in quotes, or any other word: a figure, a number, and, or, not
WORD = re.compile(r'"([^"]*)"((?:\.[\w-]+)*)|[\w.](?:[\w.-]*[\w.])?')
NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.USub: operator.neg,
    ast.Not: operator.not_, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
PARTS = {ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.And, ast.Or, ast.Compare, ast.Constant, ast.Name, ast.Load, *OPERATORS}


@dataclass(frozen=True)
class Gate:
    """A condition that was understood; `figures`: as they are written, and the names in `tree` that stand for them."""

    expression: str
    tree: ast.expr
    figures: dict[str, str]

    def holds(self, report: Mapping[str, Any]) -> bool:
        """Whether the condition is true of a report; a UserError for a figure that is not there, not defined, or no number."""
        values = {name: self._figure(report, written) for written, name in self.figures.items()}
        try:
            return bool(SimpleEval(OPERATORS, {}, values).eval(self.expression, self.tree))
        except (ArithmeticError, RecursionError, InvalidExpression) as error:
            raise self._wrong(f"cannot be worked out: {error}") from None

    def judge(self, report: Mapping[str, Any]) -> bool:
        """Whether the condition is true of a report; says so, with the figures that it rests on, on standard error."""
        true = self.holds(report)
        figures = ", ".join(f"{written} = {self._figure(report, written):.6g}" for written in self.figures)
        judged = "true, so this fails" if true else "not so"
        print(f"--fail-if {self.expression}: {judged} ({figures})", file=sys.stderr)
        return true

    def check_names(self, systems: Collection[str]) -> None:
        """Refuse, with a UserError, a figure of a system that is none of these; before anything is scored."""
        for written in self.figures:
            if not _splits(written, systems) and written.split(".")[0] not in TOP:
                how = "a figure is written system.key, and a minus has a space on both sides"
                raise self._wrong(f"{written} names none of the systems ({', '.join(systems)}); {how}")

    def _wrong(self, why: str) -> UserError:
        return UserError(f"--fail-if {self.expression}: {why}")

    def _figure(self, report: Mapping[str, Any], written: str) -> float:
        starts = [(report["systems"][name], keys) for name, keys in _splits(written, report["systems"])]
        for value, keys in [*starts, (report, written)]:
            try:
                for key in keys.split("."):
                    value = value[int(key) if isinstance(value, list) and key.isdecimal() else key]
            except (LookupError, TypeError):
                continue
            if value is None:
                raise self._wrong(f"{written} is not defined in this report (null)")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self._wrong(f"{written} is no number")
            return value
        known = f"the systems are {', '.join(report['systems'])}, their figures those of report.json"
        raise self._wrong(f"there is no figure {written}; {known}, and a minus has a space on both sides")


def parse_gate(expression: str) -> Gate:
    """Understand a condition; a UserError where it is none."""
    figures: dict[str, str] = {}

    def stand_in(word: re.Match[str]) -> str:
        """What simpleeval reads in its place; Python would take a dash within a name for a minus."""
        if word[0] in ("and", "or", "not"):
            return f" {word[0]} "
        return f" {float(word[0]) if NUMBER.fullmatch(word[0]) else figures.setdefault(word[0], f'f{len(figures)}')} "

    def wrong(why: str) -> UserError:
        example = 'for example "student.wer > teacher.wer * 1.1"'
        return UserError(f"--fail-if {expression[:200]}: {why}; write a comparison of figures, {example}")

    if len(expression) > LONGEST:
        raise wrong(f"is longer than {LONGEST:,} characters")
    if odd := re.search(r"[^-\s()<>=!+*/]", WORD.sub("", expression)):
        raise wrong(f"{odd[0]} has no meaning here")
    try:
        tree = ast.parse(" ".join(WORD.sub(stand_in, expression).split()), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        raise wrong("cannot be understood") from None
    if not _is_condition(tree):
        raise wrong("is no condition")
    for node in ast.walk(tree):
        parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        if type(node) not in PARTS or any(_is_condition(part) != _joins(node) for part in parts):
            raise wrong("cannot be understood")
    return Gate(expression, tree, figures)


def _joins(node: ast.AST) -> bool:
    """Whether this is and, or, not, which join conditions; all else is made of numbers."""
    return isinstance(node, ast.BoolOp) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))


def _is_condition(node: ast.expr) -> bool:
    return _joins(node) or isinstance(node, ast.Compare)


def _splits(written: str, systems: Collection[str]) -> list[tuple[str, str]]:
    """The ways to read a figure as a system and keys, the longest name first: names may hold dots."""
    if written.startswith('"'):
        _, name, path = written.split('"')
        return [(name, path[1:])] if name in systems and path else []
    found = [(name, written[len(name) + 1 :]) for name in systems if written.startswith(f"{name}.")]
    return sorted(found, key=lambda split: -len(split[0]))
