"""What one system got right and wrong, added up utterance by utterance; texts are not kept but for the worst few."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from asr_kd.evaluation.parts import Line
from asr_kd.evaluation.wer import Edit, ErrorCounts, counts_of, edit_distance

HELD, CONFUSIONS = 12, 8  # utterances that are held of each kind and system, and confusions that are listed
CONFUSIONS_HELD = 100_000  # of each kind; when there are more, the rarer half is forgotten


@dataclass
class Tally:
    """Sums over utterances."""

    counts: ErrorCounts = field(default_factory=ErrorCounts)
    sentence_errors: int = 0
    errors: array[int] = field(default_factory=lambda: array("i"))  # of every utterance, in order
    characters: int = 0
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
        self.characters += line["characters"]
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
        hold(self.worst, (counts.errors, counts.rate, -len(self.errors), line, edits))

    def most_frequent(self, kind: str) -> list[tuple[Any, ...]]:
        """The most frequent confusions of a kind, words and how often, ties by spelling."""
        found = sorted(self.confusions[kind].items(), key=lambda item: (-item[1], item[0]))
        return [(*words, count) for words, count in found[:CONFUSIONS]]


def hold(heap: list[Any], entry: Any) -> None:
    """Keep an entry where it is among the greatest."""
    (heapq.heappush if len(heap) < HELD else heapq.heappushpop)(heap, entry)
