"""What one system got right and wrong, added up utterance by utterance; texts are not kept but for the worst few."""

from __future__ import annotations

import collections
import heapq
from dataclasses import dataclass, field

from asr_kd.evaluation.wer import Edit, ErrorCounts, counts_of

WORST, CONFUSIONS = 12, 8


@dataclass
class Scored:
    """One utterance of one system, its texts as scored."""

    key: str
    speaker: str | None
    edits: list[Edit]
    counts: ErrorCounts


@dataclass
class Tally:
    """Sums over utterances.

    Attributes:
        errors: of every utterance, in order.
        worst: a heap of the utterances with the most errors.
    """

    counts: ErrorCounts = field(default_factory=ErrorCounts)
    sentence_errors: int = 0
    errors: list[int] = field(default_factory=list)
    speakers: dict[str, ErrorCounts] = field(default_factory=dict)
    substitutions: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    deletions: collections.Counter[str] = field(default_factory=collections.Counter)
    insertions: collections.Counter[str] = field(default_factory=collections.Counter)
    worst: list[tuple[int, float, int, Scored]] = field(default_factory=list)

    def add(self, key: str, speaker: str | None, edits: list[Edit]) -> ErrorCounts:
        """Count one utterance and return its errors."""
        counts = counts_of(edits)
        self.counts += counts
        self.sentence_errors += counts.errors > 0
        self.errors.append(counts.errors)
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
        if counts.errors:
            # most errors first, then the highest rate, then the order of the data
            entry = (counts.errors, counts.rate, -len(self.errors), Scored(key, speaker, edits, counts))
            if len(self.worst) < WORST:
                heapq.heappush(self.worst, entry)
            else:
                heapq.heappushpop(self.worst, entry)
        return counts

    def worst_first(self) -> list[Scored]:
        """The utterances with the most errors."""
        return [entry[3] for entry in sorted(self.worst, reverse=True)]


def most_frequent(counter: collections.Counter) -> list[list]:
    """The most frequent entries as [word…, count], ties by spelling."""
    ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS]
    return [[*((name,) if isinstance(name, str) else name), count] for name, count in ranked]
