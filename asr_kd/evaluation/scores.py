"""Lines of scores → sums: `Scores` hears all lines once. Of an utterance a few numbers are held, never its texts."""

from __future__ import annotations

import functools
import heapq
import itertools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from asr_kd.evaluation.bootstrap import interval, resampled
from asr_kd.evaluation.calibration import Calibration, Delays, timed_words
from asr_kd.evaluation.parts import Line
from asr_kd.evaluation.schema import Interval
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.significance import MatchedPairs, marks, segments
from asr_kd.evaluation.slices import Fields
from asr_kd.evaluation.tally import Tally
from asr_kd.evaluation.wer import align
from asr_kd.text import NORMALIZERS

#: utterances that changed most, held for each system
CHANGED = 12


class Set:
    """A test set by name: what was scored of it."""

    def __init__(self) -> None:
        self.utterances = self.words = self.quarantined = 0
        self.seconds = 0.0
        self.speakers: set[str | None] = set()


@dataclass(frozen=True)
class Changed:
    """An utterance in which a system makes `change` more errors than the baseline (or else the teacher)."""

    key: str
    set: str
    shard: str
    change: int


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
        self.changed: dict[str, list[tuple[int, int, Changed]]] = {name: [] for name in names}
        self.sets: dict[str, Set] = {}
        self.fields = Fields()
        self.words, self.characters = array("i"), array("i")
        self.speakers = array("i")  # -1 where the speaker is not known
        self.set_of = array("i")
        self.speaker_numbers: dict[str, int] = {}

    def add(self, name: str, lines: Iterable[Line], seconds: float, quarantined: int) -> None:
        """Count a shard of the set of this name.

        Args:
            lines: as scoring writes them, system by system, each with the same utterances in the same order.
            seconds: of the audio that was scored.
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
        self.speakers.append(
            -1 if speaker is None else self.speaker_numbers.setdefault(speaker, len(self.speaker_numbers))
        )
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
            if self.reference not in (None, name):
                self._compare(line, line["errors"] - lines[self.reference]["errors"])
        for (a, b), pairs in self.pairs.items():
            pairs.add(segments(marked[a], marked[b]))

    def _compare(self, line: Line, change: int) -> None:
        """Hold on to the utterances that changed most against the baseline (or else the teacher)."""
        if not change:
            return
        heap = self.changed[line["system"]]
        entry = (abs(change), -len(self.words), Changed(line["key"], line["set"], line["shard"], change))
        (heapq.heappush if len(heap) < CHANGED else heapq.heappushpop)(heap, entry)

    @property
    def quarantined(self) -> int:
        """Utterances that could not be scored."""
        return sum(one.quarantined for one in self.sets.values())


class Resampler:
    """Error rates of resampled test sets, for the whole set or a part of it."""

    def __init__(self, scores: Scores, settings: EvalSettings) -> None:
        self.scores, self.settings = scores, settings
        self.errors = np.array([tally.errors for tally in scores.tallies.values()])
        self.words = np.array(scores.words)
        self.speakers = np.array(scores.speakers)

    def rates(self, part: np.ndarray | slice) -> dict[str, np.ndarray]:
        """Resampled WERs of every system, by name: the same draws for all; not finite where no words were drawn.

        Args:
            part: the utterances, bool [utterances] or a slice.
        """
        return dict(zip(self.scores.tallies, self._drawn(part, self.errors, self.words), strict=True))

    def character_interval(self, name: str) -> Interval | None:
        """The interval of a system's character error rate."""
        rows = np.array([self.scores.tallies[name].character_errors])
        return interval(self._drawn(slice(None), rows, np.array(self.scores.characters))[0])

    def _drawn(self, part: np.ndarray | slice, rows: np.ndarray, length: np.ndarray) -> np.ndarray:
        settings = self.settings
        drawn, lengths = resampled(rows[:, part], length[part], self.speakers[part], settings.bootstrap, settings.seed)
        with np.errstate(divide="ignore", invalid="ignore"):
            return drawn / lengths
