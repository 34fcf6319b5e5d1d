"""Cuts and labels of long recordings against what is known of them: which pieces hold which utterances, and the words in both.

Utterances and pieces that overlap belong together. A group of one utterance and one piece is `whole`, or `clipped` where the piece lacks
some of the speech; one utterance in several pieces is `split`, several in one piece `merged`, several in several `tangled`; an utterance
in no piece is `lost`, a piece without an utterance `empty`. The words of a group are compared as a whole, so no word has to be cut.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asr_kd.evaluation.wer import ErrorCounts, count_errors
from asr_kd.shards.tarset import read_checked, read_index
from asr_kd.text import NORMALIZERS

#: in the order of a table
KINDS = ("whole", "clipped", "split", "merged", "tangled", "lost", "empty")
#: seconds by which an utterance and a piece overlap at least, and that a whole one may lack at each end
LEAST, LACK = 0.1, 0.1
NORMALIZE = NORMALIZERS["basic"].apply


@dataclass(frozen=True)
class Span:
    """Where something lies in a recording, in seconds; the key of an utterance or a piece, or the kind of a stretch."""

    recording: str
    start: float
    end: float
    key: str

    def shared(self, other: Span) -> float:
        """Seconds of both."""
        if self.recording != other.recording:
            return 0.0
        return max(0.0, min(self.end, other.end) - max(self.start, other.start))


@dataclass
class Group:
    """Utterances and pieces that belong together, in order; one of the two may be missing."""

    utterances: list[Span] = field(default_factory=list)
    pieces: list[Span] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        ours, theirs = len(self.utterances), len(self.pieces)
        if not ours or not theirs:
            return "lost" if ours else "empty"
        if ours == theirs == 1:
            said, piece = self.utterances[0], self.pieces[0]
            return "clipped" if piece.start > said.start + LACK or piece.end < said.end - LACK else "whole"
        return "split" if ours == 1 else "merged" if theirs == 1 else "tangled"

    def errors(self, texts: Mapping[str, str], labels: Mapping[str, str]) -> ErrorCounts:
        """Of the labels of its pieces against the texts of its utterances, by keys; a piece without a label says nothing."""
        said = " ".join(texts[one.key] for one in self.utterances)
        return count_errors(NORMALIZE(said), NORMALIZE(" ".join(labels.get(one.key, "") for one in self.pieces)))


def lines(path: Path) -> list[dict]:
    """The JSON lines of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_reference(folder: Path) -> tuple[list[Span], dict[str, str]]:
    """What `compose.py` knows of its recordings: the speech of each utterance, and the texts by key."""
    found = lines(folder / "reference.jsonl")
    spans = [Span(one["recording"], *one["speech"], one["key"]) for one in found]
    return spans, {one["key"]: one["text"] for one in found}


def read_pieces(folder: Path, reference: Path) -> list[Span]:
    """The pieces that `prepare` cut: where each lies, by its fields; pieces of the reference itself have its bounds."""
    known = {one["key"]: one for one in lines(reference / "reference.jsonl")}
    pieces = []
    for shard in read_index(folder):
        for sample in read_checked(folder, shard):
            if sample.key in known:
                one = known[sample.key]
                pieces.append(Span(one["recording"], one["start"], one["end"], sample.key))
            else:
                bounds = (float(sample.fields[name]) for name in ("source_start", "source_end"))
                pieces.append(Span(sample.key.rsplit("-", 2)[0], *bounds, sample.key))
    return pieces


def grouped(utterances: Iterable[Span], pieces: Iterable[Span]) -> list[Group]:
    """The groups, in order. Neither utterances nor pieces overlap among themselves."""
    groups: list[Group] = []
    spans = [(one, True) for one in utterances] + [(one, False) for one in pieces]
    for span, is_said in sorted(spans, key=lambda pair: (pair[0].recording, pair[0].start, pair[0].end)):
        before = groups[-1] if groups else Group()
        others = before.pieces if is_said else before.utterances
        if not any(span.shared(one) >= min(LEAST, span.end - span.start, one.end - one.start) > 0 for one in others):
            groups.append(before := Group())
        (before.utterances if is_said else before.pieces).append(span)
    return groups


@dataclass
class Cuts:
    """What became of the speech in recordings and of what lies between it, in seconds where not said otherwise.

    Attributes:
        share: utterances by kind of their group, as shares of all.
        speech: in all utterances; of it `left_out` lies in no piece.
        kept: in the pieces, but no speech.
        empty: pieces without speech; by what lies there, how many, and `empty_seconds` of them.
        starts: from the start of a piece to that of its speech, of whole and clipped utterances; `ends` likewise.
    """

    share: dict[str, float]
    pieces: int
    speech: float
    left_out: float
    kept: float
    empty: dict[str, int]
    empty_seconds: float
    starts: list[float]
    ends: list[float]


def cuts_of(groups: Sequence[Group], between: Sequence[Span]) -> Cuts:
    """What cuts are worth; `between`: the stretches in which nobody speaks, by kind."""
    count = sum(len(group.utterances) for group in groups)
    share: collections.Counter[str] = collections.Counter()
    speech = covered = pieces = kept = 0.0
    empty: collections.Counter[str] = collections.Counter()
    seconds = 0.0
    starts, ends = [], []
    for group in groups:
        share[group.kind] += len(group.utterances)
        shared = sum(one.shared(piece) for one in group.utterances for piece in group.pieces)
        long = sum(piece.end - piece.start for piece in group.pieces)
        speech += sum(one.end - one.start for one in group.utterances)
        covered, kept, pieces = covered + shared, kept + long - shared, pieces + len(group.pieces)
        if group.kind == "empty":
            piece = group.pieces[0]
            beside = max(between, key=piece.shared, default=piece)
            empty[beside.key if beside is not piece and piece.shared(beside) else "pause"] += 1
            seconds += long
        elif group.kind in ("whole", "clipped"):
            said, piece = group.utterances[0], group.pieces[0]
            starts.append(said.start - piece.start)
            ends.append(piece.end - said.end)
    shares = {kind: share[kind] / count for kind in KINDS[:-1]}
    return Cuts(shares, int(pieces), speech, speech - covered, kept, dict(empty), seconds, starts, ends)


def errors_of(groups: Iterable[Group], texts: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, ErrorCounts]:
    """Word errors by kind of group, of those kinds that there are."""
    found: dict[str, ErrorCounts] = {}
    for group in groups:
        found[group.kind] = found.get(group.kind, ErrorCounts()) + group.errors(texts, labels)
    return {kind: found[kind] for kind in KINDS if kind in found}
