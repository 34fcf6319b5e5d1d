"""Word, character and sentence errors: alignments, counts, the error rate; what an empty side means is defined here.

Words are aligned as NIST sclite aligns them, so that substitutions, deletions and insertions are those that it counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rapidfuzz.distance import Levenshtein

# sclite's weights. With them two deletions and two insertions (12) are cheaper than four substitutions (16) although
# both are four errors, so a misplaced stretch is shown as such.
SUBSTITUTION, GAP = 4, 3


@dataclass(frozen=True)
class ErrorCounts:
    """Word errors of one or many utterances: the edits that turn the reference into the hypothesis."""

    words: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        """Edits of every kind."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors by reference words; without reference words 0 if there is no error and infinity if there is one."""
        if self.words:
            return self.errors / self.words
        return math.inf if self.errors else 0.0

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.words + other.words,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )


@dataclass(frozen=True)
class Edit:
    """One step of an alignment; `reference` is None at an insertion, `hypothesis` None at a deletion."""

    kind: Literal["equal", "substitution", "deletion", "insertion"]
    reference: str | None
    hypothesis: str | None


def align(reference: str, hypothesis: str) -> list[Edit]:
    """The alignment that NIST sclite makes of two texts, word by word (words are what white space separates).

    It has the least cost where a substitution costs 4, a deletion or an insertion 3; among equals, from the end on, a
    matched pair of words goes before an insertion, an insertion before a deletion (SCTK 2.4.10, word alignment of
    networks). Its errors are seldom more than the edit distance, never fewer: see `edit_distance`.

    An empty reference makes every word of the hypothesis an insertion, an empty hypothesis every word of the reference
    a deletion; two empty texts align without an edit. Time and memory (a byte a cell) go with the product of lengths.
    """
    ours, theirs = reference.split(), hypothesis.split()
    if ours == theirs:
        return [Edit("equal", word, word) for word in ours]
    steps = _steps(ours, theirs)
    edits: list[Edit] = []
    i, j = len(ours), len(theirs)
    while i or j:
        if i and (not j or steps[i, j] == DELETE):
            i -= 1
            edits.append(Edit("deletion", ours[i], None))
        elif not i or steps[i, j] == INSERT:
            j -= 1
            edits.append(Edit("insertion", None, theirs[j]))
        else:
            i, j = i - 1, j - 1
            edits.append(Edit("equal" if ours[i] == theirs[j] else "substitution", ours[i], theirs[j]))
    return edits[::-1]


PAIR, DELETE, INSERT = 0, 1, 2


def _steps(ours: list[str], theirs: list[str]) -> np.ndarray:
    """The last step of the best alignment of the first i and the first j words: uint8 [len(ours) + 1, len(theirs) + 1]."""
    numbers: dict[str, int] = {}
    left, right = (np.array([numbers.setdefault(word, len(numbers)) for word in words]) for words in (ours, theirs))
    steps = np.zeros((len(ours) + 1, len(theirs) + 1), np.uint8)
    shift = GAP * np.arange(len(theirs) + 1)
    costs = shift  # of the row before
    for i, word in enumerate(left, 1):
        pair = costs[:-1] + SUBSTITUTION * (right != word)
        delete = costs[1:] + GAP
        # an insertion adds GAP to the cell on its left: the running minimum of what is left when that is taken off
        costs = np.minimum.accumulate(np.concatenate([[GAP * i], np.minimum(pair, delete)]) - shift) + shift
        insert = costs[:-1] + GAP
        step = np.where(delete < insert, DELETE, INSERT)
        step[(pair <= delete) & (pair <= insert)] = PAIR
        steps[i, 1:] = step
    return steps


def edit_distance(reference: str, hypothesis: str) -> int:
    """The fewest word edits between two texts: what jiwer counts as errors."""
    return Levenshtein.distance(reference.split(), hypothesis.split())


def character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Characters of the reference and the fewest character edits; words are joined by one space, which counts as one."""
    ours, theirs = (" ".join(text.split()) for text in (reference, hypothesis))
    return len(ours), Levenshtein.distance(ours, theirs)


def counts_of(edits: Iterable[Edit]) -> ErrorCounts:
    """Error counts of an alignment."""
    kinds = [edit.kind for edit in edits]
    insertions = kinds.count("insertion")
    return ErrorCounts(len(kinds) - insertions, kinds.count("substitution"), kinds.count("deletion"), insertions)


def count_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Word errors of one utterance; the texts are compared as they are, so normalise them before."""
    return counts_of(align(reference, hypothesis))


def error_rate(pairs: Iterable[tuple[str, str]]) -> float:
    """Word error rate over (reference, hypothesis) pairs: all errors by all reference words; see `ErrorCounts.rate`."""
    return sum((count_errors(*pair) for pair in pairs), ErrorCounts()).rate
