from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from asr_kd.audio.segments import Stretch, between, by_words, part, slices, speech
from asr_kd.audio.settings import SpeechSettings
from asr_kd.audio.vad import FRAME, RATE, Track

SETTINGS = st.builds(
    SpeechSettings,
    max_seconds=st.floats(1, 4),
    min_pause=st.floats(0, 0.8),
    padding=st.floats(0, 0.25),
    min_speech=st.floats(0, 0.25),
    threshold=st.floats(0.05, 0.95),
)


@st.composite
def tracks(draw: st.DrawFn) -> Track:
    """Runs of scores, each of up to three seconds, and any levels."""
    runs = draw(st.lists(st.tuples(st.sampled_from([0, 0.2, 0.4, 0.6, 0.8, 1]), st.integers(1, 90)), max_size=12))
    scores = np.repeat(np.float32([score for score, _ in runs]), [count for _, count in runs])
    levels = np.random.default_rng(draw(st.integers(0, 9))).uniform(-80, 0, len(scores)).astype(np.float32)
    missing = draw(st.integers(0, FRAME - 1)) if len(scores) else 0
    return Track(scores, levels, len(scores) * FRAME - missing)


def spoken(track: Track, threshold: float) -> np.ndarray:
    """Whether each sample is in a frame of speech, said slowly."""
    inside, frames = False, []
    for score in track.scores:
        inside = score >= threshold or (inside and score >= max(threshold - 0.15, 0.01))
        frames.append(inside)
    return np.repeat(np.array(frames, bool), FRAME)[: track.samples]


def stretches(marks: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(marks.astype(int), prepend=0, append=0))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


@settings(max_examples=100, deadline=None)
@given(tracks(), SETTINGS)
def test_spans_are_apart_in_order_not_too_long_and_with_the_rest_all_there_is(
    track: Track, chosen: SpeechSettings
) -> None:
    spans = speech(track, chosen)
    rest = between(spans, track.samples)
    for left, right in pairwise(spans):
        assert left.end <= right.start
    assert all(0 <= one.start < one.end <= track.samples for one in [*spans, *rest])
    assert all(one.samples <= chosen.max_seconds * RATE for one in spans)
    assert sum(one.samples for one in [*spans, *rest]) == track.samples
    assert sorted([*spans, *rest], key=lambda one: one.start)[0].start == 0 if track.samples else not spans + rest
    for rate in (8000, 11025, 44100):  # what touches stays so, what does not never overlaps, none grows too long
        there = [one.at(rate) for one in spans]
        assert all(a[1] <= b[0] for a, b in pairwise(there))
        assert all(end - start <= int(chosen.max_seconds * rate) for start, end in there)


@settings(max_examples=100, deadline=None)
@given(tracks(), SETTINGS)
def test_speech_is_kept_with_its_padding_and_nothing_else(track: Track, chosen: SpeechSettings) -> None:
    kept = np.zeros(track.samples, bool)
    for one in speech(track, chosen):
        kept[one.start : one.end] = True
    bridged = spoken(track, chosen.threshold)
    for start, end in stretches(~bridged):
        if start and end < track.samples and end - start < chosen.min_pause * RATE:
            bridged[start:end] = True
    wanted = [one for one in stretches(bridged) if one[1] - one[0] >= chosen.min_speech * RATE]
    expected = np.zeros(track.samples, bool)
    padding = round(chosen.padding * RATE)
    for start, end in wanted:
        expected[max(0, start - padding) : end + padding] = True
    np.testing.assert_array_equal(kept, expected)


def test_two_utterances_share_a_pause_that_is_shorter_than_their_padding() -> None:
    scores = np.float32([0, 0, *[1] * 20, *[0] * 8, *[1] * 20, 0])
    track = Track(scores, np.zeros(len(scores), np.float32), len(scores) * FRAME)
    first, second = speech(track, SpeechSettings(min_pause=0.1, padding=0.2))
    assert (first.start, first.end, second.start) == (0, 26 * FRAME, 26 * FRAME) and second.end == track.samples


def test_speech_without_a_pause_is_cut_where_it_is_quietest() -> None:
    levels = np.full(1000, -20.0, np.float32)
    levels[40:60] = -60  # too early for the first cut
    levels[200:206] = -50  # 6.4 s
    levels[300] = -70  # a moment is no pause
    track = Track(np.ones(1000, np.float32), levels, 1000 * FRAME)
    spans = speech(track, SpeechSettings(max_seconds=10, padding=0))
    assert 200 * FRAME < spans[0].end < 206 * FRAME
    assert [one.start for one in spans] == [0, *(one.end for one in spans[:-1])] and spans[-1].end == track.samples
    assert all(one.samples >= 2.4 * RATE for one in spans)


