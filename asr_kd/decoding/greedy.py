"""Greedy CTC decoding: the best unit of every frame, repeats merged, blanks removed."""

from __future__ import annotations

import math

import numpy as np

from asr_kd.decoding.words import Spike


def units_of(path: np.ndarray, blank: int = 0) -> list[int]:
    """Unit ids of a path, int [frames], the unit of every frame: repeats merged, blanks removed."""
    starts = np.ones(len(path), dtype=bool)
    starts[1:] = path[1:] != path[:-1]
    return path[starts & (path != blank)].tolist()


class GreedySearch:
    """The most probable path as frames arrive (on a tie the lowest id), with the spikes of the units and the log-probability of the path."""

    def __init__(self, blank: int = 0) -> None:
        self.blank = blank
        self.frames = 0
        self._score = 0.0
        self._last = blank
        self._spikes: list[Spike] = []

    def push(self, log_probs: np.ndarray) -> None:
        """Decode the next frames: float [frames, units], natural logarithm."""
        best = log_probs.argmax(axis=1)
        for unit, value in zip(best.tolist(), log_probs[np.arange(len(best)), best].tolist(), strict=True):
            if unit != self.blank:
                spike = Spike(unit, self.frames, self.frames + 1, math.exp(value))
                self._spikes.append(self._spikes.pop().longer(spike) if unit == self._last else spike)
            self._last = unit
            self._score += value
            self.frames += 1

    def results(self) -> list[tuple[list[Spike], float]]:
        """The one hypothesis so far and its log-probability."""
        return [(list(self._spikes), self._score)]

    def settle(self) -> list[Spike]:
        """Remove and return the spikes that later frames cannot change; `results` then gives what follows them."""
        goes_on = int(self._last != self.blank)
        done = self._spikes[: len(self._spikes) - goes_on]
        self._spikes = self._spikes[len(done) :]
        return done
