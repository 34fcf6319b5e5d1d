"""Whether two systems differ by more than chance: the matched-pairs sentence-segment word error test (MAPSSWE).

L. Gillick and S. Cox, "Some statistical issues in the comparison of speech recognition algorithms", ICASSP 1989, with the
segments of NIST sc_stats (SCTK 2.4.10). The other test, the paired bootstrap, is in `bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from asr_kd.evaluation.bootstrap import interval, two_sided
from asr_kd.evaluation.schema import MatchedPairsTest, Pair
from asr_kd.evaluation.wer import Edit

CORRECT_BETWEEN = 2


@dataclass(frozen=True)
class Marks:
    """What the test needs of an alignment."""

    wrong: bytes  # for each reference word 1 if the system has it wrong, else 0
    inserted: bytes  # insertions before each reference word and after the last (one more entry), 255 at most


def marks(edits: Iterable[Edit]) -> Marks:
    """The marks of an alignment."""
    wrong, inserted = bytearray(), bytearray(1)
    for edit in edits:
        if edit.reference is None:
            inserted[-1] = min(inserted[-1] + 1, 255)
        else:
            wrong.append(edit.kind != "equal")
            inserted.append(0)
    return Marks(bytes(wrong), bytes(inserted))


def segments(first: Marks, second: Marks) -> list[tuple[int, int]]:
    """Errors of both systems in each stretch of one utterance in which either errs.

    Stretches are apart when both systems have at least two reference words in a row right, without an insertion between
    them, and so the errors in one hardly depend on those in another. An utterance ends a stretch.
    """
    found: list[tuple[int, int]] = []
    ours = theirs = correct = 0
    for index, (one, other) in enumerate(zip(first.inserted, second.inserted, strict=True)):
        if one or other:
            ours, theirs, correct = ours + one, theirs + other, 0
        if index == len(first.wrong):
            break
        one, other = first.wrong[index], second.wrong[index]
        ours, theirs, correct = ours + one, theirs + other, 0 if one or other else correct + 1
        if correct == CORRECT_BETWEEN and (ours or theirs):
            found.append((ours, theirs))
            ours = theirs = 0
    return [*found, (ours, theirs)] if ours or theirs else found


@dataclass
class MatchedPairs:
    """Sums over segments of two systems, segment by segment."""

    segments: int = 0
    difference: int = 0
    squares: int = 0

    def add(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Count the segments of an utterance."""
        for first, second in pairs:
            self.segments += 1
            self.difference += first - second
            self.squares += (first - second) ** 2

    def test(self) -> MatchedPairsTest:
        """What the sums say of the two systems.

        The mean is taken as normally distributed, so trust it from some tens of segments on. Where all segments differ
        by the same, z is 0 and p is 1, as in sc_stats: there is no variance to test against.
        """
        count = self.segments
        mean = self.difference / count if count else 0.0
        spread = self.squares - count * mean * mean  # sum of squared deviations
        varies = count > 1 and self.squares * count != self.difference**2  # in whole numbers: exact
        z = mean / math.sqrt(spread / (count - 1) / count) if varies else 0.0
        return MatchedPairsTest(segments=count, mean=mean, z=z, p=math.erfc(abs(z) / math.sqrt(2)))


def compared(a: str, b: str, difference: float, drawn: np.ndarray, matched: MatchedPairs) -> Pair:
    """What both tests say of two systems, from their difference in WER, that of each resample, and their segments."""
    return Pair(
        a=a, b=b, difference=difference, interval=interval(drawn), p_bootstrap=two_sided(drawn), mapsswe=matched.test()
    )
