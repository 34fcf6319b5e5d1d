"""CTC prefix beam search: the most probable unit sequences, each summed over its alignments."""

from __future__ import annotations

import heapq
import math

import numpy as np

# A prefix is a node of a tree; it is named by the pair (node of the prefix without its last unit, last unit).
Pair = tuple[int, int]
ROOT = 0


def prefix_beam_search(log_probs: np.ndarray, beam: int, blank: int = 0) -> list[tuple[list[int], float]]:
    """The best unit sequences under CTC.

    Args:
        log_probs: float [frames, units], natural logarithm.
        beam: prefixes kept from frame to frame. With a beam as large as the number of possible prefixes the result is
            exact: every sequence with the sum over all of its alignments.

    Returns:
        up to `beam` pairs of unit ids without blanks and log-probability, most probable first.
    """
    frames = np.exp(log_probs.astype(np.float64))
    pairs: list[Pair] = [(-1, -1)]  # of every node that was ever kept
    nodes: dict[Pair, int] = {pairs[ROOT]: ROOT}
    # node → probability of its alignments that end in a blank, and of those that end in its last unit
    kept: dict[int, tuple[float, float]] = {ROOT: (1.0, 0.0)}
    scale = 0.0  # the probabilities are rescaled frame by frame against underflow; this is the logarithm taken out

    for frame, best in zip(frames.tolist(), _best_units(frames, beam + 1, blank), strict=True):
        blanks: dict[Pair, float] = {}
        units: dict[Pair, float] = {}
        for node, (ends_blank, ends_unit) in kept.items():
            pair = pairs[node]
            blanks[pair] = (ends_blank + ends_unit) * frame[blank]
            if node != ROOT:
                units[pair] = ends_unit * frame[pair[1]]
                # its kept parent adds to it, even where its last unit is none of the best of this frame
                if pair[0] in kept:
                    units[pair] += _extension(*kept[pair[0]], pairs[pair[0]][1] == pair[1]) * frame[pair[1]]
        # where the beam is full, what stays below the worst of these cannot be kept: nothing else adds to it
        least = min(blanks[pair] + units.get(pair, 0.0) for pair in blanks) if len(kept) == beam else 0.0
        for node, (ends_blank, ends_unit) in kept.items():
            last = pairs[node][1]
            for unit in best:
                if (ends_blank + ends_unit) * frame[unit] < least:
                    break
                longer = (node, unit)
                if longer not in blanks:
                    units[longer] = _extension(ends_blank, ends_unit, unit == last) * frame[unit]
        totals = {pair: blanks.get(pair, 0.0) + units.get(pair, 0.0) for pair in {**blanks, **units}}
        winners = [pair for pair in heapq.nlargest(beam, totals, key=totals.__getitem__) if totals[pair] > 0.0]
        if not winners:
            return []
        top = totals[winners[0]]
        scale += math.log(top)
        kept = {}
        for pair in winners:
            if pair not in nodes:
                nodes[pair] = len(pairs)
                pairs.append(pair)
            kept[nodes[pair]] = blanks.get(pair, 0.0) / top, units.get(pair, 0.0) / top
    return [(_spell(pairs, node), scale + math.log(sum(parts))) for node, parts in kept.items()]


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


def _extension(ends_blank: float, ends_unit: float, repeats: bool) -> float:
    """Probability from which a prefix is extended: the same unit again needs a blank between."""
    return ends_blank if repeats else ends_blank + ends_unit


def _spell(pairs: list[Pair], node: int) -> list[int]:
    units = []
    while node != ROOT:
        node, unit = pairs[node]
        units.append(unit)
    return units[::-1]
