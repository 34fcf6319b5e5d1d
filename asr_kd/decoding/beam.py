"""CTC prefix beam search: the most probable unit sequences, each summed over its alignments."""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np

from asr_kd.decoding.words import Spike

# A prefix is a node of a tree; it is named by the pair (node of the prefix without its last unit, last unit).
Pair = tuple[int, int]
ROOT = 0


class Path(NamedTuple):
    """The spikes of a prefix, the last first: a chain, so that prefixes share what they have in common."""

    before: Path | None
    last: Spike


class Kept(NamedTuple):
    """A prefix in the beam: probability of its alignments that end in a blank, and of those that end in its last unit.

    Of each part the spikes of the heavier alignments: where two ways meet, the more probable one gives the times.
    """

    ends_blank: float
    ends_unit: float
    path_blank: Path | None
    path_unit: Path | None

    @property
    def path(self) -> Path | None:
        """Spikes of the heavier part."""
        return self.path_blank if self.ends_blank >= self.ends_unit else self.path_unit


def prefix_beam_search(log_probs: np.ndarray, beam: int, blank: int = 0) -> list[tuple[list[int], float]]:
    """The best unit sequences under CTC.

    Args:
        log_probs: float [frames, units], natural logarithm.
        beam: prefixes kept from frame to frame. With a beam as large as the number of possible prefixes the result is
            exact: every sequence with the sum over all of its alignments.

    Returns:
        up to `beam` pairs of unit ids without blanks and log-probability, most probable first.
    """
    search = BeamSearch(beam, blank)
    search.push(log_probs)
    return [([spike.unit for spike in spikes], score) for spikes, score in search.results()]


class BeamSearch:
    """`prefix_beam_search` as frames arrive, with the spikes of the units."""

    def __init__(self, beam: int, blank: int = 0) -> None:
        self.beam, self.blank = beam, blank
        self.frames = 0
        self._pairs: list[Pair] = [(-1, -1)]  # of every node that was ever kept
        self._nodes: dict[Pair, int] = {self._pairs[ROOT]: ROOT}
        self._kept: dict[int, Kept] = {ROOT: Kept(1.0, 0.0, None, None)}
        self._scale = (
            0.0  # the probabilities are rescaled frame by frame against underflow; this is the logarithm taken out
        )

    def push(self, log_probs: np.ndarray) -> None:
        """Hear the next frames: float [frames, units], natural logarithm."""
        frames = np.exp(log_probs.astype(np.float64))
        for frame, best in zip(frames.tolist(), _best_units(frames, self.beam + 1, self.blank), strict=True):
            self._step(frame, best)
            self.frames += 1

    def results(self) -> list[tuple[list[Spike], float]]:
        """The kept prefixes as spikes, and their log-probabilities, most probable first."""
        return [
            (_chain(kept.path), self._scale + math.log(kept.ends_blank + kept.ends_unit))
            for kept in self._kept.values()
        ]

    def _step(self, frame: list[float], best: list[int]) -> None:
        blank, pairs, kept = self.blank, self._pairs, self._kept
        blanks: dict[Pair, float] = {}
        units: dict[Pair, float] = {}
        for node, (ends_blank, ends_unit, _, _) in kept.items():
            pair = pairs[node]
            blanks[pair] = (ends_blank + ends_unit) * frame[blank]
            if node != ROOT:
                units[pair] = ends_unit * frame[pair[1]]
                # its kept parent adds to it, even where its last unit is none of the best of this frame
                if pair[0] in kept:
                    units[pair] += _extension(kept[pair[0]], pairs[pair[0]][1] == pair[1]) * frame[pair[1]]
        # where the beam is full, what stays below the worst of these cannot be kept: nothing else adds to it
        least = min(blanks[pair] + units.get(pair, 0.0) for pair in blanks) if len(kept) == self.beam else 0.0
        for node, prefix in kept.items():
            last = pairs[node][1]
            total = prefix.ends_blank + prefix.ends_unit
            for unit in best:
                if total * frame[unit] < least:
                    break
                longer = (node, unit)
                if longer not in blanks:
                    units[longer] = _extension(prefix, unit == last) * frame[unit]
        totals = {pair: blanks.get(pair, 0.0) + units.get(pair, 0.0) for pair in {**blanks, **units}}
        winners = [pair for pair in heapq.nlargest(self.beam, totals, key=totals.__getitem__) if totals[pair] > 0.0]
        if not winners:
            self._kept = {}
            return
        top = totals[winners[0]]
        self._scale += math.log(top)
        self._kept = {}
        for pair in winners:
            if pair not in self._nodes:
                self._nodes[pair] = len(pairs)
                pairs.append(pair)
            before, parent = kept.get(self._nodes[pair]), kept.get(pair[0])
            self._kept[self._nodes[pair]] = Kept(
                blanks.get(pair, 0.0) / top,
                units.get(pair, 0.0) / top,
                before and before.path,
                self._spike(pair, before, parent, frame[pair[1]]) if pair[1] >= 0 else None,
            )

    def _spike(self, pair: Pair, before: Kept | None, parent: Kept | None, probability: float) -> Path | None:
        """Spikes of the alignments that end in the unit of `pair` at this frame: the unit goes on, or it begins."""
        repeats = self._pairs[pair[0]][1] == pair[1]
        begins = _extension(parent, repeats) if parent else 0.0
        if before and before.path_unit and before.ends_unit >= begins:
            last = before.path_unit.last
            longer = Spike(last.unit, last.start, self.frames + 1, max(last.probability, probability))
            return Path(before.path_unit.before, longer)
        if not parent:
            return before and before.path_unit
        path = parent.path_blank if repeats else parent.path
        return Path(path, Spike(pair[1], self.frames, self.frames + 1, probability))


def _best_units(frames: np.ndarray, count: int, blank: int) -> list[list[int]]:
    """The `count` most probable units of each frame, without the blank, the most probable first.

    Any other extension of a prefix has at least `beam` better ones of the same prefix, so it could not be kept.
    """
    scores = -frames
    scores[:, blank] = np.inf
    count = min(count, frames.shape[1] - 1)
    best = np.argpartition(scores, min(count, frames.shape[1] - 1), axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1).tolist()


def _extension(prefix: Kept, repeats: bool) -> float:
    """Probability from which a prefix is extended: the same unit again needs a blank between."""
    return prefix.ends_blank if repeats else prefix.ends_blank + prefix.ends_unit


def _chain(path: Path | None) -> list[Spike]:
    spikes = []
    while path is not None:
        spikes.append(path.last)
        path = path.before
    return spikes[::-1]
