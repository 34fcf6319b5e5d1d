"""Lines of scores → sums: `Scores` hears all lines once. Of an utterance a few numbers are held; texts of the worst few alone."""

from __future__ import annotations

import functools
import heapq
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asr_kd.evaluation.calibration import Calibration, Delays, timed_words
from asr_kd.evaluation.parts import Line
from asr_kd.evaluation.schema import Interval
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.significance import MatchedPairs, interval, marks, resampled_rates, segments
from asr_kd.evaluation.slices import Fields
from asr_kd.evaluation.wer import Edit, ErrorCounts, align, counts_of, edit_distance
from asr_kd.text import NORMALIZERS

HELD, CONFUSIONS = 12, 8  # utterances that are held of each kind and system, and confusions that are listed
CONFUSIONS_HELD = 100_000  # of each kind; when there are more, the rarer half is forgotten


@dataclass
class Tally:
    """What one system got right and wrong, added up utterance by utterance."""

    counts: ErrorCounts = field(default_factory=ErrorCounts)
    sentence_errors: int = 0
    errors: array[int] = field(default_factory=lambda: array("i"))  # of every utterance, in order
    character_errors: array[int] = field(default_factory=lambda: array("i"))
    edit_distance: int = 0  # the fewest word edits; what jiwer counts
    same_as_teacher: int = 0
    sets: dict[str, ErrorCounts] = field(default_factory=dict)
    speakers: dict[str, ErrorCounts] = field(default_factory=dict)
    #: by kind of edit, the words (said, recognised) and how often
    confusions: dict[str, Counter[tuple[str, ...]]] = field(
        default_factory=lambda: {kind: Counter() for kind in ("substitution", "deletion", "insertion")}
    )
    #: a heap of the utterances with the most errors, at the end of each the line and the alignment of its texts as scored
    worst: list[tuple[int, float, int, Line, list[Edit]]] = field(default_factory=list)

    def add(self, line: Line, edits: list[Edit]) -> None:
        """Count one utterance; `edits`: the alignment of its texts as scored."""
        counts, speaker = counts_of(edits), line["speaker"]
        self.counts += counts
        self.sentence_errors += counts.errors > 0
        self.errors.append(counts.errors)
        self.character_errors.append(line["character_errors"])
        self.edit_distance += edit_distance(line["reference_scored"], line["hypothesis_scored"]) if counts.errors else 0
        self.same_as_teacher += bool(line["same_as_teacher"])
        self.sets[line["set"]] = self.sets.get(line["set"], ErrorCounts()) + counts
        if speaker is not None:
            self.speakers[speaker] = self.speakers.get(speaker, ErrorCounts()) + counts
        if not counts.errors:
            return
        for kind, *words in edits:
            if kind != "equal":
                self.confusions[kind][tuple(word for word in words if word is not None)] += 1
        for name, counter in self.confusions.items():
            if len(counter) > CONFUSIONS_HELD:
                self.confusions[name] = Counter(dict(counter.most_common(CONFUSIONS_HELD // 2)))
        # most errors first, then the highest rate, then the order of the data
        _hold(self.worst, (counts.errors, counts.rate, -len(self.errors), line, edits))

    def most_frequent(self, kind: str) -> list[tuple[Any, ...]]:
        """The most frequent confusions of a kind, words and how often, ties by spelling."""
        found = sorted(self.confusions[kind].items(), key=lambda item: (-item[1], item[0]))
        return [(*words, count) for words, count in found[:CONFUSIONS]]


@dataclass
class Set:
    """What was scored of a test set."""

    utterances: int = 0
    words: int = 0
    quarantined: int = 0
    seconds: float = 0.0
    speakers: set[str | None] = field(default_factory=set)


class Scores:
    """All that one pass over the lines leaves: sums, and a few numbers for each utterance."""

    def __init__(self, settings: EvalSettings) -> None:
        names = list(settings.systems)
        self.teacher, self.reference = settings.teacher, settings.baseline or settings.teacher
        # a word that comes again is normalised once
        self.normalize = functools.lru_cache(100_000)(NORMALIZERS[settings.normalizer].apply)
        self.tallies = {name: Tally() for name in names}
        self.pairs = {pair: MatchedPairs() for pair in itertools.combinations(names, 2)}
        self.calibrations = {name: Calibration() for name in names}
        self.delays = {name: Delays() for name in names if self.teacher not in (None, name)}
        #: heaps of the utterances that changed most against the baseline (or else the teacher), by how many errors, and their lines
        self.changed: dict[str, list[tuple[int, int, int, Line]]] = {name: [] for name in names}
        self.sets: dict[str, Set] = {}
        self.fields = Fields()
        self.words, self.characters = array("i"), array("i")
        self.speakers = array("i")  # -1 where the speaker is not known
        self.set_of = array("i")
        self.speaker_numbers: dict[str | None, int] = {None: -1}

    def add(self, name: str, lines: Iterable[Line], seconds: float, quarantined: int) -> None:
        """Count a shard of the set of this name.

        Args:
            name: of the set.
            lines: as scoring writes them, system by system, each with the same utterances in the same order.
            seconds: of the audio that was scored.
            quarantined: utterances that could not be scored.
        """
        by_system: dict[str, list[Line]] = {system: [] for system in self.tallies}
        for line in lines:
            by_system[line["system"]].append(line)
        scored = self.sets.setdefault(name, Set())
        scored.seconds += seconds
        scored.quarantined += quarantined
        number = list(self.sets).index(name)
        for utterance in zip(*by_system.values(), strict=True):
            self._add(scored, number, {line["system"]: line for line in utterance})

    def _add(self, scored: Set, number: int, lines: dict[str, Line]) -> None:
        first = next(iter(lines.values()))
        speaker = first["speaker"]
        scored.utterances += 1
        scored.words += first["words"]
        scored.speakers.add(speaker)
        self.fields.add(first)
        self.words.append(first["words"])
        self.characters.append(first["characters"])
        self.set_of.append(number)
        self.speakers.append(self.speaker_numbers.setdefault(speaker, len(self.speaker_numbers) - 1))
        edits = {name: align(line["reference_scored"], line["hypothesis_scored"]) for name, line in lines.items()}
        marked = {name: marks(one) for name, one in edits.items()}
        timed = {name: timed_words(line["times"], edits[name], self.normalize) for name, line in lines.items()}
        teacher = timed[self.teacher] if self.teacher else None
        for name, line in lines.items():
            self.tallies[name].add(line, edits[name])
            words = timed[name]
            if words is not None:
                self.calibrations[name].add(words)
                if teacher is not None and name in self.delays:
                    self.delays[name].add(words, teacher)
            change = line["errors"] - lines[self.reference or name]["errors"]
            if change:
                _hold(self.changed[name], (abs(change), -len(self.words), change, line))
        for (a, b), pairs in self.pairs.items():
            pairs.add(segments(marked[a], marked[b]))


def _hold(heap: list[Any], entry: Any) -> None:
    """Keep an entry where it is among the greatest."""
    (heapq.heappush if len(heap) < HELD else heapq.heappushpop)(heap, entry)


class Resampler:
    """Error rates of resampled test sets, for the whole set or a part of it."""

    def __init__(self, scores: Scores, settings: EvalSettings) -> None:
        self.scores, self.settings = scores, settings
        self.errors = np.array([tally.errors for tally in scores.tallies.values()])
        self.words = np.array(scores.words)
        self.speakers = np.array(scores.speakers)

    def rates(self, part: np.ndarray | slice) -> dict[str, np.ndarray]:
        """Resampled WERs of every system on some utterances (bool [utterances]), by name: the same draws for all."""
        return dict(zip(self.scores.tallies, self._drawn(part, self.errors, self.words), strict=True))

    def character_interval(self, name: str) -> Interval | None:
        """The interval of a system's character error rate."""
        rows = np.array([self.scores.tallies[name].character_errors])
        return interval(self._drawn(slice(None), rows, np.array(self.scores.characters))[0])

    def _drawn(self, part: np.ndarray | slice, rows: np.ndarray, length: np.ndarray) -> np.ndarray:
        speakers, settings = self.speakers[part], self.settings
        return resampled_rates(rows[:, part], length[part], speakers, settings.bootstrap, settings.seed)
