"""CTC prefix beam search: the most probable unit sequences, each summed over its alignments, with or without a language model."""

from __future__ import annotations

import heapq
import itertools
import math
from typing import NamedTuple

import numpy as np

from asr_kd.decoding.grammar import Grammar, State
from asr_kd.decoding.words import Spike

# A prefix is a node of a tree, identified by the pair (parent node, last unit).
Pair = tuple[int, int]
ROOT = 0
#: with a grammar, number of units of a frame that may extend a prefix: the grammar may favour a less probable one
CANDIDATES = 64
#: smallest log factor of a grammar: a probability of 0 would forbid the prefix
LEAST_FACTOR = -600.0


class Path(NamedTuple):
    """The spikes of a prefix as a linked list from the last one, so that prefixes share their common beginning."""

    before: Path | None
    last: Spike


class Kept(NamedTuple):
    """A prefix in the beam: the probability of its alignments that end in a blank, and of those that end in its last unit.

    `best_*` and `path_*` are the most probable alignment of each kind, which gives the times: its probability (on a scale of
    its own) and its spikes.
    """

    ends_blank: float
    ends_unit: float
    best_blank: float
    best_unit: float
    path_blank: Path | None
    path_unit: Path | None

    @property
    def path(self) -> Path | None:
        """Spikes of the most probable alignment."""
        if self.best_blank == self.best_unit:  # both may have underflowed to 0
            return self.path_blank if self.ends_blank >= self.ends_unit else self.path_unit
        return self.path_blank if self.best_blank > self.best_unit else self.path_unit


def prefix_beam_search(log_probs: np.ndarray, beam: int, blank: int = 0) -> list[tuple[list[int], float]]:
    """The best unit sequences under CTC: up to `beam` pairs of unit ids without blanks and log-probability, most probable first.

    Args:
        log_probs: float [frames, units], natural logarithm.
        beam: number of prefixes kept from frame to frame. If it is at least the number of possible prefixes, the result is
            exact: every sequence with the sum over all its alignments.
    """
    search = BeamSearch(beam, blank)
    search.push(log_probs)
    return [([spike.unit for spike in spikes], score) for spikes, score in search.results()]


