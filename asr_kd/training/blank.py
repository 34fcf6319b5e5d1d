"""How much the blank must be held back: greedy errors for many constants in one pass, and the constant they choose.

A network trained with CTC, and more so one that learns from an unsure teacher, gives the blank too much: what it hesitates
over, greedy decoding drops. A constant taken off the blank's log-probability moves deletions and insertions against each
other, and costs nothing, as it goes into the output's bias.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from asr_kd.decoding.greedy import units_of
from asr_kd.decoding.wer import word_errors
from asr_kd.units import Units

#: constants that are tried, nat; multiples of a power of two, so that a calibrated network is found calibrated
OFFSETS = np.arange(-4, 17) / 4
#: weights of a point and its neighbours to both sides: single words of a small set do not choose
SMOOTHING = np.array([1, 2, 3, 2, 1]) / 9
#: points whose smoothed errors are so little above the fewest, by their share, are as good
TOLERANCE = 0.01
#: with so many errors a word, or more, at every point the network has no words yet and is left as it is
NO_WORDS = 0.9


class BlankCurve:
    """Word errors of greedy decoding for each constant taken off the blank.

    A few counts a constant are held, whatever the number of utterances.

    Attributes:
        offsets: float [points], nat, rising, 0 among them; errors: int [points, 3], substitutions, deletions and insertions.
        blanks: int [points], frames whose best unit is the blank; words, frames: of all.
    """

    def __init__(self, offsets: np.ndarray = OFFSETS) -> None:
        self.offsets = offsets
        self.errors = np.zeros((len(offsets), 3), np.int64)
        self.blanks = np.zeros(len(offsets), np.int64)
        self.words = self.frames = 0

    def add(self, text: str, log_probs: np.ndarray, units: Units) -> None:
        """Decode an utterance: float [frames, units], natural logarithm, and its text."""
        others = log_probs.copy()
        others[:, units.blank] = -np.inf
        best = others.argmax(axis=1)
        lead = log_probs[:, units.blank] - others[np.arange(len(best)), best]
        # a frame is blank for so many of the constants, the first ones: those that are not above the blank's lead
        blank_for = np.searchsorted(self.offsets, lead, side="right")
        points = np.arange(len(self.offsets))
        self.blanks += (blank_for > points[:, None]).sum(axis=1)
        self.frames += len(best)
        # from one of these points to the next the path is the same
        changes = np.union1d([0], blank_for)
        for point, after in pairwise([*changes[changes < len(points)], len(points)]):
            path = np.where(blank_for > point, units.blank, best)
            self.errors[point:after] += word_errors(text, units.decode(units_of(path, units.blank)))
        self.words += len(text.split())

    def choose(self) -> int:
        """The point to take.

        Of the points whose smoothed errors are within `TOLERANCE` of the fewest, the one whose deletions and insertions
        differ least; of equals the one that changes the network least. Where no point finds words, the one of 0.
        """
        unchanged = int(np.flatnonzero(self.offsets == 0)[0])
        if len(self.offsets) == 1:
            return unchanged
        edge = len(SMOOTHING) // 2
        smoothed = np.convolve(np.pad(self.errors.sum(axis=1).astype(float), edge, mode="edge"), SMOOTHING, "valid")
        if smoothed.min() >= NO_WORDS * self.words:
            return unchanged
        good = np.flatnonzero(smoothed <= smoothed.min() * (1 + TOLERANCE) + 1e-9)
        imbalance = np.abs(self.errors[:, 1] - self.errors[:, 2])
        return int(min(good, key=lambda point: (imbalance[point], abs(self.offsets[point]), self.offsets[point])))