@settings(max_examples=200, deadline=None)
@given(tracks(), SETTINGS, st.data())
def test_pieces_hold_all_words_once_and_are_not_too_long(
    track: Track, chosen: SpeechSettings, data: st.DataObject
) -> None:
    assume(track.samples > 100)
    count = data.draw(st.integers(1, 12))
    edges = sorted(
        data.draw(st.lists(st.integers(0, track.samples), min_size=2 * count, max_size=2 * count, unique=True))
    )
    words = [Stretch(*edges[at : at + 2]) for at in range(0, 2 * count, 2)]
    found = by_words(track, words, chosen)
    longest = chosen.max_seconds * RATE
    if isinstance(found, Stretch):
        assert found.samples > longest - 0.002 * RATE
        inside = [
            edge
            for edge in pairwise(words)
            if edge[0].end > found.start and edge[1].start <= found.start + longest - FRAME
        ]
        assert not inside  # no two words between which it could have been cut
        return
    assert [first for _, first, _ in found] == [0, *(last for _, _, last in found[:-1])] and found[-1][2] == count
    spans = [span for span, _, _ in found]
    assert all(left.end <= right.start for left, right in pairwise(spans))
    assert all(0 <= span.start < span.end <= track.samples and span.samples <= longest for span in spans)
    for span, first, last in found:
        assert first < last and span.start <= words[first].start and words[last - 1].end <= span.end


def speech_at(*seconds: tuple[float, float], total: float) -> Track:
    frames = round(total * RATE / FRAME)
    times = np.arange(frames) * FRAME / RATE
    said = np.any([(times >= start) & (times < end) for start, end in seconds], axis=0)
    return Track(said.astype(np.float32), np.where(said, -20, -60).astype(np.float32), frames * FRAME)


def word(start: float, end: float) -> Stretch:
    return Stretch(round(start * RATE), round(end * RATE))


def test_words_are_parted_at_pauses_and_what_nobody_wrote_down_is_left_out() -> None:
    track = speech_at((1, 2), (2.3, 3), (5, 6), (8, 9), (12, 13), total=14)
    words = [word(1.2, 1.8), word(2.5, 2.9), word(8.3, 8.8)]  # what is said at 5 s and at 12 s has no text
    found = by_words(track, words, SpeechSettings(padding=0.2))
    assert isinstance(found, list) and [(first, last) for _, first, last in found] == [(0, 2), (2, 3)]
    for (span, _, _), (start, end) in zip(found, [(0.8, 3.2), (7.8, 9.2)], strict=True):
        assert span.start / RATE == pytest.approx(start, abs=0.04) and span.end / RATE == pytest.approx(end, abs=0.04)


def test_words_without_a_pause_are_parted_where_it_is_quietest_between_two() -> None:
    track = speech_at((0, 20), total=20)
    track.levels[round(3.5 * RATE / FRAME) :][:3] = -70  # within a word
    track.levels[round(4 * RATE / FRAME) :][:3] = -50
    words = [word(at, at + 0.9) for at in np.arange(0, 20, 1)]
    words[3] = word(3.05, 3.85)
    found = by_words(track, words, SpeechSettings(max_seconds=6))
    assert isinstance(found, list) and found[0][1:] == (0, 4) and found[0][0].end / RATE == pytest.approx(3.97, abs=0.1)
    assert all(span.samples <= 6 * RATE for span, _, _ in found)


def test_a_word_that_is_longer_than_may_be_cannot_be_cut() -> None:
    track = speech_at((0, 20), total=20)
    found = by_words(track, [word(0, 1), word(1.5, 12), word(13, 20)], SpeechSettings(max_seconds=6))
    assert isinstance(found, Stretch) and 1 <= found.start / RATE <= 1.5 and found.end == track.samples


def cut(sound: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for at in range(0, len(sound), size):
        yield sound[at : at + size]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=12), st.integers(1, 400), st.booleans())
def test_slices_are_those_of_the_whole_for_any_size_of_blocks(edges: list[int], size: int, touching: bool) -> None:
    sound = np.arange(900, dtype=np.float32)  # spans may go beyond its end
    edges = sorted(edges)
    spans = list(pairwise(edges)) if touching else list(zip(edges[::2], edges[1::2], strict=False))
    found = list(slices(cut(sound, size), spans))
    assert len(found) == len(spans)
    for one, (start, end) in zip(found, spans, strict=True):
        np.testing.assert_array_equal(one, sound[start:end])


def test_slices_hold_no_more_than_a_span_and_a_block() -> None:
    read = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal read
        for block in cut(np.arange(100_000, dtype=np.float32), 100):
            read += len(block)
            yield block

    for number, one in enumerate(slices(counted(), [(at, at + 50) for at in range(0, 99_000, 500)])):
        assert read <= 500 * number + 100
        assert one.base is None or len(one.base) <= 150


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
@pytest.mark.parametrize(("start", "end"), [(0, None), (0.125, None), (0.5, 1.25), (0, 9.0), (2.0, None), (0.5, 0.5)])
def test_a_part_is_that_of_the_whole(size: int, start: float, end: float | None) -> None:
    sound = np.arange(2400, dtype=np.float32).reshape(1200, 2)
    found = list(part(((1000, block) for block in cut(sound, size)), start, end))
    expected = sound[round(1000 * start) : None if end is None else round(1000 * end)]
    assert all(rate == 1000 for rate, _ in found)
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 2)), *(one for _, one in found)]), expected)


def test_stretches_that_touch_do_so_at_any_rate() -> None:
    assert Stretch(0, 1001).at(44100)[1] == Stretch(1001, 2000).at(44100)[0]