class BeamSearch:
    """`prefix_beam_search` as frames arrive, with the spikes of the units.

    Args:
        grammar: which words may be found and how probable they are; None finds any units.
        horizon: hypotheses that differ from the best one more than this many frames back are dropped (every half horizon).
            Otherwise two readings of a word would stay in the beam for ever, as only a language model changes their ratio
            later. None keeps them.
    """

    def __init__(self, beam: int, blank: int = 0, grammar: Grammar | None = None, horizon: int | None = None) -> None:
        self.beam, self.blank, self.grammar, self.horizon = beam, blank, grammar, horizon
        self.frames = 0
        self._pairs: list[Pair] = [(-1, -1)]  # of every node that was ever kept
        self._nodes: dict[Pair, int] = {self._pairs[ROOT]: ROOT}
        # probabilities include those of the grammar: a factor on each step from a prefix to a longer one
        self._states: list[State] = [grammar.start] if grammar else []
        self._steps: dict[Pair, tuple[State | None, float]] = {}
        self._kept: dict[int, Kept] = {ROOT: Kept(1.0, 0.0, 1.0, 0.0, None, None)}
        # probabilities are rescaled in each frame against underflow; this is the logarithm of the factors taken out
        self._scale = 0.0

    def push(self, log_probs: np.ndarray) -> None:
        """Search the next frames: float [frames, units], natural logarithm."""
        frames = np.exp(log_probs.astype(np.float64))
        count = max(self.beam + 1, CANDIDATES) if self.grammar else self.beam + 1
        for frame, best in zip(frames.tolist(), _best_units(frames, count, self.blank), strict=True):
            self._step(frame, best)
            self.frames += 1
            if self.horizon and self.frames % max(1, self.horizon // 2) == 0:
                self._decide(self.frames - self.horizon)

    def results(self) -> list[tuple[list[Spike], float]]:
        """The kept prefixes as spikes and their log-probabilities, most probable first, as if the utterance ended here.

        With a lexicon, only those that end with a complete word; if there are none, all, without their incomplete word.
        """
        scored = [
            (node, [cell.last for cell in _cells(kept.path)], self._scale + math.log(kept.ends_blank + kept.ends_unit))
            for node, kept in self._kept.items()
        ]
        if not self.grammar:
            return [(spikes, score) for _, spikes, score in scored]
        ends = {node: self.grammar.finish(self._states[node]) for node in self._kept}
        found = [(spikes, score + end) for node, spikes, score in scored if (end := ends[node]) is not None]
        if not found:
            for node, spikes, score in scored:
                context, word = self._states[node]
                end = self.grammar.finish(State(context, ()))
                found.append((spikes[: -len(word)], score + (end or 0.0)))
        return sorted(found, key=lambda one: -one[1])

    def settle(self) -> list[Spike]:
        """Remove and return the spikes that all hypotheses begin with, and free what no later result needs.

        `results` then gives what follows them. How often this is called changes no result.
        """
        chains = [
            chain[: len(chain) - goes_on]  # the last unit may continue, and its spike with it
            for kept in self._kept.values()
            for part, path, goes_on in ((kept.ends_blank, kept.path_blank, 0), (kept.ends_unit, kept.path_unit, 1))
            if part > 0.0
            for chain in [_cells(path)]
        ]
        shared = itertools.takewhile(lambda cells: all(one is cells[0] for one in cells), zip(*chains, strict=False))
        settled = [cells[0] for cells in shared]
        fresh: dict[int, Path | None] = dict.fromkeys(map(id, settled))
        self._kept = {
            node: kept._replace(
                path_blank=_remade(kept.path_blank, fresh) if kept.ends_blank > 0.0 else None,
                path_unit=_remade(kept.path_unit, fresh) if kept.ends_unit > 0.0 else None,
            )
            for node, kept in self._kept.items()
        }
        self._forget()
        return [cell.last for cell in settled]

    def _decide(self, before: int) -> None:
        """Drop hypotheses that differ from the best one before that frame; the others take its times there."""
        best = next((_cells(kept.path) for kept in self._kept.values()), [])
        best = [cell for cell in best if cell.last.end <= before]
        if not best:
            return
        units = [cell.last.unit for cell in best]
        fresh: dict[int, Path | None] = {}
        agreeing = {}
        for node, kept in self._kept.items():
            chains = [_cells(kept.path_blank), _cells(kept.path_unit)]
            if [cell.last.unit for cell in max(chains, key=len)[: len(units)]] == units:
                agreeing[node] = kept
                for chain in chains:
                    fresh.update((id(own), cell) for own, cell in zip(chain, best, strict=False))
        self._kept = {
            node: kept._replace(path_blank=_remade(kept.path_blank, fresh), path_unit=_remade(kept.path_unit, fresh))
            for node, kept in agreeing.items()
        }

    def _forget(self) -> None:
        """Prune the tree to the nodes from the last common prefix of all kept ones on: no other is needed again."""
        lines = []
        for node in self._kept:
            line = [node]
            while self._pairs[line[-1]][0] >= 0:
                line.append(self._pairs[line[-1]][0])
            lines.append(line[::-1])
        if not lines:
            return
        depth = sum(1 for _ in itertools.takewhile(lambda nodes: len(set(nodes)) == 1, zip(*lines, strict=False)))
        needed = sorted({node for line in lines for node in line[depth - 1 :]})  # parents come before their children
        number = {node: new for new, node in enumerate(needed)}
        self._pairs = [(number.get(self._pairs[node][0], -1), self._pairs[node][1]) for node in needed]
        self._nodes = {pair: node for node, pair in enumerate(self._pairs)}
        if self.grammar:
            self._states = [self._states[node] for node in needed]
        self._steps = {}
        self._kept = {number[node]: kept for node, kept in self._kept.items()}

    def _factor(self, pair: Pair) -> float:
        """The grammar's factor on the probability of a prefix for its last unit; 0 if it forbids the unit."""
        if self.grammar is None:
            return 1.0
        if pair not in self._steps:
            step = self.grammar.extend(self._states[pair[0]], pair[1])
            self._steps[pair] = (None, 0.0) if step is None else (step[0], math.exp(max(step[1], LEAST_FACTOR)))
        return self._steps[pair][1]

    def _step(self, frame: list[float], best: list[int]) -> None:
        blank, pairs, kept = self.blank, self._pairs, self._kept
        blanks: dict[Pair, float] = {}
        units: dict[Pair, float] = {}
        for node, (ends_blank, ends_unit, *_) in kept.items():
            pair = pairs[node]
            blanks[pair] = (ends_blank + ends_unit) * frame[blank]
            if pair[1] >= 0:
                units[pair] = ends_unit * frame[pair[1]]
                # a parent in the beam adds to it, even if the unit is not among the best of this frame
                if pair[0] in kept:
                    units[pair] += self._begins(pair, kept[pair[0]]) * frame[pair[1]]
        # if the beam is full, an extension below the worst of these cannot be kept: nothing else adds to it
        least = min(blanks[pair] + units.get(pair, 0.0) for pair in blanks) if len(kept) == self.beam else 0.0
        if self.grammar:
            least /= math.exp(self.grammar.most)
        for node, prefix in kept.items():
            total = prefix.ends_blank + prefix.ends_unit
            for unit in best:
                if total * frame[unit] < least:
                    break
                longer = (node, unit)
                if longer not in blanks:
                    units[longer] = self._begins(longer, prefix) * frame[unit]
        totals = {pair: blanks.get(pair, 0.0) + units.get(pair, 0.0) for pair in {**blanks, **units}}
        winners = [pair for pair in heapq.nlargest(self.beam, totals, key=totals.__getitem__) if totals[pair] > 0.0]
        if not winners:
            self._kept = {}
            return
        top = totals[winners[0]]
        self._scale += math.log(top)
        best_top = max(max(prefix.best_blank, prefix.best_unit) for prefix in kept.values()) or 1.0
        self._kept = {}
        for pair in winners:
            if pair not in self._nodes:
                self._nodes[pair] = len(pairs)
                pairs.append(pair)
                if self.grammar:
                    state = self._steps[pair][0]
                    assert state is not None  # a forbidden prefix has probability 0
                    self._states.append(state)
            node = self._nodes[pair]
            before = kept.get(node)
            best_blank = max(before.best_blank, before.best_unit) * frame[blank] if before else 0.0
            best_unit, path_unit = (
                self._best_unit(pair, before, kept.get(pair[0]), frame) if pair[1] >= 0 else (0.0, None)
            )
            self._kept[node] = Kept(
                blanks.get(pair, 0.0) / top, units.get(pair, 0.0) / top, best_blank / best_top, best_unit / best_top,
                before and before.path, path_unit,
            )  # fmt: skip

    def _begins(self, pair: Pair, parent: Kept) -> float:
        """Probability with which the last unit of a prefix starts: to repeat a unit, a blank must come between."""
        repeats = self._pairs[pair[0]][1] == pair[1]
        total = parent.ends_blank if repeats else parent.ends_blank + parent.ends_unit
        return total * self._factor(pair)

    def _best_unit(
        self, pair: Pair, before: Kept | None, parent: Kept | None, frame: list[float]
    ) -> tuple[float, Path | None]:
        """The most probable alignment that ends in the unit of `pair` at this frame: the unit continues, or starts here."""
        unit, probability, best = pair[1], frame[pair[1]], 0.0
        spike = Spike(unit, self.frames, self.frames + 1, probability)
        repeats = self._pairs[pair[0]][1] == unit  # so a blank must come between
        if parent:
            best = parent.best_blank if repeats else max(parent.best_blank, parent.best_unit)
            best *= self._factor(pair)
        if before and before.path_unit:
            goes_on = before.best_unit >= best
            if before.best_unit == best and parent:  # both may have underflowed to 0
                goes_on = before.ends_unit >= self._begins(pair, parent)
            if goes_on:
                longer = before.path_unit.last.longer(spike)
                return before.best_unit * probability, Path(before.path_unit.before, longer)
        return best * probability, Path(parent.path_blank if repeats else parent.path, spike) if parent else None


def _best_units(frames: np.ndarray, count: int, blank: int) -> list[list[int]]:
    """The `count` most probable units of each frame, without the blank, the most probable first.

    Any other extension of a prefix would have at least `beam` better ones of the same prefix, so it could not be kept.
    """
    scores = -frames
    scores[:, blank] = np.inf
    count = min(count, frames.shape[1] - 1)
    best = np.argpartition(scores, min(count, frames.shape[1] - 1), axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return np.take_along_axis(best, order, axis=1).tolist()


def _cells(path: Path | None) -> list[Path]:
    cells = []
    while path is not None:
        cells.append(path)
        path = path.before
    return cells[::-1]


def _remade(path: Path | None, fresh: dict[int, Path | None]) -> Path | None:
    """The chain with cells replaced as `fresh` (by id) says; cells that must be rebuilt for that are added to `fresh`."""
    for cell in _cells(path):
        if id(cell) not in fresh:
            before = None if cell.before is None else fresh[id(cell.before)]
            fresh[id(cell)] = cell if before is cell.before else Path(before, cell.last)
    return None if path is None else fresh[id(path)]
