"""Word confidences against what was right, and word times against the teacher's; sums alone are kept."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from asr_kd.evaluation.schema import Bin, Calibrated, Delay
from asr_kd.evaluation.wer import Edit

BINS = 10
LEAST = 1e-4  # a confidence of 0 or 1 is counted as this far from it, or one mistake would cost infinitely much


@dataclass(frozen=True)
class TimedWord:
    """A scored word of a hypothesis."""

    end: float  # in seconds of the audio
    confidence: float
    matched: int | None  # number of the reference word that it got right; None where it is an error


def timed_words(
    times: Sequence[Sequence[Any]], edits: Sequence[Edit], normalize: Callable[[str], str]
) -> list[TimedWord] | None:
    """The words of a hypothesis as scored, with the times and confidences of the words as decoded (as `Line` has them).

    None where normalising word by word gives other words than normalising the text (twenty one = 21): then no decoded word
    stands for a scored one.
    """
    scored = [(word, end, confidence) for text, _, end, confidence in times for word in normalize(text).split()]
    heard = [edit for edit in edits if edit.hypothesis is not None]
    if [word for word, _, _ in scored] != [edit.hypothesis for edit in heard]:
        return None
    numbers, index = [], 0
    for edit in edits:
        if edit.hypothesis is not None:
            numbers.append(index if edit.kind == "equal" else None)
        index += edit.reference is not None
    return [TimedWord(end, confidence, number) for (_, end, confidence), number in zip(scored, numbers, strict=True)]


@dataclass
class Calibration:
    """How often words of a confidence are right. If calibrated, 80 % of the words with confidence 0.8 are right."""

    words: list[int] = field(default_factory=lambda: [0] * BINS)
    right: list[int] = field(default_factory=lambda: [0] * BINS)
    confidence: list[float] = field(default_factory=lambda: [0.0] * BINS)
    bits: float = 0.0

    def add(self, words: Sequence[TimedWord]) -> None:
        """Count the words of an utterance."""
        for word in words:
            index = min(int(word.confidence * BINS), BINS - 1)
            right = word.matched is not None
            self.words[index] += 1
            self.right[index] += right
            self.confidence[index] += word.confidence
            sure = min(max(word.confidence, LEAST), 1 - LEAST)
            self.bits -= math.log2(sure if right else 1 - sure)

    def figures(self) -> Calibrated | None:
        """What the sums amount to; None without words.

        The normalised cross entropy is below 0 for confidences worse than the share of right words given to every word.
        """
        total, right = sum(self.words), sum(self.right)
        if not total:
            return None
        bins = [
            Bin(
                low=index / BINS, high=(index + 1) / BINS, words=count,
                confidence=self.confidence[index] / count if count else None,
                accuracy=self.right[index] / count if count else None,
            )
            for index, count in enumerate(self.words)
        ]  # fmt: skip
        apart = sum(abs(known - hits) for known, hits in zip(self.confidence, self.right, strict=True))
        most = 0.0
        if 0 < right < total:
            most = -right * math.log2(right / total) - (total - right) * math.log2(1 - right / total)
        return Calibrated(
            words=total, bins=bins, expected_error=apart / total,
            normalised_cross_entropy=(most - self.bits) / most if most else None,
        )  # fmt: skip


@dataclass
class Delays:
    """Milliseconds that a system's words end behind the teacher's, on the words that both got right."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, words: Sequence[TimedWord], teacher: Sequence[TimedWord]) -> None:
        """Count the words of an utterance."""
        ends = {word.matched: word.end for word in teacher if word.matched is not None}
        for word in words:
            if word.matched in ends:
                self.counts[round(1000 * (word.end - ends[word.matched]))] += 1

    def figures(self) -> Delay | None:
        """The least delays that so many words keep within; None without words."""
        delays = sorted(self.counts)
        if not delays:
            return None
        within = list(accumulate(self.counts[delay] for delay in delays))
        median, p90 = (delays[bisect_left(within, share * within[-1])] for share in (0.5, 0.9))
        return Delay(median=median, p90=p90, words=within[-1])
