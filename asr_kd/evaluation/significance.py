"""What chance does to word error rates: intervals and p-values by the blocked bootstrap, and MAPSSWE.

The latter is the matched-pairs sentence-segment word error test: L. Gillick and S. Cox, "Some statistical issues in the
comparison of speech recognition algorithms", ICASSP 1989, with the segments of NIST sc_stats (SCTK 2.4.10).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from asr_kd.evaluation.schema import MatchedPairsTest, Pair
from asr_kd.evaluation.wer import Edit

CONFIDENCE = 0.95
CORRECT_BETWEEN = 2  # words in a row that both systems have right end a segment of MAPSSWE


def resampled_errors(errors: np.ndarray, words: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors int64 [systems, resamples] and words int64 [resamples] of as many blocks as there are, drawn with replacement.

    A block (a speaker, or else an utterance) is what may be taken as independent of the others. Every system sees the
    same draws, so that the difference of two systems is resampled too.

    Args:
        errors: int [systems, blocks].
        words: int [blocks].
    """
    rng = np.random.default_rng(seed)
    blocks = len(words)
    data = np.vstack([errors, words]).astype(np.int64)
    sums = np.empty((len(data), resamples), np.int64)
    for index in range(resamples):
        sums[:, index] = data @ np.bincount(rng.integers(0, blocks, blocks), minlength=blocks)
    return sums[:-1], sums[-1]


def blocks_of(speakers: np.ndarray) -> tuple[Literal["speakers", "utterances"], int, np.ndarray]:
    """What resamples of utterances are drawn of, how many there are, and the one of each utterance.

    That is speakers where all are known, and two or more. `speakers` are int [utterances], numbered from 0 on; -1 where one
    is not known.
    """
    present = np.bincount(speakers) > 0 if (speakers >= 0).all() else np.zeros(0, bool)
    number = int(present.sum())
    if number < 2:
        return "utterances", len(speakers), np.arange(len(speakers))
    return "speakers", number, (np.cumsum(present) - 1)[speakers]


def resampled_rates(rows: np.ndarray, words: np.ndarray, speakers: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Error rates float [systems, resamples]; not finite where no words were drawn, no resample where there is one block.

    Args:
        rows: errors, int [systems, utterances].
        words: int [utterances].
        speakers: int [utterances], see `blocks_of`.
    """
    _, number, labels = blocks_of(speakers)
    if number < 2:
        return np.zeros((len(rows), 0))
    sums = np.array([np.bincount(labels, row, number) for row in (*rows, words)]).astype(np.int64)
    errors, drawn_words = resampled_errors(sums[:-1], sums[-1], resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return errors / drawn_words


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of resampled values, low and high; None when any of them is undefined or there are none."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def two_sided(differences: np.ndarray) -> float | None:
    """The p-value of the paired bootstrap: twice the share of resampled differences on the rarer side of 0.

    One resample is added to each side, so that it is never 0. None where there is no resample or one is undefined.
    """
    if not len(differences) or not np.isfinite(differences).all():
        return None
    below, above = (differences <= 0).sum(), (differences >= 0).sum()
    return float(min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1)))


@dataclass(frozen=True)
class Marks:
    """What MAPSSWE needs of an alignment."""

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
    """What both tests say of two systems.

    Args:
        a: name of one.
        b: name of the other.
        difference: WER of a less that of b.
        drawn: the same of each resample, float [resamples].
        matched: errors of both, segment by segment.
    """
    return Pair(
        a=a, b=b, difference=difference, interval=interval(drawn), p_bootstrap=two_sided(drawn), mapsswe=matched.test()
    )
