"""Word errors: counts, alignments, the error rate. Alignment by jiwer; what an empty side means is defined here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import jiwer


@dataclass(frozen=True)
class ErrorCounts:
    """Word errors of one or many utterances: a minimal set of edits that turns the reference into the hypothesis."""

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
    """A minimal alignment of two texts, word by word (words are what white space separates).

    An empty reference makes every word of the hypothesis an insertion, an empty hypothesis every word of the reference
    a deletion; two empty texts align without an edit.
    """
    left, right = reference.split(), hypothesis.split()
    if not left or not right:
        return [Edit("deletion", word, None) for word in left] + [Edit("insertion", None, word) for word in right]
    edits: list[Edit] = []
    for chunk in jiwer.process_words(" ".join(left), " ".join(right)).alignments[0]:
        ours = left[chunk.ref_start_idx : chunk.ref_end_idx]
        theirs = right[chunk.hyp_start_idx : chunk.hyp_end_idx]
        match chunk.type:
            case "equal":
                edits += [Edit("equal", a, b) for a, b in zip(ours, theirs, strict=True)]
            case "substitute":
                edits += [Edit("substitution", a, b) for a, b in zip(ours, theirs, strict=True)]
            case "delete":
                edits += [Edit("deletion", word, None) for word in ours]
            case "insert":
                edits += [Edit("insertion", None, word) for word in theirs]
    return edits


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
