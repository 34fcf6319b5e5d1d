"""Calibration of the blank: greedy errors for many blank offsets in one pass, and the offset to use.

A network trained with CTC, even more so by an unsure teacher, gives the blank too much probability: greedy decoding drops the
words it is unsure of. A constant subtracted from the blank's log-probability trades deletions for insertions, and costs
nothing at run time because it goes into the output bias.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from asr_kd.decoding.greedy import units_of
from asr_kd.decoding.wer import word_errors
from asr_kd.units import Units

#: offsets to try, nat; multiples of a power of two are exact, so that a calibrated network gets the offset 0
OFFSETS = np.arange(-4, 17) / 4
#: smoothing over neighbouring offsets, so that single words of a small set do not decide
SMOOTHING = np.array([1, 2, 3, 2, 1]) / 9
#: offsets whose smoothed errors are at most this share above the minimum count as equally good
TOLERANCE = 0.01
#: if every offset has at least this many errors a word, the network recognises nothing yet and is left as it is
NO_WORDS = 0.9


class BlankCurve:
    """Word errors of greedy decoding for each offset subtracted from the blank's log-probability.

    Memory does not grow with the number of utterances.

    Attributes:
        offsets: float [points], nat, rising, including 0.
        errors: int [points, 3], substitutions, deletions and insertions.
        blanks: int [points], frames whose best unit is the blank.
    """

    def __init__(self, offsets: np.ndarray = OFFSETS) -> None:
        self.offsets = offsets
        self.errors = np.zeros((len(offsets), 3), np.int64)
        self.blanks = np.zeros(len(offsets), np.int64)
        self.words = self.frames = 0

    def add(self, text: str, log_probs: np.ndarray, units: Units) -> None:
        """Decode `log_probs`, float [frames, units] in nat, for all offsets and count the errors against `text`."""
        others = log_probs.copy()
        others[:, units.blank] = -np.inf
        best = others.argmax(axis=1)
        lead = log_probs[:, units.blank] - others[np.arange(len(best)), best]
        # number of offsets, counted from the first, for which a frame is blank: those not above the blank's lead
        blank_for = np.searchsorted(self.offsets, lead, side="right")
        points = np.arange(len(self.offsets))
        self.blanks += (blank_for > points[:, None]).sum(axis=1)
        self.frames += len(best)
        # between two of these points the path is the same
        changes = np.union1d([0], blank_for)
        for point, after in pairwise([*changes[changes < len(points)], len(points)]):
            path = np.where(blank_for > point, units.blank, best)
            self.errors[point:after] += word_errors(text, units.decode(units_of(path, units.blank)))
        self.words += len(text.split())

    def choose(self) -> int:
        """Index of the offset to use.

        Among the points whose smoothed errors are within `TOLERANCE` of the minimum, the one whose deletions and insertions
        differ least; on a tie the smallest change. If the network recognises nothing yet, the point of offset 0.
        """
        unchanged = int(np.flatnonzero(self.offsets == 0)[0])
        edge = len(SMOOTHING) // 2
        smoothed = np.convolve(np.pad(self.errors.sum(axis=1).astype(float), edge, mode="edge"), SMOOTHING, "valid")
        if smoothed.min() >= NO_WORDS * self.words:
            return unchanged
        good = np.flatnonzero(smoothed <= smoothed.min() * (1 + TOLERANCE) + 1e-9)
        imbalance = np.abs(self.errors[:, 1] - self.errors[:, 2])
        return int(min(good, key=lambda point: (imbalance[point], abs(self.offsets[point]), self.offsets[point])))
