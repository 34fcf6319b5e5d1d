"""Lines of scores → sums: `Scores` hears all lines once. Of an utterance a few numbers are held, never its texts."""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from asr_kd.evaluation.bootstrap import interval, resampled_rates
from asr_kd.evaluation.calibration import Calibration, Delays, timed_words
from asr_kd.evaluation.parts import Line
from asr_kd.evaluation.schema import Interval
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.significance import MatchedPairs, marks, segments
from asr_kd.evaluation.slices import Fields
from asr_kd.evaluation.tally import Tally, hold
from asr_kd.evaluation.wer import align
from asr_kd.text import NORMALIZERS


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
        """Count a shard of the set of this name; `lines` are system by system, with the same utterances in the same order."""
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
                hold(self.changed[name], (abs(change), -len(self.words), change, line))
        for (a, b), pairs in self.pairs.items():
            pairs.add(segments(marked[a], marked[b]))


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
