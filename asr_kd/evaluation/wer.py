"""Word, character and sentence errors: alignments, counts, the error rate; what an empty side means is defined here.

Words are aligned as NIST sclite aligns them, so that substitutions, deletions and insertions are those that it counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jiwer
import numpy as np
from rapidfuzz.distance import Levenshtein

from asr_kd.decoding.wer import word_errors

# sclite's weights. With them two deletions and two insertions (12) are cheaper than four substitutions (16) although
# both are four errors, so a misplaced stretch is shown as such.
SUBSTITUTION, GAP = 4, 3
CELLS = 10_000  # of words by words, from which on a table of all costs is filled
MODULUS = 256


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


class Edit(NamedTuple):
    """One step of an alignment; `reference` is None at an insertion, `hypothesis` None at a deletion."""

    kind: Literal["equal", "substitution", "deletion", "insertion"]
    reference: str | None
    hypothesis: str | None


def align(reference: str, hypothesis: str) -> list[Edit]:
    """The alignment that NIST sclite makes of two texts, word by word (words are what white space separates).

    It has the least cost where a substitution costs 4, a deletion or an insertion 3; among equals, from the end on, a
    matched pair of words goes before an insertion, an insertion before a deletion (SCTK 2.4.10, word alignment of
    networks). Its errors are seldom more than the edit distance, never fewer: see `edit_distance`.

    Where one text is empty every word of the other is an insertion or a deletion. Time goes with the product of lengths, for
    up to some hundred words times the errors; memory too, a byte a cell, beyond these.
    """
    ours, theirs = reference.split(), hypothesis.split()
    rest = _costs(ours, theirs)  # only where the words before it differ does a step need to know what the rest costs
    edits: list[Edit] = []
    i, j = len(ours), len(theirs)
    while i or j:
        same = i and j and ours[i - 1] == theirs[j - 1]
        cost = 0 if same else rest(i, j)
        if same or (i and j and (cost - rest(i - 1, j - 1)) % MODULUS == SUBSTITUTION):
            i, j = i - 1, j - 1
            edits.append(Edit("equal" if same else "substitution", ours[i], theirs[j]))
        elif j and (cost - rest(i, j - 1)) % MODULUS == GAP:
            j -= 1
            edits.append(Edit("insertion", None, theirs[j]))
        else:
            i -= 1
            edits.append(Edit("deletion", ours[i], None))
    return edits[::-1]


def _costs(ours: list[str], theirs: list[str]) -> Callable[[int, int], int]:
    """The least cost of aligning the first i and the first j words, at least modulo 256.

    A few distances are far sooner asked for than a table is filled, unless texts are long. Neighbours in the table differ by
    a few, so a byte a cell tells them apart.
    """
    if len(ours) * len(theirs) <= CELLS:
        return lambda i, j: Levenshtein.distance(ours[:i], theirs[:j], weights=(GAP, GAP, SUBSTITUTION))
    numbers: dict[str, int] = {}
    left, right = (np.array([numbers.setdefault(word, len(numbers)) for word in words]) for words in (ours, theirs))
    shift = GAP * np.arange(len(theirs) + 1)
    table = np.empty((len(ours) + 1, len(theirs) + 1), np.uint8)
    costs = shift  # of the row before
    table[0] = costs % MODULUS
    for i, word in enumerate(left, 1):
        best = np.minimum(costs[:-1] + SUBSTITUTION * (right != word), costs[1:] + GAP)  # without insertions
        # an insertion adds GAP to the cell on its left: the running minimum of what is left when that is taken off
        costs = np.minimum.accumulate(np.concatenate([[GAP * i], best]) - shift) + shift
        table[i] = costs % MODULUS
    return lambda i, j: int(table[i, j])


def edit_distance(reference: str, hypothesis: str) -> int:
    """The fewest word edits between two texts."""
    return sum(word_errors(reference, hypothesis))


def character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Characters of the reference and the fewest character edits; words are joined by one space, which counts as one."""
    ours, theirs = (" ".join(text.split()) for text in (reference, hypothesis))
    found = jiwer.process_characters(ours, theirs)
    return len(ours), found.substitutions + found.deletions + found.insertions


def counts_of(edits: Iterable[Edit]) -> ErrorCounts:
    """Error counts of an alignment."""
    kinds = [edit.kind for edit in edits]
    insertions = kinds.count("insertion")
    return ErrorCounts(len(kinds) - insertions, kinds.count("substitution"), kinds.count("deletion"), insertions)


def count_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Word errors of one utterance; the texts are compared as they are, so normalise them before."""
    return counts_of(align(reference, hypothesis))
