"""Where a recording is cut: spans of speech from what a detector found, and the sound of spans from a stream of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from asr_kd.audio.settings import SpeechSettings
from asr_kd.audio.vad import FRAME, RATE, Track

STAY = 0.15  # below the threshold by so much, speech has ended: one weak frame ends none
SMOOTH = 7  # frames (0.2 s) over which the level is averaged where the quietest place is looked for
ROUNDING = 0.001  # seconds by which spans stay below the longest: at another rate they may grow by a sample


@dataclass(frozen=True)
class Stretch:
    """Samples `start` up to `end` of a recording, at RATE."""

    start: int
    end: int

    @property
    def samples(self) -> int:
        """How many they are."""
        return self.end - self.start

    @property
    def middle(self) -> int:
        """The sample in the middle."""
        return (self.start + self.end) // 2

    def at(self, rate: int) -> tuple[int, int]:
        """The same at another rate: stretches that touch do so there."""
        return self.start * rate // RATE, self.end * rate // RATE


def speech(track: Track, settings: SpeechSettings) -> list[Stretch]:
    """Where a recording is cut: in order, no two overlap, each at most `max_seconds` long.

    Frames of speech that shorter pauses than `min_pause` part are one utterance; those shorter than `min_speech` are left out; the others are
    padded; and what is too long is cut at the quietest place of the second half of what may be.
    """
    found = _padded(_runs(track, settings), round(settings.padding * RATE), track.samples)
    levels = _smooth(track) if found else track.levels
    longest = int((settings.max_seconds - ROUNDING) * RATE)
    return [piece for one in found for piece in _short(one, levels, longest)]


def between(spans: Sequence[Stretch], samples: int) -> list[Stretch]:
    """What the spans leave out of a recording of so many samples."""
    starts = [0, *(one.end for one in spans)]
    ends = [*(one.start for one in spans), samples]
    return [Stretch(start, end) for start, end in zip(starts, ends, strict=True) if end > start]


def by_words(
    track: Track, words: Sequence[Stretch], settings: SpeechSettings
) -> list[tuple[Stretch, int, int]] | Stretch:
    """Where a recording is cut whose words are known: pieces in order, each with its first word and the one behind its last.

    Pauses of `min_pause` between two words part them, with padding as of `speech`; what is between two such pauses belongs to no word and is left
    out. What is too long then is cut between the words of its second half where it is quietest. Where no place between words is left, the piece
    that is too long comes back alone.

    Args:
        words: about where each one lies: CTC emits it somewhere within its sound.
    """
    spoken, levels, padding = _spoken(track, settings), _smooth(track), round(settings.padding * RATE)
    longest = int((settings.max_seconds - ROUNDING) * RATE)
    edges = [Stretch(one, other) for one, other in zip([0, *(word.end for word in words)], [*(word.start for word in words), track.samples], strict=True)]  # fmt: skip
    pauses = [_pauses(spoken, edge, settings.min_pause * RATE) for edge in edges]
    parted = [0, *(index for index in range(1, len(words)) if pauses[index]), len(words)]
    pieces: list[tuple[Stretch, int, int]] = []
    for first, last in pairwise(parted):
        before, behind = pauses[first][-1:], pauses[last][:1]
        start = max(before[0].end - padding, before[0].middle) if before else 0
        end = min(behind[0].start + padding, behind[0].middle) if behind else track.samples
        while end - start > longest:
            places = [(*_quietest(levels, edges[index]), index) for index in range(first + 1, last)]
            places = [one for one in places if start < one[1] <= start + longest]
            late = [one for one in places if one[1] >= start + longest // 2] or places[-1:]
            if not late:
                return Stretch(start, end)
            _, at, index = min(late)
            pieces.append((Stretch(start, at), first, index))
            start, first = at, index
        pieces.append((Stretch(start, end), first, last))
    return pieces


def _pauses(spoken: np.ndarray, edge: Stretch, least: float) -> list[Stretch]:
    """The stretches without speech in `edge` that have at least so many samples."""
    first = edge.start // FRAME
    silent = ~spoken[first : -(-edge.end // FRAME)]
    bounds = np.flatnonzero(np.diff(silent.astype(np.int8), prepend=0, append=0)).reshape(-1, 2) + first
    found = [Stretch(max(edge.start, a * FRAME), min(edge.end, b * FRAME)) for a, b in bounds.tolist()]
    return [one for one in found if one.samples >= max(least, 1)]


def _quietest(levels: np.ndarray, edge: Stretch) -> tuple[float, int]:
    """The lowest level between two words, and the sample where it is."""
    first, last = edge.start // FRAME, max(edge.start // FRAME, (edge.end - 1) // FRAME)
    at = first + int(levels[first : last + 1].argmin())
    return float(levels[at]), min(max(at * FRAME + FRAME // 2, edge.start), edge.end)


def _smooth(track: Track) -> np.ndarray:
    return np.convolve(track.levels.astype(np.float64), np.full(SMOOTH, 1 / SMOOTH), "same")


def _spoken(track: Track, settings: SpeechSettings) -> np.ndarray:
    """Whether each frame is speech, bool [frames]; those between the two thresholds are what the last clear frame before them was."""
    clear = (track.scores >= settings.threshold) | (track.scores < max(settings.threshold - STAY, 0.01))
    last = np.maximum.accumulate(np.where(clear, np.arange(len(clear)), -1))
    return np.where(last >= 0, track.scores[last] >= settings.threshold, False)


def _runs(track: Track, settings: SpeechSettings) -> list[Stretch]:
    """Speech between pauses, as it is, without padding."""
    edges = np.flatnonzero(np.diff(_spoken(track, settings).astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    runs: list[Stretch] = []
    for start, end in (edges * FRAME).tolist():
        end = min(end, track.samples)
        if runs and start - runs[-1].end < settings.min_pause * RATE:
            runs[-1] = Stretch(runs[-1].start, end)
        else:
            runs.append(Stretch(start, end))
    return [run for run in runs if run.samples >= settings.min_speech * RATE]


def _padded(runs: list[Stretch], padding: int, samples: int) -> list[Stretch]:
    """Each with `padding` samples more on both sides, up to the middle of a pause that is shorter than both, and to the ends."""
    middles = [Stretch(left.end, right.start).middle for left, right in pairwise(runs)]
    return [
        Stretch(max(run.start - padding, first), min(run.end + padding, last))
        for run, first, last in zip(runs, [0, *middles], [*middles, samples], strict=False)
    ]


def _short(whole: Stretch, levels: np.ndarray, longest: int) -> Iterator[Stretch]:
    """Pieces of at most `longest` samples, cut in the middle of the quietest frames; none is much shorter than a quarter of that."""
    start = whole.start
    while whole.end - start > longest:
        # frames whose middle lies in the second half of what may be, and a quarter before the end
        first, last = start + longest // 2, min(start + longest, whole.end - longest // 4)
        frames = np.arange(-(-(first - FRAME // 2) // FRAME), (last - FRAME // 2) // FRAME + 1)
        cut = int(frames[levels[frames].argmin()]) * FRAME + FRAME // 2
        yield Stretch(start, cut)
        start = cut
    yield Stretch(start, whole.end)


def part(blocks: Iterable[tuple[int, np.ndarray]], start: float, end: float | None) -> Iterator[tuple[int, np.ndarray]]:
    """Of blocks of rate and [samples, channels] those from `start` to `end` in seconds, cut to it; `end` None: to the end."""
    at = 0
    for rate, samples in blocks:
        first, last = round(start * rate), round(end * rate) if end is not None else None
        kept = samples[max(0, first - at) : None if last is None else max(0, last - at)]
        at += len(samples)
        if len(kept):
            yield rate, kept
        if last is not None and at >= last:
            return


def slices(blocks: Iterable[np.ndarray], spans: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
    """The samples of spans that are in order and do not overlap; memory holds one of them and a block.

    A span that goes beyond the end of the blocks has what is there.
    """
    blocks = iter(blocks)
    held: list[np.ndarray] = []
    at = count = 0  # first sample that is held, and how many are
    for start, end in spans:
        while at + count < end and (block := next(blocks, None)) is not None:
            if at + count + len(block) <= start:  # nothing before it is wanted
                held, at, count = [], at + count + len(block), 0
                continue
            held.append(block)
            count += len(block)
        whole = np.concatenate([np.empty(0, np.float32), *held])
        yield whole[start - at : end - at]
        held, at, count = [whole[end - at :]], min(end, at + count), max(at + count - end, 0)
