"""What one system got right and wrong, added up utterance by utterance; texts are not kept but for the worst few."""

from __future__ import annotations

import collections
import heapq
from array import array
from dataclasses import dataclass, field
from typing import TypeVar

from asr_kd.evaluation.parts import Line
from asr_kd.evaluation.wer import Edit, ErrorCounts, counts_of, edit_distance

K = TypeVar("K", str, tuple[str, str])

WORST, CONFUSIONS = 12, 8
CONFUSIONS_HELD = 100_000  # of each kind; when there are more, the rarer half is forgotten


@dataclass
class Mistaken:
    """One utterance of one system: its line, the alignment of its texts as scored, and their errors."""

    line: Line
    edits: list[Edit]
    counts: ErrorCounts


@dataclass
class Tally:
    """Sums over utterances.

    Attributes:
        errors: of every utterance, in order.
        character_errors: likewise.
        edit_distance: the fewest word edits, summed over utterances; what jiwer counts.
        worst: a heap of the utterances with the most errors.
    """

    counts: ErrorCounts = field(default_factory=ErrorCounts)
    sentence_errors: int = 0
    errors: array[int] = field(default_factory=lambda: array("i"))
    characters: int = 0
    character_errors: array[int] = field(default_factory=lambda: array("i"))
    edit_distance: int = 0
    same_as_teacher: int = 0
    sets: dict[str, ErrorCounts] = field(default_factory=dict)
    speakers: dict[str, ErrorCounts] = field(default_factory=dict)
    substitutions: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    deletions: collections.Counter[str] = field(default_factory=collections.Counter)
    insertions: collections.Counter[str] = field(default_factory=collections.Counter)
    worst: list[tuple[int, float, int, Mistaken]] = field(default_factory=list)

    def add(self, line: Line, edits: list[Edit]) -> None:
        """Count one utterance.

        Args:
            line: as scoring writes it.
            edits: the alignment of its texts as scored.
        """
        counts, speaker = counts_of(edits), line["speaker"]
        self.counts += counts
        self.sentence_errors += counts.errors > 0
        self.errors.append(counts.errors)
        self.characters += line["characters"]
        self.character_errors.append(line["character_errors"])
        self.edit_distance += edit_distance(line["reference_scored"], line["hypothesis_scored"]) if counts.errors else 0
        self.same_as_teacher += bool(line["same_as_teacher"])
        self.sets[line["set"]] = self.sets.get(line["set"], ErrorCounts()) + counts
        if speaker is not None:
            self.speakers[speaker] = self.speakers.get(speaker, ErrorCounts()) + counts
        for edit in edits:
            match edit.kind:
                case "substitution":
                    assert edit.reference is not None and edit.hypothesis is not None
                    self.substitutions[edit.reference, edit.hypothesis] += 1
                case "deletion":
                    assert edit.reference is not None
                    self.deletions[edit.reference] += 1
                case "insertion":
                    assert edit.hypothesis is not None
                    self.insertions[edit.hypothesis] += 1
        _bound(self.substitutions)
        _bound(self.deletions)
        _bound(self.insertions)
        if counts.errors:
            # most errors first, then the highest rate, then the order of the data
            entry = (counts.errors, counts.rate, -len(self.errors), Mistaken(line, edits, counts))
            if len(self.worst) < WORST:
                heapq.heappush(self.worst, entry)
            else:
                heapq.heappushpop(self.worst, entry)

    def worst_first(self) -> list[Mistaken]:
        """The utterances with the most errors."""
        return [entry[3] for entry in sorted(self.worst, reverse=True)]


def _bound(counter: collections.Counter) -> None:
    if len(counter) > CONFUSIONS_HELD:
        kept = dict(counter.most_common(CONFUSIONS_HELD // 2))
        counter.clear()
        counter.update(kept)


def most_frequent(counter: collections.Counter[K]) -> list[tuple[K, int]]:
    """The most frequent entries and their counts, ties by spelling."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]
