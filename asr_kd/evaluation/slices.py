"""Which part of the test set an utterance belongs to, by every field that its shard gives it: condition, speaker, SNR …

Text fields make a slice of each value. Fields of numbers with more than eight values are cut into bands: at fixed edges
where the field is known (`EDGES`; fields whose name has `snr` in it every 5 dB), else at the quintiles of the utterances.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asr_kd.evaluation.parts import Line

FIELDS = 40  # fields that are followed
DISTINCT = 2000  # values of a text field at most, or it is left out: a name, not a property
VALUES = 40  # slices of a field; those with the fewest words are taken together
CATEGORIES = 8  # a field of more numbers is cut into bands
EDGES = {"seconds": (1, 2, 5, 10, 20), "words_per_second": (1, 2, 3, 4)}
SNR_EDGES = (-5, 0, 5, 10, 15, 20, 25, 30)
LARGEST = 1e30  # what is greater is taken as absent, as what is no number
OTHERS = "all others"
SLICE_WORDS = 50  # slices of fewer words are not named as worst or most changed


@dataclass
class Slicing:
    """One field's slices, which may be bands of a number."""

    field: str
    names: list[str | None]  # None is where the field is absent
    labels: np.ndarray  # the slice of each utterance, int [utterances]
    bands: bool


def value_name(value: str | int | float | bool | None) -> str | None:
    """The name of a field's value; None where there is none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return None if value is None or value == "" else str(value)


class Column:
    """The values of one field: two bytes an utterance, and four more while all are numbers."""

    def __init__(self, name: str, before: int) -> None:
        self.name = name
        self.codes = array("h", [0] * before)
        self.numbers = array("f", [math.nan] * before)
        self.values: dict[str | None, int] = {None: 0}
        self.numeric = True

    def add(self, value: Any) -> None:
        """The value of the next utterance."""
        number, name = math.nan, value_name(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            number, name = (float(value), name) if abs(value) < LARGEST else (math.nan, None)  # nor NaN
        if name is not None and math.isnan(number):
            self.numeric, self.numbers = False, array("f")
        if self.numeric:
            self.numbers.append(number)
        if name not in self.values and len(self.values) <= DISTINCT:
            self.values[name] = len(self.values)
        self.codes.append(self.values.get(name, -1))

    def slicing(self, words: np.ndarray) -> Slicing | str:
        """The slices of the field, or why it has none; `words` are of each utterance, int [utterances]."""
        codes = np.array(self.codes)
        if self.numeric and len(self.values) - 1 > CATEGORIES:
            return _bands(self.name, np.array(self.numbers, np.float64))
        if (codes < 0).any():
            return f"more than {DISTINCT:,} values"
        names = list(self.values)
        present = np.bincount(codes, minlength=len(names))
        if (present > 0).sum() < 2:
            return "one value"
        if len(codes) > 2 * VALUES and present.max() <= 1 + len(codes) // DISTINCT and len(names) > len(codes) // 2:
            return "a value of its own for most utterances"
        given = [name for name in names if name is not None]
        given = sorted(given, key=float) if self.numeric else sorted(given)
        order = [code for code in [*(self.values[name] for name in given), 0] if present[code]]
        by_words = np.bincount(codes, weights=words, minlength=len(names))
        kept = set(sorted(order, key=lambda code: -by_words[code])[:VALUES])
        shown = [code for code in order if code in kept]
        label_of = np.full(len(names), len(shown))
        label_of[shown] = np.arange(len(shown))
        texts = [names[code] for code in shown] + [OTHERS] * (len(shown) < len(order))
        return Slicing(self.name, texts, label_of[codes], False)


def _bands(name: str, numbers: np.ndarray) -> Slicing | str:
    known = ~np.isnan(numbers)
    edges: Sequence[float] | None = SNR_EDGES if "snr" in name.lower() else EDGES.get(name)
    if edges is None:
        edges = sorted({float(f"{edge:.2g}") for edge in np.quantile(numbers[known], [0.2, 0.4, 0.6, 0.8])})
    labels = np.where(known, np.searchsorted(edges, numbers, side="right"), len(edges) + 1)
    ends = [f"{edge:g}" for edge in edges]
    between = [f"{low} to {high}" for low, high in itertools.pairwise(ends)]
    names = [f"below {ends[0]}", *between, f"{ends[-1]} and more", None]
    present = np.unique(labels)
    if len(present) < 2:
        return "one value"
    return Slicing(name, [names[label] for label in present], np.searchsorted(present, labels), True)


class Fields:
    """All fields of all utterances, and the two that are worked out: `seconds` and `words_per_second`."""

    def __init__(self) -> None:
        self.columns: dict[str, Column] = {}
        self.utterances = 0
        self.left_out: dict[str, str] = {}

    def add(self, line: Line) -> None:
        """The fields of the next utterance, from one of its lines; `set` and `speaker` are fields too."""
        own: dict[str, Any] = {"set": line["set"], "speaker": line["speaker"], "seconds": line["seconds"]}
        own["words_per_second"] = line["words"] / line["seconds"] if line["seconds"] else None
        values = own | line["fields"] | own  # these four first, whatever the shard has under their names
        for name in [name for name in values if name not in self.columns]:
            if len(self.columns) < FIELDS:
                self.columns[name] = Column(name, self.utterances)
            else:
                self.left_out[name] = f"more than {FIELDS} fields"
        for name, column in self.columns.items():
            column.add(values.get(name))
        self.utterances += 1

    def slicings(self, words: np.ndarray) -> list[Slicing]:
        """Every field that parts the utterances; `left_out` says which do not, but for those of one value."""
        made = {name: column.slicing(words) for name, column in self.columns.items()}
        self.left_out |= {name: why for name, why in made.items() if isinstance(why, str) and why != "one value"}
        return [one for one in made.values() if isinstance(one, Slicing)]
